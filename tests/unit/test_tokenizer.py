"""Encoding, and decoding one id at a time."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from nodes.engine.errors import PromptTooLong
from nodes.engine.tokenizer import SKIPPED_IDS, Tokenizer, TokenizerInvalid
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


def byte_fallback_tokenizer() -> Tokenizer:
    """As Llama 2's and Gemma's: words begin with a mark, the first one's is no space, other characters are bytes."""
    vocabulary = {"<unk>": 0} | {f"<0x{byte:02X}>": 1 + byte for byte in range(256)}
    for piece in ("▁", "a", "b", "▁a", "▁ab", "é", "▁▁"):
        vocabulary[piece] = len(vocabulary)
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(tokenizer)


TOKENIZERS = {"byte level": TOKENIZER, "byte fallback": byte_fallback_tokenizer()}


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 180), smoothness=st.sampled_from([0.0, 0.3, 0.8, 1.0]))
@settings(deadline=None, max_examples=80)
def test_after_ids_that_are_skipped_a_decoder_goes_on_as_if_it_had_been_fed_them(
    kind: str, seed: int, count: int, smoothness: float
) -> None:
    """smoothness: the share of ids that are no bytes. Without any nothing tells where the decoder stands."""
    tokenizer, rng = TOKENIZERS[kind], random.Random(seed)

    def some(count: int) -> list[int]:
        words = range(257, tokenizer.vocabulary_size)
        return [rng.choice(words) if rng.random() < smoothness else rng.randrange(257) for _ in range(count)]

    ids, later = some(count), some(40)
    singly, skipping = tokenizer.decoder(), tokenizer.decoder()
    for token_id in ids:
        singly.feed(token_id)
    skipping.skip(ids)
    assert [skipping.feed(token_id) for token_id in later] == [singly.feed(token_id) for token_id in later]


def test_skipping_many_ids_decodes_the_last_ones_only(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, fed = TOKENIZER.decoder(), []
    monkeypatch.setattr(type(decoder), "feed", lambda self, token_id: fed.append(token_id) or "a")
    decoder.skip(TOKENIZER.encode("many words " * 1_000))
    assert len(fed) == SKIPPED_IDS


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
