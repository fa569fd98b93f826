"""Writes docs/images/: the status page of a mesh at work, in which a node has just died under an answer.

python -m tests.browser.screenshots
"""

from __future__ import annotations

import http.client
import json
import tempfile
import threading
from pathlib import Path

from tests.browser.conftest import CHROMIUM
from tests.browser.visitor import Visitor
from tests.cluster.mesh import Mesh, NodeProcess

FOLDER = Path(__file__).parents[2] / "docs" / "images"
WIDE = {"width": 1280, "height": 1340}
PHONE = {"width": 390, "height": 844}
BODY = {"model": "demo", "messages": [{"role": "user", "content": "How do I add a node?"}], "max_tokens": 300}
STREAMS = 10
TRIES = 6
QUESTION = "What happens in a network partition?"


def load(node: NodeProcess, is_over: threading.Event) -> None:
    """One answer after the other, until it is over."""
    body = json.dumps(BODY | {"ignore_eos": True, "temperature": 0})
    while not is_over.wait(0.2):
        connection = http.client.HTTPConnection(node.http, timeout=60)
        try:
            connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
            connection.getresponse().read()
        except (OSError, http.client.HTTPException):
            continue  # its node is killed on purpose
        finally:
            connection.close()


def kill_under_an_answer(visitor: Visitor, mesh: Mesh) -> NodeProcess:
    """The node whose answer then went on at another one."""
    for _ in range(TRIES):
        visitor.page.get_by_role("button", name="New conversation").click()
        visitor.ask(QUESTION)
        part = visitor.page.locator("#talk .part").first
        part.wait_for(state="attached")
        victim = next(node for node in mesh.nodes if node.name == part.get_attribute("data-node"))
        victim.kill()
        visitor.page.locator("#talk > .theirs[data-state=done]").wait_for(timeout=60_000)
        if visitor.page.locator("#talk .handoff").count() == 1:
            return victim
        victim.start(mesh.nodes[0].mesh)  # the answer was over before
        visitor.wait_for_nodes(**{node.name.replace("-", "_"): "healthy" for node in mesh.nodes})
    raise SystemExit(f"{TRIES} answers were over before their nodes were killed; run it on a machine with less to do")


def main() -> None:
    from playwright.sync_api import sync_playwright

    FOLDER.mkdir(parents=True, exist_ok=True)
    is_over = threading.Event()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        mesh = Mesh(Path(folder))
        try:
            entry = mesh.add("--no-model")
            for _ in range(3):
                mesh.add()
            mesh.wait_until_agreed()
            threads = [threading.Thread(target=load, args=(entry, is_over)) for _ in range(STREAMS)]
            for thread in threads:
                thread.start()
            with Visitor(browser, entry, viewport=WIDE, color_scheme="light") as visitor:
                visitor.wait_for_nodes(**{node.name.replace("-", "_"): "healthy" for node in mesh.nodes})
                victim = kill_under_an_answer(visitor, mesh)
                visitor.wait_for_nodes(**{victim.name.replace("-", "_"): "offline"})
                visitor.page.wait_for_timeout(6_000)  # the views that follow the death, and some history
                visitor.page.evaluate("() => window.scrollTo(0, 0)")
                visitor.page.screenshot(path=FOLDER / "status-light.png")
                visitor.page.emulate_media(color_scheme="dark")
                visitor.page.screenshot(path=FOLDER / "status-dark.png")
                visitor.page.set_viewport_size(PHONE)
                visitor.page.screenshot(path=FOLDER / "status-phone.png")
            is_over.set()
            for thread in threads:
                thread.join()
        finally:
            is_over.set()
            mesh.close()
            browser.close()


if __name__ == "__main__":
    main()
