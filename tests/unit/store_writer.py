"""Lives that commit edits until they are killed, and print each one acknowledged. See test_store.py.

One process imports and then forks a life for each number it reads, since starting an interpreter takes longest.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from random import Random

import trio

from mesh.counters_wire import Totals
from mesh.replica import EditRefused, Replica
from nodes.durable_replica import DurableReplica
from nodes.store import UsageRow, open_store

TASKS = 4
PAIRS = 40
DAY = 20_000


def say(*words: str) -> None:
    """One line in one write, short enough for the pipe to have it whole or not at all; print() may need several."""
    os.write(sys.stdout.fileno(), f"{' '.join(words)}\n".encode())


async def commit_until_killed(folder: Path, life: int) -> None:
    rng = Random(life)
    async with open_store(folder) as store:
        durable = DurableReplica(Replica("writer", life, await store.records()), store)
        say("open", str(os.getpid()))

        async def edit(task: int) -> None:
            for i in range(1_000_000):
                pair = rng.randrange(PAIRS)
                ids = [f"a{pair}", f"b{pair}"]
                try:
                    if rng.random() < 0.02:
                        drafts = [durable.replica.draft_deletion(record_id) for record_id in ids]
                    else:
                        value = f"{life} {task} {i} ".encode() * 20
                        drafts = [durable.replica.draft(record_id, value) for record_id in ids]
                except EditRefused:  # deleted, or not there to be deleted
                    await trio.sleep(0)
                    continue
                await durable.commit(drafts)
                await store.put(usage=[UsageRow(DAY, f"task {task}", "m", "writer", life, Totals(i, i, i))])
                say(*(f"{d.record_id}:{d.clock}:{d.is_deleted:d}" for d in drafts), f"{task}:{i}")

        async with trio.open_nursery() as nursery:
            for task in range(TASKS):
                nursery.start_soon(edit, task)


def main(folder: Path) -> None:
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                trio.run(commit_until_killed, folder, int(line))
            finally:
                os._exit(1)  # never back into the loop of its parent
        _, status = os.waitpid(pid, 0)
        say("killed by", str(os.WTERMSIG(status)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
