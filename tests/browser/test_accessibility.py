"""Everybody can use the page: what axe-core finds, without a mouse, and at the width of a small phone."""

from __future__ import annotations

from typing import Any

import pytest

from tests.browser.visitor import Visitor
from tests.cluster.mesh import Mesh

NARROW = {"width": 320, "height": 700}
RUN_AXE = """async () => (await axe.run(document, {resultTypes: ["violations"]})).violations.map(
  (fault) => `${fault.impact} ${fault.id}: ${fault.nodes.map((node) => node.html).join(" ")}`)"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_fault_with_a_node_offline_and_an_answer_shown(
    browser: Any, axe: str, mesh: Mesh, scheme: str
) -> None:
    with Visitor(browser, mesh.nodes[0], color_scheme=scheme) as visitor:
        page = visitor.page
        visitor.wait_for_nodes(entry="healthy", node_2="healthy", node_3="healthy")
        visitor.ask("What is AI Cluster?")
        page.locator("#talk > .theirs[data-state=done]").wait_for()
        mesh.nodes[2].kill()
        visitor.wait_for_nodes(node_3="offline")
        for details in page.locator("details").all():
            details.locator("summary").click()
        page.locator("#views-table td").first.wait_for()
        # By the debugger, which the page's policy does not bind.
        page.evaluate(axe)
        assert page.evaluate(RUN_AXE) == []
        page.evaluate("() => { document.getElementById('link-state').dataset.state = 'lost'; }")
        page.evaluate("() => { document.getElementById('outage').hidden = false; }")
        page.evaluate("() => document.getElementById('outage').append('The node is gone.')")
        assert page.evaluate(RUN_AXE) == []


def test_a_question_is_asked_and_the_theme_changed_without_a_mouse(browser: Any, calm_mesh: Mesh) -> None:
    with Visitor(browser, calm_mesh.nodes[0], color_scheme="light") as visitor:
        page = visitor.page
        visitor.wait_for_nodes(node_2="healthy")
        page.keyboard.press("Tab")
        assert page.evaluate("() => document.activeElement.textContent") == "Skip to the chat"
        page.keyboard.press("Enter")
        focused = focus_order(page, 3)
        assert focused[:2] == ["talk", "question"]
        page.locator("#question").focus()
        page.keyboard.type("What is AI Cluster?")
        page.keyboard.press("Enter")
        page.locator("#talk > .theirs[data-state=done]").wait_for()
        # Of which those who do not see it are told.
        assert "Answer from node-" in page.locator("#chat-news").inner_text()

        theme = page.get_by_role("button", name="Theme")
        grounds = []
        for _ in range(3):
            theme.press("Enter")
            grounds.append((theme.inner_text(), page.evaluate("() => getComputedStyle(document.body).backgroundColor")))
        assert [name for name, _ in grounds] == ["Theme: light", "Theme: dark", "Theme: system"]
        assert grounds[0][1] == grounds[2][1] != grounds[1][1]
        assert visitor.faults == []


def focus_order(page: Any, count: int) -> list[str]:
    found = []
    for _ in range(count):
        page.keyboard.press("Tab")
        found.append(page.evaluate("() => document.activeElement.id"))
    return found


def test_nothing_is_wider_than_a_small_phone(browser: Any, calm_mesh: Mesh) -> None:
    with Visitor(browser, calm_mesh.nodes[0], viewport=NARROW) as visitor:
        page = visitor.page
        visitor.wait_for_nodes(entry="healthy", node_2="healthy", node_3="healthy")
        visitor.ask("What is AI Cluster?")
        page.locator("#talk > .theirs[data-state=done]").wait_for()
        for details in page.locator("details").all():
            details.locator("summary").click()
        assert page.evaluate("() => document.documentElement.scrollWidth") <= NARROW["width"]
