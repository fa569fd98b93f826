"""The status page in a real browser, on real nodes that are killed while it watches."""

from __future__ import annotations

import json
import time
import urllib.request
from typing import Any

from tests.browser.visitor import Visitor
from tests.cluster.mesh import Mesh, NodeProcess

QUESTION = "What happens to my answer when its node dies?"
TOKENS = 700
OFFLINE_WITHIN_S = 10.0


def test_a_killed_node_is_offline_within_ten_seconds(browser: Any, mesh: Mesh) -> None:
    entry, _, victim = mesh.nodes
    with Visitor(browser, entry) as visitor:
        visitor.wait_for_nodes(entry="healthy", node_2="healthy", node_3="healthy")
        victim.kill()
        killed_at = time.monotonic()
        visitor.wait_for_nodes(entry="healthy", node_2="healthy", node_3="offline")
        assert time.monotonic() - killed_at < OFFLINE_WITHIN_S
        visitor.page.get_by_text("node-3 is dead").first.wait_for()
        victim.start(entry.mesh)
        visitor.wait_for_nodes(node_3="healthy")
        visitor.page.get_by_text("node-3 is back").first.wait_for()
        assert (visitor.faults, visitor.foreign) == ([], [])


def test_a_new_conversation_has_nothing_of_an_answer_that_was_being_written(browser: Any, calm_mesh: Mesh) -> None:
    with Visitor(browser, calm_mesh.nodes[0]) as visitor:
        visitor.wait_for_nodes(entry="healthy", node_2="healthy", node_3="healthy")
        sent: list[list[dict[str, str]]] = []
        visitor.page.on("request", lambda asked: sent.append(_messages(asked)) if asked.method == "POST" else None)
        visitor.lengthen_answers(TOKENS)
        visitor.ask(QUESTION)
        visitor.page.locator("#talk .part:not(:empty)").first.wait_for()
        visitor.page.get_by_role("button", name="New conversation").click()
        visitor.page.locator("#send:enabled").wait_for()
        visitor.ask("And now?")
        visitor.page.locator("#talk .part:not(:empty)").first.wait_for()
    assert sent[-1] == [{"role": "user", "content": "And now?"}]


def _messages(request: Any) -> list[dict[str, str]]:
    asked: list[dict[str, str]] = json.loads(request.post_data)["messages"]
    return asked


def test_a_chat_goes_on_at_another_node_before_the_viewers_eyes(browser: Any, mesh: Mesh) -> None:
    entry = mesh.nodes[0]
    with Visitor(browser, entry) as visitor:
        visitor.wait_for_nodes(entry="healthy", node_2="healthy", node_3="healthy")
        visitor.lengthen_answers(TOKENS)

        def answer(harm: bool) -> tuple[str, list[str]]:
            """Its text, and the nodes that its parts came from."""
            visitor.ask(QUESTION)
            latest = visitor.page.locator("#talk > .theirs").last
            latest.locator(".part").first.wait_for()
            if harm:
                serving = latest.locator(".part").first.get_attribute("data-node")
                next(node for node in mesh.nodes if node.name == serving).kill()
            visitor.page.wait_for_function(
                "() => document.querySelector('#talk > .theirs:last-child').dataset.state", timeout=60_000
            )
            assert latest.get_attribute("data-state") == "done", latest.inner_text()
            parts = latest.locator(".part")
            return "".join(parts.all_text_contents()), parts.evaluate_all("all => all.map(p => p.dataset.node)")

        whole, _ = answer(harm=False)
        visitor.page.get_by_role("button", name="New conversation").click()
        resumed, path = answer(harm=True)
        assert resumed == whole
        assert set(path) == {"node-2", "node-3"}
        handed = visitor.page.locator("#talk .handoff")
        assert handed.all_inner_texts() == [f"⤳ {node}" for node in path[1:]]
        visitor.page.get_by_text(f"answers went on from {path[0]} to {path[1]}").first.wait_for()
        assert (visitor.faults, visitor.foreign) == ([], [])


def test_the_page_says_that_its_own_node_is_gone_and_is_live_again_when_it_is_back(browser: Any, mesh: Mesh) -> None:
    entry, second, _ = mesh.nodes
    with Visitor(browser, entry) as visitor:
        visitor.wait_for_nodes(entry="healthy", node_2="healthy", node_3="healthy")
        entry.kill()
        alert = visitor.page.get_by_role("alert")
        alert.get_by_text("does not answer").wait_for()
        assert alert.get_by_role("link", name="node-2").get_attribute("href") == f"{second.url}/"
        entry.start(second.mesh)
        alert.wait_for(state="hidden")
        visitor.wait_for_nodes(entry="healthy", node_2="healthy", node_3="healthy")
        assert visitor.foreign == []


def create_key(node: NodeProcess, **fields: Any) -> str:
    body = json.dumps({"name": "shop"} | fields).encode()
    headers = {"content-type": "application/json", "authorization": f"Bearer {admin_token(node)}"}
    with urllib.request.urlopen(urllib.request.Request(node.url + "/admin/keys", body, headers)) as response:
        token: str = json.load(response)["token"]
        return token


def admin_token(node: NodeProcess) -> str:
    return (node.folder / "data" / "admin-token").read_text().strip()


def test_a_mesh_with_keys_asks_for_one_and_the_admin_sees_which_is_near_its_limit(browser: Any, mesh: Mesh) -> None:
    entry = mesh.nodes[0]
    key = create_key(entry, requests_per_minute=2)
    with Visitor(browser, entry) as visitor:
        page = visitor.page
        visitor.wait_for_nodes(entry="healthy", node_2="healthy", node_3="healthy")
        visitor.ask("What is AI Cluster?")
        page.locator("#talk > .theirs[data-state=failed] .fault").wait_for()
        assert page.evaluate("() => document.activeElement.id") == "api-key"
        page.get_by_label("API key", exact=True).fill(key)
        page.get_by_label("Admin token of this node").fill("wrong")
        page.get_by_role("button", name="Show keys").click()
        page.get_by_text("does not take that token").wait_for()
        page.get_by_label("Admin token of this node").fill(admin_token(entry))
        page.get_by_role("button", name="Show keys").click()
        page.get_by_text("0 of 1 keys are near a limit").wait_for()
        for count in (1, 2):
            visitor.ask("What is AI Cluster?")
            page.locator("#talk > .theirs[data-state=done]").nth(count - 1).wait_for()
        page.get_by_text("1 of 1 keys are near a limit").wait_for()
        page.get_by_text("0 of 2 requests left this minute").wait_for()
        stored = page.evaluate("() => JSON.stringify([{...localStorage}, {...sessionStorage}])")
        assert key not in stored
        assert admin_token(entry) not in stored
        assert visitor.foreign == []


def test_nodes_that_do_not_see_each_other_are_marked(browser: Any, calm_mesh: Mesh) -> None:
    entry, second, _ = calm_mesh.nodes
    with Visitor(browser, entry) as visitor:
        page = visitor.page
        page.get_by_text("All 3 nodes asked believe the same of each other.").wait_for()

        def cut(route: Any) -> None:
            answer = json.loads(route.fetch().body())
            answer["views"][second.name]["node-3"] = "dead"
            answer["disputed"] = ["node-3"]
            route.fulfill(body=json.dumps(answer), content_type="application/json")

        page.route("**/cluster/views", cut)
        page.get_by_text("Nodes disagree about node-3.").wait_for()
        assert page.locator("#map .line.broken").count() == 1
        assert page.locator("#map .line.good").count() == 2
        assert "disagree about node-3" in str(page.locator("#map").get_attribute("aria-label"))
        page.get_by_text("Who sees whom", exact=True).click()
        page.get_by_role("row", name="node-2 alive alive dead").wait_for()
        assert (visitor.faults, visitor.foreign) == ([], [])
