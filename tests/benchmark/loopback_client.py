"""`python -m tests.benchmark.loopback_client`: clients in a process of their own, so that only the node is measured.

For each JSON line on standard input {"address", "body", "headers", "count", "at_once"} so many chat completions are
asked, so many at once over a connection each, and read to their ends; then "done" is written. It ends with its input.
"""

from __future__ import annotations

import http.client
import json
import sys
import threading
from typing import Any

PATH = "/v1/chat/completions"


def ask_all(order: dict[str, Any]) -> None:
    """Raises RuntimeError for an answer that is none."""
    numbers = iter(range(order["count"]))
    lock = threading.Lock()
    failures: list[str] = []

    def run() -> None:
        connection = http.client.HTTPConnection(order["address"], timeout=60)
        while not failures:
            with lock:
                if next(numbers, None) is None:
                    break
            connection.request("POST", PATH, order["body"], order["headers"])
            response = connection.getresponse()
            content = response.read()
            if response.status != 200:
                failures.append(content.decode(errors="replace"))
        connection.close()

    threads = [threading.Thread(target=run) for _ in range(order["at_once"])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise RuntimeError(failures[0])


def main() -> None:
    for line in sys.stdin:
        ask_all(json.loads(line))
        print("done", flush=True)


if __name__ == "__main__":
    main()
