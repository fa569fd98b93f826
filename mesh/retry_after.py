"""When refused clients of one model may come back: a virtual queue of promised times. Sees no clock.

A request that no node can take is told when it will be its turn: as many places have to become free as clients wait
already, at the rate at which this entry is given places. So each is promised a later time than the one before, and they
come back one after the other. A promise is kept: while clients whose time has come are expected, a new request gets
only a place that none of them needs. Who does not come back is waited for only shortly, and no more than a part of the
queues' places is held free for them, so that no engine idles over it.

A client is known again by its key: equal for the same request sent again. Requests with equal keys stand in for each
other, so a key that says too little lets new clients take the turns of those who wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable

RETRY_AFTER_MIN_S = 1.0
# Clients that are told a minute or more (the Vercel AI SDK; openai-python at two) do not believe it, come back within
# seconds, and give up. One that waits for this long is told the little that is left.
RETRY_AFTER_MAX_S = 59.0
PROMISES_MAX = 4096  # of one model; who comes later is promised the maximum, and not remembered
# How much before its time a client that comes back is known again; clocks and rounding differ by less.
EARLY_S = 0.25
# How long before its turn a place is held for a client. Without it new ones take what those whose turns are next are
# coming for, and one after the other finds the queue full again.
HELD_AHEAD_S = 1.0
# How long a promised place is held. HTTP tells whole seconds, rounded up, and clients add some jitter.
GRACE_S = 3.0


class Promise:
    """due: its turn. told: when the client was told to come. expires: when it is waited for no longer."""

    __slots__ = ("due", "expires", "is_over", "key", "told")

    def __init__(self, key: Hashable, due: float) -> None:
        self.key = key
        self.due = due
        self.told = due
        self.expires = due
        self.is_over = False

    def tell(self, now: float) -> float:
        retry_after_s = min(max(self.due - now, RETRY_AFTER_MIN_S), RETRY_AFTER_MAX_S)
        self.told = now + retry_after_s
        self.expires = self.told + GRACE_S
        return retry_after_s


class RetryQueue:
    """The promises made and not yet kept, in the order of their turns."""

    def __init__(self) -> None:
        self._order: deque[Promise] = deque()
        self._by_key: dict[Hashable, deque[Promise]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def admits(self, key: Hashable, places: int, held_max: int, now: float) -> bool:
        """Whether a request may have one of the free places there seem to be. held_max: places kept for others at most.

        One that comes when it was told to has kept its promise with that, and is not expected any more."""
        if not self._count:
            return True
        promise = self._returning(key, now)
        if promise is not None and promise.due <= now + EARLY_S:
            self._end(promise)
            return True
        return places > min(self._due(now + HELD_AHEAD_S, places, now), held_max)

    def refuse(self, key: Hashable, rate_per_s: float, now: float, *, is_next: bool = False) -> float:
        """Seconds until the request may come back. rate_per_s: of places. is_next: its turn had come already, but the
        place was gone."""
        promise = self._returning(key, now)
        if promise is None and is_next:
            promise = self._promise(key, now, is_first=True)
        if promise is None:
            due = now + (self._count + 1) / rate_per_s
            promise = self._promise(key, due, is_first=False)
        elif promise.due <= now + EARLY_S:
            # So many before it, the places held for them being late.
            promise.due = now + (self._due(now, PROMISES_MAX, now) + 1) / rate_per_s
        if promise is None:
            return RETRY_AFTER_MAX_S
        return promise.tell(now)

    def _promise(self, key: Hashable, due: float, *, is_first: bool) -> Promise | None:
        if self._count >= PROMISES_MAX:
            return None
        promise = Promise(key, due)
        self._by_key.setdefault(key, deque()).append(promise)
        if is_first:
            self._order.appendleft(promise)
        else:
            self._order.append(promise)
        self._count += 1
        return promise

    def _returning(self, key: Hashable, now: float) -> Promise | None:
        """The promise that a request with this key comes back for: the one told longest ago whose time has come."""
        promises = self._by_key.get(key)
        while promises:
            first = promises[0]
            if first.expires < now:
                self._end(first)
            elif first.told <= now + EARLY_S:
                promises.rotate(-1)
                return first
            else:
                return None
        return None

    def _due(self, until: float, enough: int, now: float) -> int:
        """Of those whose turn it is until then, how many are still expected; counted up to `enough`."""
        due = 0
        while self._order and self._order[0].is_over:
            self._order.popleft()
        for promise in self._order:
            if promise.due > until or due >= enough:
                break
            if promise.is_over:
                continue
            if promise.expires < now:
                self._end(promise)
            else:
                due += 1
        return due

    def _end(self, promise: Promise) -> None:
        if promise.is_over:
            return
        promise.is_over = True
        self._count -= 1
        promises = self._by_key[promise.key]
        promises.remove(promise)
        if not promises:
            del self._by_key[promise.key]
