"""/admin/keys and /admin/usage over HTTP, and /v1 with keys and limits."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import pairwise
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import trio

from mesh.errors import NoCapacity
from nodes.access.api_key import ApiKey
from nodes.api.answer_schema import EditedKey, KeyList, KeyObject, UsageAnswer
from nodes.api.errors import ApiError
from nodes.api.keys import KEYS_PER_CHECKPOINT
from tests.unit.scripted_api import ANSWER, BODY, Api, ScriptedDispatch

ADMIN = {"authorization": "Bearer the admin token"}


async def admin(api: Api, method: str, path: str, **body: Any) -> httpx.Response:
    return await api.client.request(method, f"/admin/{path}", json=body, headers=ADMIN)


async def chat(api: Api, token: str, **fields: Any) -> httpx.Response:
    return await api.client.post(
        "/v1/chat/completions", json=BODY | fields, headers={"authorization": f"Bearer {token}"}
    )


async def test_a_key_lives_from_its_creation_to_its_revocation() -> None:
    api = Api(ScriptedDispatch(*ANSWER))
    async with api.client:
        made = EditedKey.model_validate_json((await admin(api, "POST", "keys", name="alice")).content)
        assert made.token is not None
        assert (await api.chat()).status_code == 401
        assert (await chat(api, made.token)).status_code == 200
        shown = KeyObject.model_validate_json((await admin(api, "GET", "keys/alice")).content)
        assert shown == made.key
        changed = await admin(api, "PATCH", f"keys/sk-{made.key.id}", models=["other"], requests_per_minute=5)
        assert changed.json()["key"]["models"] == ["other"]
        refused = await chat(api, made.token)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "model_not_allowed")
        assert (await admin(api, "PATCH", "keys/alice", models=[], requests_per_minute=None)).status_code == 200
        rotated = EditedKey.model_validate_json((await admin(api, "POST", "keys/alice/rotate")).content)
        assert rotated.token is not None
        assert [(await chat(api, token)).status_code for token in (made.token, rotated.token)] == [401, 200]
        assert (await admin(api, "DELETE", "keys/alice")).status_code == 200
        assert (await chat(api, rotated.token)).status_code == 401
        left = KeyList.model_validate_json((await admin(api, "GET", "keys")).content)
        assert (left.keys, left.revoked) == ([], 2)
        assert (await admin(api, "GET", "keys/alice")).status_code == 404


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "name"),
        ({"name": ""}, "name"),
        ({"name": "n", "requests_per_minute": 0}, "requests_per_minute"),
        ({"name": "n", "requests_per_minute": "5"}, "requests_per_minute"),
        ({"name": "n", "expires_at": "tomorrow"}, "expires_at"),
        ({"name": "n", "priority": 0}, "priority"),
        ({"name": "n", "colour": "red"}, "colour"),
        ({"name": "n", "models": [""]}, "models"),
        ({"name": "n", "enabled": 1}, "enabled"),
    ],
)
async def test_what_no_key_can_be_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    api = Api(ScriptedDispatch())
    async with api.client:
        answer = await admin(api, "POST", "keys", **body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
        assert not api.access.book.was_ever_used


@pytest.mark.parametrize("name", ["a/b c", "/a", "a/", "a//b", "/", "rotate", "a?b#c", "50 %2F"])
async def test_a_key_is_reached_by_whatever_name_it_was_given(name: str) -> None:
    api = Api(ScriptedDispatch())
    path = f"keys/{quote(name, safe='')}"
    async with api.client:
        public_id = (await admin(api, "POST", "keys", name=name)).json()["key"]["id"]
        assert (await admin(api, "GET", path)).json()["id"] == public_id
        changed = await admin(api, "PATCH", path, priority=7)
        assert (changed.json()["key"]["id"], changed.json()["key"]["priority"]) == (public_id, 7)
        rotated = (await admin(api, "POST", f"{path}/rotate")).json()["key"]
        assert (rotated["family"], rotated["name"]) == (public_id, name)
        assert (await admin(api, "DELETE", path)).json()["key"]["id"] == rotated["id"]


async def test_the_word_of_a_route_is_no_part_of_a_name() -> None:
    api = Api(ScriptedDispatch())
    async with api.client:
        public_id = (await admin(api, "POST", "keys", name="x/rotate")).json()["key"]["id"]
        for method in ("GET", "PATCH", "DELETE", "OPTIONS"):
            refused = await admin(api, method, "keys/x/rotate")
            assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
        assert (await admin(api, "GET", f"keys/{public_id}")).json()["name"] == "x/rotate"


async def test_keys_are_for_who_shows_the_admin_token() -> None:
    api = Api(ScriptedDispatch())
    async with api.client:
        for method, path in (("GET", "keys"), ("POST", "keys"), ("GET", "usage"), ("DELETE", "keys/x")):
            assert (await api.client.request(method, f"/admin/{path}", json={"name": "n"})).status_code == 401


@pytest.mark.parametrize(("seconds", "told"), [(0.2, ("1", "200")), (58.1, ("59", "58100")), (60.9, ("59", "59000"))])
def test_no_client_is_told_to_wait_so_long_that_it_does_not_believe_it(seconds: float, told: tuple[str, str]) -> None:
    headers = ApiError(429, "", retry_after_s=seconds).headers()
    assert (headers["retry-after"], headers["retry-after-ms"]) == told


async def test_a_limit_is_429_with_the_words_and_headers_of_openai() -> None:
    api = Api(ScriptedDispatch(*ANSWER))
    token = api.access.create(requests_per_minute=2, tokens_per_minute=10_000)
    async with api.client:
        first = await chat(api, token)
        assert first.headers["x-ratelimit-limit-requests"] == "2"
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        assert first.headers["x-ratelimit-remaining-tokens"] == "9743"  # 257 are reserved until it is over
        await chat(api, token)
        refused = await chat(api, token)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert refused.json()["error"]["type"] == "requests"
        assert 0 < int(refused.headers["retry-after"]) <= 59
        assert int(refused.headers["retry-after-ms"]) <= 59_000
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        assert refused.headers["x-ratelimit-reset-requests"] == "1m0s"
    label = api.access.book.keys[0].label
    assert api.metrics.limited == [label]
    assert [status for _, status in api.metrics.keys] == ["success", "success", "rejected"]


async def test_a_key_has_its_share_of_the_engine_under_its_familys_name() -> None:
    api = Api(ScriptedDispatch(*ANSWER))
    token = api.access.create(priority=30)
    async with api.client:
        await chat(api, token)
    (request,) = api.dispatch.requests
    assert (request.fairness_id, request.priority) == (api.access.book.keys[0].family, 30)


async def test_usage_is_what_the_model_counted() -> None:
    api = Api(ScriptedDispatch(*ANSWER))
    token = api.access.create()
    api.access.wall_time = datetime.now(UTC).timestamp()
    async with api.client:
        for stream in (False, True):
            await chat(api, token, stream=stream)
        await api.access.usage.flush()
        answer = UsageAnswer.model_validate_json((await admin(api, "GET", "usage?key=alice")).content)
        (row,) = answer.usage
        assert (row.name, row.model, row.requests, row.prompt_tokens, row.completion_tokens) == (
            "alice",
            "demo",
            2,
            10,
            6,
        )
        assert answer.total.requests == 2
        assert (await admin(api, "GET", "usage?from=yesterday")).json()["error"]["param"] == "from"
        assert (await admin(api, "GET", "usage?from=2020-01-01&to=2020-02-01")).json()["usage"] == []


async def test_a_long_list_lets_others_run_meanwhile() -> None:
    api = Api(ScriptedDispatch())
    count = 10 * KEYS_PER_CHECKPOINT
    for i in range(count):
        api.access.create(f"key-{i}")
    shown_at_turn: list[int] = []
    shown = 0

    def use(key: ApiKey) -> dict[str, Any]:
        nonlocal shown
        shown += 1
        return {}

    async def others() -> None:
        while shown < count:
            shown_at_turn.append(shown)
            await trio.lowlevel.checkpoint()

    api.access.admin.use = use  # type: ignore[method-assign]
    async with api.client, trio.open_nursery() as nursery:
        nursery.start_soon(others)
        assert len((await admin(api, "GET", "keys")).json()["keys"]) == count
    turns = [*shown_at_turn, count]
    assert max(later - earlier for earlier, later in pairwise(turns)) <= 2 * KEYS_PER_CHECKPOINT  # in any order


async def test_usage_that_the_disk_does_not_give_is_503_with_the_reason() -> None:
    api = Api(ScriptedDispatch())
    api.access.store.is_unreadable = True
    async with api.client:
        answer = await admin(api, "GET", "usage")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_read")
    assert "the disk cannot be read" in answer.json()["error"]["message"]


async def test_a_request_that_finds_no_capacity_gives_its_reservation_back() -> None:
    api = Api(ScriptedDispatch(refusal=NoCapacity("full", 2.0)))
    token = api.access.create(tokens_per_minute=300)
    async with api.client:
        assert (await chat(api, token)).status_code == 503
        left = (await admin(api, "GET", "keys/alice")).json()["remaining"]
        assert left["tokens"] == {"limit": 300, "remaining": 300}


async def test_a_prompt_reserves_no_more_than_the_models_context() -> None:
    api = Api(ScriptedDispatch(*ANSWER))
    token = api.access.create(tokens_per_minute=1_024 + 10)
    async with api.client:
        long = [{"role": "user", "content": "x" * 8_000}]
        assert (await chat(api, token, messages=long, max_completion_tokens=10)).status_code == 200


async def test_a_name_that_no_node_knows_is_no_row_of_usage() -> None:
    api = Api(ScriptedDispatch(*ANSWER))
    token = api.access.create()
    async with api.client:
        assert (await chat(api, token, model="junk")).status_code == 404
    assert await api.access.used() == {}


async def test_models_that_a_key_may_not_use_are_not_listed() -> None:
    api = Api(ScriptedDispatch())
    token = api.access.create(models=("other",))
    async with api.client:
        headers = {"authorization": f"Bearer {token}"}
        assert (await api.client.get("/v1/models", headers=headers)).json()["data"] == []
        assert (await api.client.get("/v1/models/demo", headers=headers)).status_code == 404


async def test_a_key_whose_models_nobody_serves_is_told_so() -> None:
    api = Api(ScriptedDispatch(*ANSWER))
    token = api.access.create(models=("demoo",))
    async with api.client:
        assert "no node serves what it may use, 'demoo'" in (await chat(api, token)).json()["error"]["message"]
        assert (await chat(api, token, model="demoo")).status_code == 404


async def test_a_model_that_no_node_serves_is_told_and_the_key_made() -> None:
    api = Api(ScriptedDispatch())
    async with api.client:
        made = EditedKey.model_validate_json(
            (await admin(api, "POST", "keys", name="alice", models=["demo", "demoo"])).content
        )
        assert (made.key.models, made.unserved_models) == (["demo", "demoo"], ["demoo"])
        changed = EditedKey.model_validate_json((await admin(api, "PATCH", "keys/alice", models=["demo"])).content)
        assert changed.unserved_models == []


async def test_a_name_of_two_keys_is_a_conflict_and_all_of_them_can_be_revoked() -> None:
    api = Api(ScriptedDispatch())
    async with api.client:
        first = EditedKey.model_validate_json((await admin(api, "POST", "keys", name="alice")).content)
        rotated = await admin(api, "POST", "keys/alice/rotate", grace_s=3600)
        second = EditedKey.model_validate_json(rotated.content)
        assert [key.id for key in second.others] == [first.key.id]
        for refused in (await admin(api, "DELETE", "keys/alice"), await admin(api, "GET", "keys/alice")):
            assert (refused.status_code, refused.json()["error"]["code"]) == (409, "key_ambiguous")
        assert (await admin(api, "DELETE", "keys/alice?all=yes")).json()["error"]["param"] == "all"
        revoked = EditedKey.model_validate_json((await admin(api, "DELETE", "keys/alice?all=true")).content)
        assert {revoked.key.id, *revoked.also_revoked} == {first.key.id, second.key.id}
        assert (await admin(api, "GET", "keys")).json()["keys"] == []


async def test_usage_of_a_key_that_never_was_and_of_days_the_wrong_way_round_is_refused() -> None:
    api = Api(ScriptedDispatch())
    async with api.client:
        unknown = await admin(api, "GET", "usage?key=typo")
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "key_not_found")
        turned = await admin(api, "GET", "usage?from=2026-11-02&to=2026-11-01")
        assert (turned.status_code, turned.json()["error"]["param"]) == (400, "from")
