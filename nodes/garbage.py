"""Keeps the interpreter's garbage collector short: it holds the lock that the loop and every engine need.

A full round looks at each object there is. After the imports there are a hundred thousand, and a round takes 0.1 s, in
which no token is sent: what imports and start have made is left out of all rounds from then on. A model adds little to
it, since tokenizers, sessions and arrays are no objects of Python's. What nothing refers to any more is freed at once,
as always; a round is for cycles alone.
"""

from __future__ import annotations

import gc

# New objects, less those freed, until a round over the newest: 700 is the interpreter's own, a few requests' worth.
YOUNG_OBJECTS = 5_000


def settle() -> None:
    """To be called once, when imports and start have made what stays. Takes 0.1 s."""
    gc.collect()
    gc.freeze()
    _, *older = gc.get_threshold()
    gc.set_threshold(YOUNG_OBJECTS, *older)
