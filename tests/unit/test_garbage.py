"""What a node has made before it serves is left out of the collector's rounds; what it makes afterwards is not."""

from __future__ import annotations

import subprocess
import sys

# In a process of its own: the collector is the whole process's.
SCRIPT = """
import gc, weakref
from nodes import garbage

class Thing:
    pass

before = Thing()
garbage.settle()
assert gc.get_freeze_count() > 1_000, gc.get_freeze_count()
assert not any(thing is before for thing in gc.get_objects())
assert gc.get_threshold()[0] == garbage.YOUNG_OBJECTS
assert gc.isenabled()

after = Thing()
after.itself = after
gone = weakref.ref(after)
del after
gc.collect()
assert gone() is None
"""


def test_what_stays_is_left_out_of_collection_and_later_cycles_are_collected() -> None:
    found = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
