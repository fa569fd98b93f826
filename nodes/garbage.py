"""Keeps the interpreter's garbage collector short: it holds the lock that the loop and every engine need.

A full round looks at each object there is. After the imports there are a hundred thousand, and a round takes 0.1 s, in
which no token is sent: what has been made by the start is left out of all rounds from then on. Objects that are only
referenced, as almost all are, are freed at once and never wait for a round.
"""

from __future__ import annotations

import gc

# New objects, less those freed, until a round over the newest: 700 is the interpreter's own, a few requests' worth.
YOUNG_OBJECTS = 5_000


def settle() -> None:
    """To be called once, when all that stays for the life of the process has been made. Takes 0.1 s."""
    gc.collect()
    gc.freeze()
    _, *older = gc.get_threshold()
    gc.set_threshold(YOUNG_OBJECTS, *older)
