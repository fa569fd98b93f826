from __future__ import annotations

import os
import sys
import threading

import pytest

from nodes.engine.priority import NICENESS, NICENESS_MAX, call_making_way

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems have no priority of threads")


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def test_what_is_called_and_what_it_starts_makes_way_and_nobody_else() -> None:
    before = niceness()
    seen: list[int] = []

    def start_another() -> int:
        thread = threading.Thread(target=lambda: seen.append(niceness()))
        thread.start()
        thread.join()
        return niceness()

    expected = min(NICENESS_MAX, before + NICENESS)
    assert call_making_way(start_another) == expected
    assert seen == [expected]
    assert niceness() == before


def test_what_it_raises_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        call_making_way(lambda: 1 // 0)
