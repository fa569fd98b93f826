"""Who may call /v1, and how much: a request passes the gate before anything is done for it, and is counted by it.

A mesh in which no key was ever created is open on loopback, and takes whatever key a client sends there. From the first
key on every node demands one that works; off loopback also before, unless the node was started open.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address

import trio

from mesh.counters_wire import Totals
from mesh.own_counters import OwnCounters
from nodes.access.api_key import ApiKey
from nodes.access.key_book import KeyBook
from nodes.access.limits import Kind, Limiter, Limits, Refusal, Remaining
from nodes.access.usage import UsageLog
from nodes.generation import PRIORITY_DEFAULT

# The label under which requests count that need no key.
ANONYMOUS = "anonymous"
# A request that finds room but has to wait for the others to hear of its forerunners waits so long at most.
SHARE_WAIT_S = 1.0
SHARE_POLL_S = 0.05
# Wrong keys from one address within the window, after which further ones are told to wait. Keys that work always do:
# whoever shares an address with a guesser is not shut out, and nobody guesses 256 bits.
FAILURES_MAX = 120
FAILURE_WINDOW_S = 60.0
ADDRESSES_MAX = 4_096
IPV6_PREFIX_BITS = 64  # what one customer has
# How fast the estimate of a prompt's tokens follows what models count. Each key has its own for each model, since one
# key's prompts say nothing of another's; those unused for longest are forgotten first.
ESTIMATE_WEIGHT = 0.1
ESTIMATES_MAX = 4_096
# Tokens that a running answer has used are told on after so many.
SETTLE_TOKENS = 64
# Where a client gets a key, for error messages.
KEY_SOURCE = "operators make keys with: ai-cluster keys create --name NAME"
# In an error message.
MODELS_NAMED_MAX = 4
NAME_CHARS_SHOWN = 100


class Unauthorized(Exception):
    """The client showed no API key that this node takes."""


class Forbidden(Exception):
    """The key works, but not for this."""


class LimitReached(Exception):
    """A limit per key. kind: which; retry_after_s: None where waiting does not help."""

    def __init__(self, message: str, kind: str, retry_after_s: float | None, remaining: dict[Kind, Remaining]) -> None:
        super().__init__(message)
        self.kind = kind
        self.retry_after_s = retry_after_s
        self.remaining = remaining


@dataclass(frozen=True, slots=True)
class Caller:
    """key: None where none is needed."""

    key: ApiKey | None = None

    @property
    def label(self) -> str:
        return ANONYMOUS if self.key is None else self.key.label

    @property
    def fairness_id(self) -> str:
        return "" if self.key is None else self.key.family

    def may_use(self, model: str) -> bool:
        return self.key is None or not self.key.settings.models or model in self.key.settings.models

    @property
    def priority(self) -> int:
        return PRIORITY_DEFAULT if self.key is None else self.key.settings.priority


class Gate:
    """is_open: no key is needed where none was ever created. wait_known: until this node knows its mesh's keys as well
    as some peer does. usage_changed: GossipSocket.usage_changed. now: the counters' clock; wall_clock: seconds since
    1970."""

    def __init__(
        self,
        book: KeyBook,
        limiter: Limiter,
        own: OwnCounters,
        usage: UsageLog,
        *,
        is_open: bool,
        wait_known: Callable[[], Awaitable[None]],
        usage_changed: Callable[[], None],
        wall_clock: Callable[[], float],
        now: Callable[[], float] = trio.current_time,
    ) -> None:
        self._book = book
        self._limiter = limiter
        self._own = own
        self._usage = usage
        self._is_open = is_open
        self._wait_known = wait_known
        self._usage_changed = usage_changed
        self._wall_clock = wall_clock
        self._now = now
        self._failures = FailureLimiter()
        # By key family and model: tokens that were counted for one that was guessed; the longest unused first.
        self._estimates: OrderedDict[tuple[str, str], float] = OrderedDict()

    async def authenticate(self, authorization: str, address: str) -> Caller:
        """authorization: the header, "" for none; address: the client's IP. Raises Unauthorized, and LimitReached for
        an address that shows wrong key after wrong key."""
        if not self._book.was_ever_used and self._is_open:
            await self._wait_known()
        if not self._book.was_ever_used:
            if self._is_open:
                return Caller()
            raise Unauthorized(
                "this node's HTTP address is off loopback, so it takes requests with an API key only, and none was "
                f"created yet; {KEY_SOURCE}"
            )
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise Unauthorized(f"no API key: send the header Authorization: Bearer sk-…; {KEY_SOURCE}")
        key = self._book.of_token(token.strip())
        if key is None:
            retry_after_s = self._failures.failed(address, self._now())
            if retry_after_s is not None:
                raise LimitReached("too many wrong API keys from this address", "address", retry_after_s, {})
            raise Unauthorized(f"this API key is not one of this cluster, or was revoked; {KEY_SOURCE}")
        if not key.settings.is_enabled:
            raise Unauthorized("this API key is disabled; operators change that: ai-cluster keys change KEY --enable")
        if key.has_expired(self._wall_clock()):
            raise Unauthorized("this API key has expired; operators change that: ai-cluster keys change KEY --expires")
        return Caller(key)

    @staticmethod
    def check_model(caller: Caller, model: str, is_served: Callable[[str], bool]) -> None:
        """is_served: whether some node has the model of that name. Raises Forbidden."""
        if caller.key is None or caller.may_use(model):
            return
        allowed = caller.key.settings.models
        what = "GET /v1/models lists what it may use"
        if not any(map(is_served, allowed)):
            named = ", ".join(repr(name[:NAME_CHARS_SHOWN]) for name in allowed[:MODELS_NAMED_MAX])
            more = ", …" if len(allowed) > MODELS_NAMED_MAX else ""
            fix = "operators change that with: ai-cluster keys change KEY --models"
            what = f"no node serves what it may use, {named}{more}; {fix}"
        raise Forbidden(f"this API key may not use the model {model[:NAME_CHARS_SHOWN]!r}; {what}")

    async def admit(
        self,
        caller: Caller,
        model: str,
        prompt_tokens: int,
        answer_tokens: int,
        *,
        prompt_tokens_max: int | None = None,
    ) -> Admission:
        """Let a request in that may use so many tokens, and count it. prompt_tokens: a guess, which is corrected by
        what the key's prompts were to that model before; prompt_tokens_max: more than the model can take are not
        reserved. model: one that the mesh has. The caller closes what is returned, whatever happens. Raises
        LimitReached."""
        key, guessed_tokens = caller.key, prompt_tokens
        # A prompt that turns out longer than was reserved is an overshoot while it runs, and many may run.
        if key is not None:
            prompt_tokens = math.ceil(prompt_tokens * self._estimates.get((key.family, model), 1.0))
        if prompt_tokens_max is not None:
            prompt_tokens = min(prompt_tokens, prompt_tokens_max)
        tokens = prompt_tokens + answer_tokens
        if key is None:
            return Admission(self, caller, model, prompt_tokens, 0)
        settings = key.settings
        limits = Limits(settings.requests_per_minute, settings.tokens_per_minute, settings.concurrency)
        give_up_at = self._now() + SHARE_WAIT_S
        while (refusal := self._limiter.check(key.family, limits, tokens, self._now())) is not None:
            if not refusal.is_brief or self._now() >= give_up_at:
                raise self._limit_reached(key, limits, refusal, tokens)
            await trio.sleep(SHARE_POLL_S)
        self._own.begin(key.family, tokens, self._now())
        self._usage_changed()
        return Admission(self, caller, model, prompt_tokens, tokens, limits, guessed_tokens)

    def remaining(self, key: ApiKey, limits: Limits) -> dict[Kind, Remaining]:
        return self._limiter.remaining(key.family, limits, self._now())

    def key_labels(self) -> list[str]:
        """What metrics call the keys that work; rotated ones share their family's label."""
        return list(dict.fromkeys(key.label for key in self._book.keys))

    def forget_revoked(self) -> None:
        """The counters of families whose last key is revoked. Of a key that cannot be read the family is not known, and
        it may be read again one day: then all are kept."""
        families = {key.family for key in self._book.keys}
        revoked = [family for family, _ in self._own.totals() if family not in families]
        if revoked and not self._book.has_unreadable:
            for family in revoked:
                self._own.forget(family)

    async def limit_uses(self, keys_max: int) -> dict[str, dict[Kind, tuple[int, int]]]:
        """label → kind → (limit, how much of it is used over all nodes), of the oldest keys_max that have a limit. Of
        each key as of its own instant: in a large mesh one takes a tenth of a millisecond, so others run in between."""
        found: dict[str, dict[Kind, tuple[int, int]]] = {}
        for key in self._book.keys:
            settings = key.settings
            limits = Limits(settings.requests_per_minute, settings.tokens_per_minute, settings.concurrency)
            if limits == Limits():
                continue
            if key.label not in found and len(found) >= keys_max:
                break
            found[key.label] = self._limiter.uses(key.family, limits, self._now())  # of a family the newest key's
            await trio.lowlevel.checkpoint()
        return found

    def _limit_reached(self, key: ApiKey, limits: Limits, refusal: Refusal, tokens: int) -> LimitReached:
        what = {"requests": "requests per minute", "tokens": "tokens per minute", "concurrency": "requests at once"}
        message = f"the limit of this API key is {refusal.limit} {what[refusal.kind]}, over all nodes together"
        if refusal.retry_after_s is None:
            message += f"; this request alone may use {tokens}: ask for fewer with max_completion_tokens"
        return LimitReached(message, refusal.kind, refusal.retry_after_s, self.remaining(key, limits))

    # For Admission.

    def learn(self, caller: Caller, model: str, guessed_tokens: int, prompt_tokens: int) -> None:
        """A prompt of that caller's to that model had so many tokens."""
        if caller.key is None or guessed_tokens <= 0:
            return
        factor = prompt_tokens / guessed_tokens
        former = self._estimates.pop((caller.key.family, model), factor)
        self._estimates[caller.key.family, model] = former + ESTIMATE_WEIGHT * (factor - former)
        if len(self._estimates) > ESTIMATES_MAX:
            self._estimates.popitem(last=False)

    def count(self, caller: Caller, model: str, rise: Totals, released_tokens: int) -> None:
        if caller.key is not None:
            self._usage.count(caller.key.family, model, rise)
            self._own.count(
                caller.key.family,
                rise.prompt_tokens,
                rise.completion_tokens,
                self._now(),
                released_tokens=released_tokens,
            )

    def end(self, caller: Caller, model: str, reserved_tokens: int) -> None:
        if caller.key is not None:
            self._own.end(caller.key.family, reserved_tokens)
            self._usage.count(caller.key.family, model, Totals(requests=1))
            self._usage_changed()


class Admission(trio.abc.AsyncResource):
    """One request that was let in. What it uses is counted as it goes, out of what was reserved for it; what is left of
    that is given back at its end."""

    def __init__(
        self,
        gate: Gate,
        caller: Caller,
        model: str,
        prompt_tokens: int,
        reserved_tokens: int,
        limits: Limits | None = None,
        guessed_tokens: int = 0,
    ) -> None:
        """prompt_tokens: as estimated, which counts where nobody says better; guessed_tokens: before correction."""
        self._gate = gate
        self._caller = caller
        self._model = model
        self._prompt_tokens = prompt_tokens
        self._reserved_tokens = reserved_tokens
        self._limits = limits
        self._guessed_tokens = guessed_tokens
        self._counted = Totals()
        self._used = Totals()
        self._is_open = True
        self._is_finished = False

    def remaining(self) -> dict[Kind, Remaining]:
        """Of the key's limits per minute; empty where it has none."""
        if self._caller.key is None or self._limits is None:
            return {}
        return self._gate.remaining(self._caller.key, self._limits)

    def generated(self, tokens: int) -> None:
        """So many more tokens of answers came."""
        self._used = self._used.plus(Totals(0, 0, tokens))
        if self._used.completion_tokens - self._counted.completion_tokens >= SETTLE_TOKENS:
            self._settle()

    def finished(self, prompt_tokens: int, completion_tokens: int) -> None:
        """What it used in all, as the model counted it."""
        self._used = self._counted.maximum(Totals(0, prompt_tokens, completion_tokens))
        self._gate.learn(self._caller, self._model, self._guessed_tokens, prompt_tokens)
        self._is_finished = True

    async def aclose(self) -> None:
        """Any number of times."""
        if self._is_open:
            self._is_open = False
            if not self._is_finished and self._used.completion_tokens:
                self._used = self._used.plus(Totals(0, self._prompt_tokens, 0))
            self._settle()
            self._gate.end(self._caller, self._model, self._reserved_tokens)
        await trio.lowlevel.checkpoint()

    def _settle(self) -> None:
        rise = Totals(
            0,
            self._used.prompt_tokens - self._counted.prompt_tokens,
            self._used.completion_tokens - self._counted.completion_tokens,
        )
        if rise.tokens:
            self._counted = self._used
            # The prompt was read, but is counted at the end: till then its part stays reserved.
            uncounted_tokens = 0 if self._used.prompt_tokens else self._prompt_tokens
            released_tokens = max(0, min(rise.tokens, self._reserved_tokens - uncounted_tokens))
            self._reserved_tokens -= released_tokens
            self._gate.count(self._caller, self._model, rise, released_tokens)


class FailureLimiter:
    """Counts wrong keys by address; the longest quiet addresses are forgotten first."""

    def __init__(self) -> None:
        self._failures: OrderedDict[str, tuple[float, int]] = OrderedDict()  # since when, how many

    def failed(self, address: str, now: float) -> float | None:
        """Seconds to wait, where it were too many."""
        network = _network_of(address)
        since, count = self._failures.pop(network, (now, 0))
        if now - since >= FAILURE_WINDOW_S:
            since, count = now, 0
        count += 1
        self._failures[network] = (since, count)
        if len(self._failures) > ADDRESSES_MAX:
            self._failures.popitem(last=False)
        return since + FAILURE_WINDOW_S - now if count >= FAILURES_MAX else None


def _network_of(address: str) -> str:
    try:
        ip = ip_address(address)
    except ValueError:
        return ""
    if isinstance(ip, IPv6Address):
        if ip.ipv4_mapped is not None:  # what a socket of both families calls a client of IPv4
            return str(ip.ipv4_mapped)
        return str(int(ip) >> (128 - IPV6_PREFIX_BITS))
    return address
