"""Text to token ids and back, over a `tokenizer.json`."""

from __future__ import annotations

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
# Of an answer that is resumed: ids at its end that tell where the decoder stands, and how many in a row it takes.
SKIPPED_IDS = 128
SETTLED_IDS = 3


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

    def keep_lengths(self) -> None:
        """From now on a text has all of its ids and no others, whatever tokenizer.json says of cutting and padding."""
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

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

    def encode(self, text: str, limit: int | None = None, *, adds_special_tokens: bool = False) -> list[int]:
        """Ids of a text: special tokens are recognised in it, and none is added, since templates write their own.
        adds_special_tokens: those that the tokenizer puts around a plain text, as that of its beginning.

        Lone surrogates, which JSON can carry and UTF-8 cannot, become question marks. limit: ids that anybody wants;
        a text that has far more is not encoded to its end. Raises PromptTooLong then."""
        try:
            text.encode()
        except UnicodeEncodeError:
            text = text.encode("utf-8", "replace").decode()
        if limit is not None and len(text) > CHARS_PER_TOKEN_USUAL_MAX * limit:
            self._check_length(text, limit)
        return self._ids(text, adds_special_tokens)

    def _check_length(self, text: str, limit: int) -> None:
        """Count ids piece by piece. Cutting a text changes its number of ids by a few at each cut, never twofold."""
        tokens = 0
        for start in range(0, len(text), PIECE_CHARS):
            tokens += len(self._ids(text[start : start + PIECE_CHARS]))
            if tokens > 2 * limit:
                raise PromptTooLong(tokens // 2, limit, is_exact=False)

    def _ids(self, text: str, adds_special_tokens: bool = False) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=adds_special_tokens).ids

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

    def skip(self, token_ids: SequenceOf[int]) -> None:
        """Be where feed() would come with these, of which nobody wants the text; in a time that does not grow with
        their number, as a rule.

        The library's state after an id that completes text is the ids since the one before that did so. After a few in
        a row that each complete text, however it stood before them, it is the last of them. Bytes as tokens do not
        count: they are characters or not according to those before them."""
        ids = list(token_ids)
        if len(ids) > SKIPPED_IDS:
            before, settled = self._stream, 0
            self._stream = DecodeStream(skip_special_tokens=True)
            for token_id in ids[-SKIPPED_IDS:]:
                text = self.feed(token_id)
                if settled < SETTLED_IDS:
                    is_clean = text and "\N{REPLACEMENT CHARACTER}" not in text
                    settled = settled + 1 if is_clean and not self._is_byte(token_id) else 0
            if settled == SETTLED_IDS:
                return
            self._stream = before
        for token_id in ids:
            self.feed(token_id)

    def _is_byte(self, token_id: int) -> bool:
        token = self._tokenizer.id_to_token(token_id)
        return token is None or token.startswith("<0x")

    def feed(self, token_id: int) -> str:
        try:
            return self._stream.step(self._tokenizer, token_id) or ""
        except Exception:  # bare, from the library: some ids decode to another text once more ids follow
            self._stream = DecodeStream(skip_special_tokens=True)
            return self._stream.step(self._tokenizer, token_id) or ""
