"""`python -m tests.cluster.key_kills`: SIGKILL at random moments while API keys are edited. One JSON line of figures.

One node without peers, so that nothing but its own disk can restore what it acknowledged. Several clients edit keys of
their own over HTTP, one edit each at a time; after each kill the node is started again, and all keys are compared with
what was acknowledged. An edit without an answer may have happened or not, but not half of it: a change sets three
limits to one number, a rotation makes one key and revokes another. Exit status 1 where one of these does not hold:

  lost          no acknowledged edit is missing, and no revoked key works
  half_applied  no edit without an answer is there in part
  kills         the node was killed at least once per 50 edits
"""

from __future__ import annotations

import argparse
import http.client
import random
import tempfile
import urllib.error
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import trio

from tests.cluster.figures import finish, law, progress
from tests.cluster.limits import admin_token, ask
from tests.cluster.mesh import Mesh, NodeProcess

EDITS_A_KILL_MIN = 50
KEYS_MAX = 8  # of each client, so that lists stay short
FAULTS_MAX = 20
# The moments at which a node is killed: some within the first edit after its start, some after dozens.
KILL_AFTER_S = (0.0, 0.6)

Verb = Literal["create", "change", "rotate", "revoke"]


@dataclass(frozen=True, slots=True)
class Options:
    edits: int = 1_000
    clients: int = 6
    seed: int = 7


@dataclass(frozen=True, slots=True)
class Known:
    """number: what its three limits are."""

    number: int
    family: str
    token: str = ""


@dataclass(slots=True)
class Edit:
    """number: of a change or a new key; name: of a new key."""

    verb: Verb
    key_id: str = ""
    number: int = 0
    name: str = ""


@dataclass
class Editor:
    """One client. keys: acknowledged and not revoked. revoked: acknowledged. doubtful: the edit without an answer."""

    name: str
    rng: random.Random
    keys: dict[str, Known] = field(default_factory=dict)
    revoked: dict[str, str] = field(default_factory=dict)  # id → token
    doubtful: Edit | None = None
    count: int = 0

    def draw(self) -> Edit:
        self.count += 1
        verb: Verb = self.rng.choice(("create", "change", "change", "rotate", "revoke"))
        if not self.keys:
            verb = "create"
        elif verb == "create" and len(self.keys) >= KEYS_MAX:
            verb = "revoke"
        key_id = self.rng.choice(list(self.keys)) if self.keys else ""
        return Edit(verb, key_id, self.count, f"{self.name}-{self.count}")

    def make(self, node: NodeProcess, token: str) -> bool:
        """One edit at the node; False where no answer came."""
        edit = self.doubtful = self.draw()
        limits = dict.fromkeys(("requests_per_minute", "tokens_per_minute", "concurrency"), edit.number)
        path = f"/admin/keys/{edit.key_id}"
        try:
            match edit.verb:
                case "create":
                    status, answer = ask(node, "/admin/keys", {"name": edit.name, **limits}, token)
                case "change":
                    status, answer = ask(node, path, limits, token, "PATCH")
                case "rotate":
                    status, answer = ask(node, f"{path}/rotate", {}, token)
                case "revoke":
                    status, answer = ask(node, path, None, token, "DELETE")
        except (urllib.error.URLError, OSError, http.client.HTTPException, ValueError):
            return False
        assert status == 200, (edit, status, answer)
        self.doubtful = None
        key = answer["key"]
        if edit.verb == "change":
            self.keys[key["id"]] = Known(edit.number, key["family"], self.keys[key["id"]].token)
        elif edit.verb == "create":
            self.keys[key["id"]] = Known(edit.number, key["family"], answer["token"])
        else:
            former = self.keys.pop(edit.key_id)
            self.revoked[edit.key_id] = former.token
            if edit.verb == "rotate":
                self.keys[key["id"]] = Known(former.number, key["family"], answer["token"])
        return True

    def compare(self, listed: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
        """(law, what breaks it); then what is listed counts as known."""
        faults: list[tuple[str, str]] = []
        edit, self.doubtful = self.doubtful, None
        mine = {key_id: key for key_id, key in listed.items() if key["name"].startswith(f"{self.name}-")}
        numbers: dict[str, int] = {}
        for key_id, key in mine.items():
            limits = {key["requests_per_minute"], key["tokens_per_minute"], key["concurrency"]}
            if len(limits) != 1:
                faults.append(("half_applied", f"{key_id} has the limits {limits}"))
            numbers[key_id] = key["requests_per_minute"]
        new = sorted(mine.keys() - self.keys.keys())
        gone = sorted(self.keys.keys() - mine.keys())
        faults += [("lost", f"the revocation of {key_id}") for key_id in mine.keys() & self.revoked.keys()]
        for key_id, known in self.keys.items():
            allowed = {known.number}
            if edit is not None and edit.verb == "change" and edit.key_id == key_id:
                allowed.add(edit.number)
            if key_id in mine and numbers[key_id] not in allowed:
                faults.append(("lost", f"{key_id} has the limit {numbers[key_id]} and not {known.number}"))
        match edit:
            case Edit("create") if len(new) <= 1 and not gone:
                wrong = any(mine[key_id]["name"] != edit.name or numbers[key_id] != edit.number for key_id in new)
                if wrong:
                    faults.append(("half_applied", f"{edit} made {mine[new[0]]}"))
            case Edit("rotate") if (new, gone) != ([], []):
                families = {mine[key_id]["family"] for key_id in new}
                if len(new) != 1 or gone != [edit.key_id] or families != {self.keys[edit.key_id].family}:
                    faults.append(("half_applied", f"{edit} made {new} and took {gone}"))
            case Edit("revoke") if gone == [edit.key_id] and not new:
                pass
            case _ if new or gone:
                faults.append(("lost", f"after {edit}: {new} are new and {gone} are gone"))
        self.revoked |= {key_id: self.keys[key_id].token for key_id in gone}
        self.keys = {
            key_id: Known(numbers[key_id], key["family"], self.keys[key_id].token if key_id in self.keys else "")
            for key_id, key in mine.items()
        }
        return faults


class _Kills:
    def __init__(self, node: NodeProcess, options: Options) -> None:
        self._node = node
        self._options = options
        self._rng = random.Random(options.seed)
        self._editors = [Editor(f"c{i}", random.Random(f"{options.seed} {i}")) for i in range(options.clients)]
        self._acknowledged: Counter[str] = Counter()
        self._unanswered: Counter[str] = Counter()
        self._faults: list[tuple[str, str]] = []
        self._kills = 0
        self._token = admin_token(node)

    async def run(self) -> dict[str, Any]:
        while sum(self._acknowledged.values()) < self._options.edits and len(self._faults) < FAULTS_MAX:
            async with trio.open_nursery() as nursery:
                for editor in self._editors:
                    nursery.start_soon(self._edit, editor)
                await trio.sleep(self._rng.uniform(*KILL_AFTER_S))
                self._node.kill()
            self._kills += 1
            self._node.start()
            self._compare()
            if self._kills % 10 == 0:
                progress(f"{self._kills} kills, {sum(self._acknowledged.values())} edits acknowledged")
        self._try_tokens()
        by_law = Counter(name for name, _ in self._faults)
        edits = sum(self._acknowledged.values())
        return {
            "seed": self._options.seed,
            "kills": self._kills,
            "acknowledged": dict(self._acknowledged),
            "unanswered": dict(self._unanswered),
            "faults": self._faults,
            "laws": {
                "lost": law(by_law["lost"], at_most=0),
                "half_applied": law(by_law["half_applied"], at_most=0),
                "kills": law(self._kills / edits, at_least=1 / EDITS_A_KILL_MIN),
                "unanswered": law(sum(self._unanswered.values()), at_least=1),
            },
        }

    async def _edit(self, editor: Editor) -> None:
        while True:
            if not await trio.to_thread.run_sync(editor.make, self._node, self._token):
                assert editor.doubtful is not None
                self._unanswered[editor.doubtful.verb] += 1
                return
            self._acknowledged["edits"] += 1

    def _compare(self) -> None:
        status, answer = ask(self._node, "/admin/keys", None, self._token, "GET")
        assert status == 200, answer
        listed = {key["id"]: key for key in answer["keys"]}
        for editor in self._editors:
            self._faults += editor.compare(listed)

    def _try_tokens(self) -> None:
        """Keys open what their records say."""
        for editor in self._editors:
            tries = [(known.token, 200) for known in editor.keys.values() if known.token]
            tries += [(token, 401) for token in list(editor.revoked.values())[:3] if token]
            for token, expected in tries:
                status, _ = ask(self._node, "/v1/models", None, token, "GET")
                if status != expected:
                    self._faults.append(("lost", f"a key of {editor.name} is answered {status} and not {expected}"))


async def run(folder: Path, options: Options) -> dict[str, Any]:
    mesh = Mesh(folder)
    try:
        return await _Kills(mesh.add("--no-model"), options).run()
    finally:
        mesh.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = Options()
    parser.add_argument("--edits", type=int, default=defaults.edits, help="acknowledged")
    parser.add_argument("--clients", type=int, default=defaults.clients)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    options = Options(**vars(parser.parse_args()))
    with tempfile.TemporaryDirectory() as folder:
        finish(trio.run(run, Path(folder), options))


if __name__ == "__main__":
    main()
