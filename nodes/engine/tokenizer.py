"""Text to token ids and back, over a `tokenizer.json`."""

from __future__ import annotations

import copy
from collections.abc import Sequence as SequenceOf
from pathlib import Path

import tokenizers
from tokenizers.decoders import DecodeStream

from nodes.engine.errors import PromptTooLong

# Above this, encoding takes longer than an event loop should wait (562,000 tokens/s: 8 ms); use a worker thread.
ENCODE_INLINE_BYTES_MAX = 16 * 1024
# Of texts in any language; a longer text is counted in pieces before it is encoded, because encoding takes 280 bytes of
# memory and 2.5 us an id: 4 MB of digits took 1.1 GB and 10 s, to be refused by a context of 512.
CHARS_PER_TOKEN_USUAL_MAX = 8
PIECE_CHARS = 16 * 1024
# Of a resumed answer: ids that are decoded at once, each piece twice, and the last ones that are decoded one by one.
PIECE_IDS = 128
SINGLE_IDS = 32


class TokenizerInvalid(Exception):
    """The file is missing or holds no tokenizer."""


class Tokenizer:
    """Safe to use from several threads at once."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def from_file(cls, path: Path) -> Tokenizer:
        """Raises TokenizerInvalid."""
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as exc:  # the library raises bare Exception, whatever is wrong
            raise TokenizerInvalid(str(exc).splitlines()[0][:200] if str(exc) else type(exc).__name__) from exc

    @property
    def vocabulary_size(self) -> int:
        """One more than the largest id, added tokens included."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def to_json(self) -> str:
        """The text of the tokenizer.json that makes this tokenizer."""
        return self._tokenizer.to_str()

    def token(self, token_id: int) -> str | None:
        """The token of that id as the vocabulary spells it; None when there is none."""
        return self._tokenizer.id_to_token(token_id)

    def encode(self, text: str, limit: int | None = None) -> list[int]:
        """Ids of a rendered template: special tokens are recognised in the text and none is added.

        Lone surrogates, which JSON can carry and UTF-8 cannot, become question marks. limit: ids that anybody wants;
        a text that has far more is not encoded to its end. Raises PromptTooLong then."""
        try:
            text.encode()
        except UnicodeEncodeError:
            text = text.encode("utf-8", "replace").decode()
        if limit is not None and len(text) > CHARS_PER_TOKEN_USUAL_MAX * limit:
            self._check_length(text, limit)
        return self._ids(text)

    def _check_length(self, text: str, limit: int) -> None:
        """Count ids piece by piece. Cutting a text changes its number of ids by a few at each cut, never twofold."""
        tokens = 0
        for start in range(0, len(text), PIECE_CHARS):
            tokens += len(self._ids(text[start : start + PIECE_CHARS]))
            if tokens > 2 * limit:
                raise PromptTooLong(tokens // 2, limit, is_exact=False)

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, token_ids: list[int]) -> str:
        """Text of ids, special tokens left out; incomplete characters become U+FFFD."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def decoder(self) -> StreamDecoder:
        return StreamDecoder(self._tokenizer)


class StreamDecoder:
    """Text of one answer, id by id. A character is given once it is whole; one that the last id leaves incomplete is
    never given, where decode() would end in U+FFFD."""

    __slots__ = ("_stream", "_tokenizer")

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)

    def feed_all(self, token_ids: SequenceOf[int]) -> str:
        """What feed() would give for one after the other, joined, in half of the time."""
        ids = list(token_ids)
        text = self._feed_settled(ids)
        return "".join(map(self.feed, ids)) if text is None else text

    def skip(self, token_ids: SequenceOf[int]) -> None:
        """What feed_all() does, for ids whose text nobody wants, in a time that does not grow with their number."""
        ids = list(token_ids)
        if self._feed_settled(ids[-PIECE_IDS - SINGLE_IDS :]) is None:
            self.feed_all(ids)

    def _feed_settled(self, ids: list[int]) -> str | None:
        """Feed ids in pieces and the last ones one by one. None, and nothing was fed, where that might end elsewhere
        than feed() would.

        The library's state after an id that completes text is the ids since the one before that did so. So it does not
        depend on what was fed before the last ones, or how, if two of these complete text."""
        before, settled = copy.copy(self._stream), max(0, len(ids) - SINGLE_IDS)
        try:
            texts = [self._step(ids[at : min(at + PIECE_IDS, settled)]) for at in range(0, settled, PIECE_IDS)]
            last = [self._step(token_id) for token_id in ids[settled:]]
        except Exception:  # as in feed()
            last = []
        if sum(map(bool, last)) >= 2:
            return "".join(texts + last)
        self._stream = before
        return None

    def _step(self, ids: int | list[int]) -> str:
        return self._stream.step(self._tokenizer, ids) or ""

    def feed(self, token_id: int) -> str:
        try:
            return self._step(token_id)
        except Exception:  # bare, from the library: some ids decode to another text once more ids follow
            self._stream = DecodeStream(skip_special_tokens=True)
            return self._step(token_id)
