"""Encoding, and decoding one id at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodes.engine.errors import PromptTooLong
from nodes.engine.tokenizer import Tokenizer, TokenizerInvalid
from nodes.model_tools.random_llama import IM_END, small_tokenizer

VOCABULARY = 512
TOKENIZER = Tokenizer(small_tokenizer(VOCABULARY))


def stream(token_ids: list[int]) -> str:
    decoder = TOKENIZER.decoder()
    return "".join(decoder.feed(token_id) for token_id in token_ids)


@given(st.text(max_size=60))
def test_text_comes_back_from_its_ids_one_at_a_time(text: str) -> None:
    text = text.replace("<|", "")
    assert stream(TOKENIZER.encode(text)) == text


@given(st.lists(st.integers(0, VOCABULARY - 1), max_size=60))
def test_streamed_text_is_the_decoded_text_up_to_an_incomplete_character(token_ids: list[int]) -> None:
    whole, streamed = TOKENIZER.decode(token_ids), stream(token_ids)
    assert whole.startswith(streamed)
    assert set(whole[len(streamed) :]) <= {"\N{REPLACEMENT CHARACTER}"}


def test_a_character_is_held_back_until_it_is_whole() -> None:
    decoder = TOKENIZER.decoder()
    pieces = [decoder.feed(token_id) for token_id in TOKENIZER.encode("a😀")]
    assert pieces == ["a", "", "", "", "😀"]


def test_special_tokens_are_recognised_and_not_shown() -> None:
    assert TOKENIZER.encode("<|im_end|>") == [IM_END]
    assert stream([*TOKENIZER.encode("a"), IM_END, *TOKENIZER.encode("b")]) == "ab"


def test_ids_beyond_the_vocabulary_decode_to_nothing() -> None:
    assert stream([VOCABULARY + 5, *TOKENIZER.encode("a")]) == "a"
    assert TOKENIZER.vocabulary_size == VOCABULARY
    assert TOKENIZER.token(IM_END) == "<|im_end|>"
    assert TOKENIZER.token(VOCABULARY) is None


@pytest.mark.parametrize("text", ["0" * 300_000, "word " * 60_000, "😀" * 40_000])
def test_a_text_far_beyond_the_limit_is_not_encoded_to_its_end(text: str) -> None:
    with pytest.raises(PromptTooLong, match="more than") as raised:
        TOKENIZER.encode(text, 100)
    assert 100 < raised.value.tokens <= len(TOKENIZER.encode(text))


@given(st.text(max_size=200), st.integers(1, 20))
def test_a_limit_changes_no_ids(text: str, limit: int) -> None:
    ids = TOKENIZER.encode(text)
    try:
        assert TOKENIZER.encode(text, limit) == ids
    except PromptTooLong:
        assert len(ids) > limit


def test_lone_surrogates_become_question_marks() -> None:
    assert stream(TOKENIZER.encode("a\ud800b")) == "a?b"


@pytest.mark.parametrize(
    "content", [None, b"", b"\x00garbage", b'{"model": 3}'], ids=["absent", "empty", "bytes", "json"]
)
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "tokenizer.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(TokenizerInvalid):
        Tokenizer.from_file(file)
