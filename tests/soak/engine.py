"""Does the engine's memory stay flat? Thousands of short generations, cancelled, refused, late and finished ones.

`python -m tests.soak.engine [--generations 20000] [--seed 7]` prints one JSON line and ends with status 1 when
something is left behind: a slot, a queue's entry, an open stream, or memory.

Readers are more than slots and queue together, so requests are refused all the time, or take the place of one who
asks more. Half of the prompts begin with one of a few shared prefixes. Some requests want two or three answers, some
answers follow a grammar, and some are told with log-probabilities. A generation ends in one of these ways: complete,
its stream closed while it waits, its stream closed after some tokens, the same and resumed to its end, past its
deadline, or displaced from the queue. On a machine that keeps a thread from its core for long, the engine finds itself
stuck and ends all of them, until it goes on: that is no leak, but is told, with every thread's stack.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import random
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import psutil
import trio

from nodes.engine.engine import Engine, Resume, load_engine
from nodes.engine.engine_statistics import STUCK
from nodes.engine.errors import DeadlinePassed, EngineFault, QueueFull
from nodes.engine.model_loader import read_model_folder
from nodes.engine.sampling import GrammarSpec, SamplingParams
from nodes.engine.stream import EngineStream
from nodes.model_tools.random_llama import write_random_llama

SLOTS = 8
QUEUE_LIMIT = 8
READERS = 24
PREFIXES = 6
PREFIX_TOKENS = (64, 192)
TAIL_TOKENS = (1, 40)
ANSWER_TOKENS = (1, 12)
LATE_S = 0.003  # a deadline that passes in the queue or in the slot
REFUSED_PAUSE_S = 0.002
STUCK_TIMEOUT_S = 60.0
ASKERS = {"much": 9, "little": 1}  # the second one displaces the first
RESUMES: tuple[Resume, ...] = ("auto", "prefill", "replay")
ENDINGS = {"finished": 6, "closed waiting": 1, "closed reading": 1, "resumed": 2, "late": 1}
CHOICES = {1: 16, 2: 2, 3: 1}  # answers to one request, and how often they are asked for
TOP_LOGPROBS = 3
GRAMMARS = (
    GrammarSpec("json_object"),
    GrammarSpec("regex", "[a-f]{1,9}-[0-9]+"),
    GrammarSpec("choice", '["yes", "no", "perhaps"]'),
    GrammarSpec("json_schema", '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}'),
)
FIRST_ID, LAST_ID = 10, 249
SAMPLES = 20  # of memory

Value = TypeVar("Value")

# Caches, allocator and KV pages have their size by then, whatever the number of generations after it.
WARM_UP_SHARE = 0.2
# A sequence that stays referenced keeps its prompt, answer, text decoder and stream: at least 2 kB. So 16,000 of them
# leave 32 MB, a leaked event or future of 300 bytes each about 5 MB; the allocator's own noise is under 2 MB.
GROWTH_BYTES_MAX = 4 << 20


@dataclass(slots=True)
class Soak:
    """What is left to do, and what came of it."""

    engine: Engine
    generations: int
    rng: random.Random
    outcomes: Counter[str] = field(default_factory=Counter)
    rss_bytes: list[int] = field(default_factory=list)  # SAMPLES of them, the first one at the beginning
    begun: int = 0

    async def read(self) -> None:
        """One reader: a request after the other until all generations have been begun."""
        while self.begun < self.generations:
            if self.begun >= len(self.rss_bytes) * self.generations / SAMPLES:
                self.rss_bytes.append(rss_bytes())
            choices = self._drawn(CHOICES)
            self.begun += choices
            ids, params = self._prompt(), self._params()
            async with trio.open_nursery() as nursery:
                for choice in range(choices):
                    nursery.start_soon(self._generate, ids, replace(params, choice=choice))

    async def _generate(self, ids: list[int], params: SamplingParams) -> None:
        ending, asker = self._drawn(ENDINGS), self._drawn(ASKERS)
        outcome, tokens = await self._run(ids, params, ending, asker, [])
        if outcome == "resumed":
            self.outcomes["resumptions"] += 1
            outcome, _ = await self._run(ids, params, "finished", asker, tokens)
        self.outcomes[outcome] += 1
        if params.grammar is not None:
            self.outcomes["with a grammar"] += 1
        if params.logprobs is not None:
            self.outcomes["with logprobs"] += 1
        if params.choice:
            self.outcomes["further answers"] += 1

    async def _run(
        self, ids: list[int], params: SamplingParams, ending: str, asker: str, generated: list[int]
    ) -> tuple[str, list[int]]:
        """From its submission until it ends or is closed. Returns how it ended, and the tokens read."""
        tokens: list[int] = []
        async with await self._submit(ids, params, ending, asker, generated) as stream:
            if ending == "closed waiting":
                await trio.lowlevel.checkpoint()
                return ending, tokens
            try:
                async for event in stream:
                    tokens += event.token_ids
                    if params.logprobs is not None:
                        assert len(event.logprobs) == len(event.token_ids)
                    if ending in ("closed reading", "resumed") and event.finish_reason is None:
                        return ending, tokens
            except DeadlinePassed:
                return "late", tokens
            except QueueFull:
                return "displaced", tokens
            except EngineFault as fault:
                await self._wait_while_stuck(fault)
                return "stuck", tokens
        return "finished", tokens

    async def _wait_while_stuck(self, fault: EngineFault) -> None:
        """Raises the fault where it was another one, and TooSlowError where the engine does not go on."""
        if str(fault) != "a step of the engine does not return":
            raise fault
        if not self.outcomes["stuck"]:
            faulthandler.dump_traceback()
        with trio.fail_after(STUCK_TIMEOUT_S):
            while self.engine.statistics().state is STUCK:
                await trio.sleep(0.1)

    async def _submit(
        self, ids: list[int], params: SamplingParams, ending: str, asker: str, generated: list[int]
    ) -> EngineStream:
        """Refused as often as it takes."""
        rng, engine = self.rng, self.engine
        while True:
            try:
                return engine.submit(
                    ids,
                    params,
                    engine.now() + (LATE_S if ending == "late" else 600.0),
                    generated_ids=generated,
                    resume=rng.choice(RESUMES),
                    fairness_id=asker,
                    matcher=None if params.grammar is None else engine.compile_grammar(params.grammar),
                )
            except QueueFull:
                self.outcomes["refused"] += 1
                await trio.sleep(REFUSED_PAUSE_S)
            except EngineFault as fault:
                await self._wait_while_stuck(fault)

    def _params(self) -> SamplingParams:
        rng = self.rng
        grammar = rng.choice(GRAMMARS) if rng.random() < 0.15 else None
        return SamplingParams(
            temperature=rng.choice((0.0, 1.0)),
            top_p=0.9,
            seed=rng.getrandbits(32),
            is_seeded=rng.random() < 0.5,
            max_tokens=rng.randint(*ANSWER_TOKENS),
            ignore_eos=grammar is None,
            logprobs=TOP_LOGPROBS if rng.random() < 0.15 else None,
            grammar=grammar,
        )

    def _drawn(self, weights: dict[Value, int]) -> Value:
        return self.rng.choices(list(weights), list(weights.values()))[0]

    def _prompt(self) -> list[int]:
        rng = self.rng
        ids: list[int] = []
        if rng.random() < 0.5:
            shared = random.Random(rng.randrange(PREFIXES))
            ids = [shared.randint(FIRST_ID, LAST_ID) for _ in range(shared.randint(*PREFIX_TOKENS))]
        return ids + [rng.randint(FIRST_ID, LAST_ID) for _ in range(rng.randint(*TAIL_TOKENS))]


def rss_bytes() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


async def soak(folder: Path, generations: int, seed: int) -> list[str]:
    """Print what was done. Returns what is wrong."""
    # Threads that spin between steps would only take the cores from each other here.
    engine = load_engine(
        read_model_folder(folder), slots=SLOTS, queue_limit=QUEUE_LIMIT, threads=1, spinning=False, provider="cpu"
    )
    state = Soak(engine, generations, random.Random(seed))
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        async with trio.open_nursery() as readers:
            for _ in range(READERS):
                readers.start_soon(state.read)
        state.rss_bytes.append(rss_bytes())
        with trio.move_on_after(10):  # the slots of the last streams closed are free after the next plan
            while engine.statistics().free_slots < SLOTS:
                await trio.sleep(0.01)
        left = engine.statistics()
        open_streams = len(engine._streams)
        nursery.cancel_scope.cancel()

    warm = state.rss_bytes[int(WARM_UP_SHARE * (len(state.rss_bytes) - 1))]
    growth = state.rss_bytes[-1] - warm
    wrong = []
    if growth > GROWTH_BYTES_MAX:
        wrong.append(f"memory grew by {growth / 1e6:.1f} MB after warm-up, and {GROWTH_BYTES_MAX / 1e6:.1f} may")
    for name, found, expected in (
        ("free slots", left.free_slots, SLOTS),
        ("active sequences", left.active, 0),
        ("queued sequences", left.queued, 0),
        ("queued prompt tokens", left.queued_tokens, 0),
        ("open streams", open_streams, 0),
    ):
        if found != expected:
            wrong.append(f"{found} {name} at the end instead of {expected}")
    figures = {
        "generations": generations,
        **{name.replace(" ", "_"): count for name, count in sorted(state.outcomes.items())},
        "rss_mb_warm": round(warm / 1e6, 1),
        "rss_mb_end": round(state.rss_bytes[-1] / 1e6, 1),
        "rss_mb_samples": [round(sample / 1e6, 1) for sample in state.rss_bytes],
        "free_slots": left.free_slots,
        "queued": left.queued,
        "prompts_found_in_cache": left.cache_hits_total,
        "tokens_generated": left.tokens_generated_total,
        "wrong": wrong,
    }
    print(json.dumps(figures))
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generations", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_random_llama(Path(folder))
        wrong = trio.run(soak, Path(folder), options.generations, options.seed)
    for line in wrong:
        print(line, file=sys.stderr)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
