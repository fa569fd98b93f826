"""Where a JSON object or array ends in a text that comes piece by piece. Looks at brackets and quotes alone."""

from __future__ import annotations

import re

_OUTSIDE = re.compile(r'["{}\[\]]')
_INSIDE = re.compile(r'["\\]')


class JsonScanner:
    """Fed a value from its opening bracket on."""

    __slots__ = ("_depth", "_is_escaped", "_is_in_string")

    def __init__(self) -> None:
        self._depth = 0
        self._is_in_string = False
        self._is_escaped = False

    def feed(self, text: str) -> int | None:
        """How many characters of this piece belong to the value, if it ends in it; None where it goes on."""
        at = 0
        while at < len(text):
            if self._is_escaped:
                self._is_escaped = False
                at += 1
                continue
            found = (_INSIDE if self._is_in_string else _OUTSIDE).search(text, at)
            if found is None:
                return None
            at = found.end()
            match found.group():
                case '"':
                    self._is_in_string = not self._is_in_string
                case "\\":
                    self._is_escaped = True
                case "{" | "[":
                    self._depth += 1
                case _:
                    self._depth -= 1
                    if self._depth <= 0:
                        return at
        return None
