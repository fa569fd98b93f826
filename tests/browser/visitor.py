"""One browser page on a node, with everything that it loaded and complained of."""

from __future__ import annotations

import json
from typing import Any

from tests.cluster.mesh import NodeProcess


class Visitor:
    """Use as context manager. faults: console errors and uncaught exceptions; foreign: requests to other hosts."""

    def __init__(self, browser: Any, node: NodeProcess, **context: Any) -> None:
        self.faults: list[str] = []
        self.foreign: list[str] = []
        self._node = node
        self._context = browser.new_context(**context)
        self.page = self._context.new_page()
        self.page.on("console", self._note_console)
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("request", self._note_request)
        self.page.set_default_timeout(15_000)

    def __enter__(self) -> Visitor:
        self.page.goto(self._node.url + "/")
        return self

    def __exit__(self, *_: object) -> None:
        self._context.close()

    def wait_for_nodes(self, **statuses: str) -> None:
        """Until the page shows each of these nodes (dashes as underscores) with its status."""
        wanted = {name.replace("_", "-"): status for name, status in statuses.items()}
        self.page.wait_for_function(
            """wanted => {
              const cards = Object.fromEntries([...document.querySelectorAll("#nodes > li")].map(
                (card) => [card.dataset.key, card.className]));
              return Object.entries(wanted).every(([name, status]) => cards[name]?.includes(status));
            }""",
            arg=wanted,
        )

    def lengthen_answers(self, tokens: int) -> None:
        """Have answers go on past their natural end: those of the built-in model are over too soon to be watched."""

        def change(route: Any) -> None:
            body = json.loads(route.request.post_data) | {"ignore_eos": True, "max_tokens": tokens}
            route.continue_(post_data=json.dumps(body))

        self.page.route("**/v1/chat/completions", change)

    def ask(self, question: str) -> None:
        self.page.get_by_label("Your message").fill(question)
        self.page.get_by_role("button", name="Send").click()

    def _note_console(self, message: Any) -> None:
        if message.type == "error":
            self.faults.append(message.text)

    def _note_request(self, request: Any) -> None:
        if not request.url.startswith(self._node.url + "/"):
            self.foreign.append(request.url)
