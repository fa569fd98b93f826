"""Who is let in, and what is counted for whom."""

from __future__ import annotations

import pytest
import trio

from mesh.counters_wire import Totals
from mesh.own_counters import TRANSIT_S
from nodes.access import gate as gate_module
from nodes.access.gate import (
    ADDRESSES_MAX,
    ANONYMOUS,
    FAILURE_WINDOW_S,
    FAILURES_MAX,
    FailureLimiter,
    Forbidden,
    LimitReached,
    Unauthorized,
)
from nodes.access.limits import Shares
from tests.unit.fake_access import FakeAccess

HERE = "192.0.2.7"


def bearer(token: str) -> str:
    return f"Bearer {token}"


async def test_a_mesh_that_never_had_a_key_is_open_on_loopback_and_takes_any() -> None:
    access = FakeAccess()
    for header in ("", "Bearer anything", "Basic x"):
        assert (await access.gate.authenticate(header, HERE)).label == ANONYMOUS


async def test_off_loopback_nobody_is_let_in_without_a_key() -> None:
    access = FakeAccess(is_open=False)
    with pytest.raises(Unauthorized, match="keys create"):
        await access.gate.authenticate("", HERE)
    token = access.create()
    assert (await access.gate.authenticate(bearer(token), HERE)).key is not None


async def test_a_node_that_does_not_know_its_meshs_keys_yet_lets_its_clients_wait(
    autojump_clock: trio.testing.MockClock,
) -> None:
    access = FakeAccess()
    access.known = trio.Event()
    tokens: list[str] = []

    async def learn() -> None:
        await trio.sleep(3.0)
        tokens.append(access.create())
        access.known.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(learn)
        with pytest.raises(Unauthorized):
            await access.gate.authenticate("", HERE)
    assert trio.current_time() >= 3.0
    access.known = trio.Event()  # nobody waits who shows a key
    assert (await access.gate.authenticate(bearer(tokens[0]), HERE)).key is not None


async def test_from_the_first_key_on_one_is_demanded_also_when_all_are_revoked() -> None:
    access = FakeAccess()
    token = access.create()
    caller = await access.gate.authenticate(f"bearer  {token} ", HERE)
    assert caller.key is not None
    assert caller.label == f"sk-{caller.key.public_id}"
    await access.admin.revoke("alice")
    for header in ("", "Bearer", bearer(token), bearer(token + "x"), "Basic abc", bearer("sk-unknown-secret")):
        with pytest.raises(Unauthorized, match="operators make keys with: ai-cluster keys create --name NAME"):
            await access.gate.authenticate(header, HERE)


async def test_a_disabled_or_expired_key_is_told_apart_from_an_unknown_one() -> None:
    access = FakeAccess()
    token = access.create(expires_at=int(access.wall_time) + 10)
    await access.admin.change("alice", {"is_enabled": False})
    with pytest.raises(Unauthorized, match=r"disabled; .* ai-cluster keys change KEY --enable"):
        await access.gate.authenticate(bearer(token), HERE)
    await access.admin.change("alice", {"is_enabled": True})
    assert (await access.gate.authenticate(bearer(token), HERE)).key is not None
    access.wall_time += 10
    with pytest.raises(Unauthorized, match=r"expired; .* ai-cluster keys change KEY --expires"):
        await access.gate.authenticate(bearer(token), HERE)


async def test_models_that_a_key_may_not_use_are_forbidden() -> None:
    access = FakeAccess()
    caller = await access.gate.authenticate(bearer(access.create(models=("m", "n"))), HERE)
    access.gate.check_model(caller, "m", lambda name: False)
    with pytest.raises(Forbidden, match="'other'; GET /v1/models lists what it may use"):
        access.gate.check_model(caller, "other", lambda name: name == "n")
    with pytest.raises(Forbidden, match=r"no node serves what it may use, 'm', 'n'; .* keys change KEY --models"):
        access.gate.check_model(caller, "other", lambda name: name == "other")


async def test_guessing_is_slowed_and_who_shares_the_address_is_not_shut_out(
    autojump_clock: trio.testing.MockClock,
) -> None:
    access = FakeAccess()
    token = access.create()
    for _ in range(FAILURES_MAX - 1):
        with pytest.raises(Unauthorized):
            await access.gate.authenticate(bearer("sk-a-b"), HERE)
    with pytest.raises(LimitReached) as refusal:
        await access.gate.authenticate(bearer("sk-a-b"), HERE)
    assert refusal.value.retry_after_s == pytest.approx(FAILURE_WINDOW_S)
    assert (await access.gate.authenticate(bearer(token), HERE)).key is not None
    with pytest.raises(Unauthorized):
        await access.gate.authenticate(bearer("sk-a-b"), "192.0.2.8")
    await trio.sleep(FAILURE_WINDOW_S)
    with pytest.raises(Unauthorized):
        await access.gate.authenticate(bearer("sk-a-b"), HERE)


def test_addresses_are_remembered_up_to_a_bound_and_ipv6_by_network() -> None:
    failures = FailureLimiter()
    for i in range(2 * ADDRESSES_MAX):
        failures.failed(f"10.{i >> 16}.{i >> 8 & 255}.{i & 255}", 0.0)
    assert len(failures._failures) == ADDRESSES_MAX
    waits = [failures.failed(f"2001:db8::{i:x}", 0.0) for i in range(1, FAILURES_MAX + 1)]
    assert waits[-2:] == [None, FAILURE_WINDOW_S]


def test_addresses_of_ipv4_are_told_apart_also_as_ipv6_maps_them() -> None:
    failures = FailureLimiter()
    for _ in range(FAILURES_MAX - 1):
        assert failures.failed("::ffff:192.0.2.1", 0.0) is None
    assert failures.failed("::ffff:192.0.2.2", 0.0) is None
    assert failures.failed("192.0.2.1", 0.0) == FAILURE_WINDOW_S


async def test_what_a_request_uses_is_counted_as_it_goes_and_at_its_end(
    autojump_clock: trio.testing.MockClock,
) -> None:
    access = FakeAccess()
    token = access.create(tokens_per_minute=1_000)
    caller = await access.gate.authenticate(bearer(token), HERE)
    assert caller.key is not None
    family = caller.key.family
    admission = await access.gate.admit(caller, "m", 50, 250)
    used = access.own.used(family, trio.current_time())
    assert (used.requests, used.tokens, used.running, used.reserved_tokens) == (1, 0, 1, 300)
    assert admission.remaining()["tokens"].remaining == 700
    for _ in range(gate_module.SETTLE_TOKENS):
        admission.generated(1)
    used = access.own.used(family, trio.current_time())
    assert (used.tokens, used.reserved_tokens) == (gate_module.SETTLE_TOKENS, 300 - gate_module.SETTLE_TOKENS)
    assert admission.remaining()["tokens"].remaining == 700
    admission.generated(6)
    admission.finished(40, 70)
    await admission.aclose()
    await admission.aclose()
    used = access.own.used(family, trio.current_time())
    assert (used.tokens, used.running, used.reserved_tokens) == (110, 0, 0)
    assert await access.used() == {(family, "m"): Totals(1, 40, 70)}
    assert access.changes == 2


async def test_an_answer_longer_than_was_reserved_leaves_the_prompt_reserved() -> None:
    access = FakeAccess()
    caller = await access.gate.authenticate(bearer(access.create(tokens_per_minute=1_000)), HERE)
    admission = await access.gate.admit(caller, "m", 50, 100)
    for tokens in (64, 64, 64):
        admission.generated(tokens)
    assert admission.remaining()["tokens"].remaining == 1_000 - 192 - 50
    admission.finished(40, 200)
    await admission.aclose()
    assert admission.remaining()["tokens"].remaining == 1_000 - 240


async def test_a_request_that_its_client_left_costs_its_prompt_and_what_was_generated() -> None:
    access = FakeAccess()
    caller = await access.gate.authenticate(bearer(access.create()), HERE)
    left = await access.gate.admit(caller, "m", 50, 100)
    left.generated(3)
    await left.aclose()
    refused = await access.gate.admit(caller, "m", 50, 100)
    await refused.aclose()
    assert list((await access.used()).values()) == [Totals(2, 50, 3)]


async def test_a_request_waits_for_its_forerunners_to_be_heard_of_but_not_for_long(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    access = FakeAccess()
    access.gate._limiter._shares = lambda now: Shares(4)
    caller = await access.gate.authenticate(bearer(access.create(requests_per_minute=4)), HERE)
    await access.gate.admit(caller, "m", 1, 1)
    with pytest.raises(LimitReached) as refusal:
        await access.gate.admit(caller, "m", 1, 1)
    assert refusal.value.retry_after_s == 0.5
    assert trio.current_time() == pytest.approx(gate_module.SHARE_WAIT_S, abs=0.1)
    started = trio.current_time()
    assert access.own.section(started)
    await access.gate.admit(caller, "m", 1, 1)
    assert trio.current_time() - started == pytest.approx(TRANSIT_S, abs=0.1)


async def test_a_refusal_says_which_limit_and_what_is_left() -> None:
    access = FakeAccess()
    caller = await access.gate.authenticate(bearer(access.create(tokens_per_minute=100, requests_per_minute=9)), HERE)
    with pytest.raises(LimitReached, match=r"100 tokens per minute.*may use 150") as refusal:
        await access.gate.admit(caller, "m", 50, 100)
    assert (refusal.value.kind, refusal.value.retry_after_s) == ("tokens", None)
    assert refusal.value.remaining["requests"].remaining == 9


async def test_uses_are_of_keys_with_limits_and_a_bounded_number_of_them() -> None:
    access = FakeAccess()
    limited = [access.create(f"limited-{i}", requests_per_minute=10 + i) for i in range(3)]
    access.create("free")
    labels = ["-".join(token.split("-")[:2]) for token in limited]
    uses = await access.gate.limit_uses(keys_max=10)
    assert sorted(uses) == sorted(labels)
    assert sorted(row["requests"] for row in uses.values()) == [(10, 0), (11, 0), (12, 0)]
    assert len(await access.gate.limit_uses(keys_max=2)) == 2
    assert set(labels) < set(access.gate.key_labels())


async def test_what_is_reserved_for_a_prompt_follows_what_the_model_counts() -> None:
    access = FakeAccess()
    caller = await access.gate.authenticate(bearer(access.create(tokens_per_minute=10_000)), HERE)
    assert caller.key is not None
    reserved = []
    for _ in range(2):
        admission = await access.gate.admit(caller, "m", 10, 1)
        reserved.append(access.own.used(caller.key.family, trio.current_time()).reserved_tokens)
        admission.finished(30, 1)
        await admission.aclose()
    other = await access.gate.admit(caller, "n", 10, 1)
    reserved.append(access.own.used(caller.key.family, trio.current_time()).reserved_tokens)
    await other.aclose()
    assert reserved == [11, 31, 11]


async def reserved_for(access: FakeAccess, token: str, model: str, counted: int, **bounds: int) -> int:
    """Of a request whose prompt is guessed to have 10 tokens and turns out to have `counted`."""
    caller = await access.gate.authenticate(bearer(token), HERE)
    assert caller.key is not None
    admission = await access.gate.admit(caller, model, 10, 1, **bounds)
    tokens = access.own.used(caller.key.family, trio.current_time()).reserved_tokens
    admission.finished(counted, 1)
    await admission.aclose()
    return tokens


async def test_what_one_key_asks_says_nothing_of_anothers_prompts() -> None:
    access = FakeAccess()
    alice, bob = access.create("alice"), access.create("bob")
    assert await reserved_for(access, alice, "m", 1_000) == 11
    assert await reserved_for(access, bob, "m", 10) == 11
    assert await reserved_for(access, alice, "m", 1_000) == 1_001


async def test_no_more_is_reserved_for_a_prompt_than_the_model_can_take() -> None:
    access = FakeAccess()
    token = access.create()
    await reserved_for(access, token, "m", 1_000)
    assert await reserved_for(access, token, "m", 1_000, prompt_tokens_max=512) == 513


async def test_the_estimates_unused_for_longest_are_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_module, "ESTIMATES_MAX", 2)
    access = FakeAccess()
    token = access.create()
    for model in ("a", "b", "a", "c"):
        await reserved_for(access, token, model, 20)
    assert [await reserved_for(access, token, model, 20) for model in ("a", "c", "b")] == [21, 21, 11]
