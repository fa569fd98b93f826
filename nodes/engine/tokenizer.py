"""Text to token ids and back, over the `tokenizers` package. Thread-safe: the underlying tokenizer is immutable here."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer as RawTokenizer
from tokenizers.decoders import DecodeStream

# Encoding runs at about 500k tokens a second; a text longer than this is worth a worker thread.
ENCODE_INLINE_CHARS_MAX = 16 * 1024


class Tokenizer:
    """A tokenizer.json. Raises Exception of the tokenizers package's own choosing where the file is none."""

    def __init__(self, file: Path) -> None:
        self._raw = RawTokenizer.from_file(str(file))
        self.vocabulary_size = self._raw.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a rendered prompt. The template writes special tokens itself, so none are added."""
        return tuple(self._raw.encode(text, add_special_tokens=False).ids)

    def token(self, token_id: int) -> str | None:
        return self._raw.id_to_token(token_id)

    def stream(self) -> TextStream:
        return TextStream(self._raw)


class TextStream:
    """Incremental decoding of one generation; special tokens make no text, partial UTF-8 is held back."""

    def __init__(self, raw: RawTokenizer) -> None:
        self._raw = raw
        self._stream = DecodeStream(skip_special_tokens=True)

    def step(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""
        return self._stream.step(self._raw, token_id) or ""
