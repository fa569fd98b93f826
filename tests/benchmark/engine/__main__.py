"""What the engine reaches, and beside it onnxruntime-genai and llama.cpp with the same weights: one JSON line a row.

`python -m tests.benchmark.engine` measures this engine on a random Llama of 200M parameters, fp32 and int4 block 128;
`--peers ENVDIR` adds the other two, in an environment from `python -m tests.benchmark.peers_env ENVDIR`. llama.cpp's
int4 is Q4_0. Contestants are processes, all loaded, of which one works at a time; in each round each of them takes each
measurement, in turns. `--quick` is a smoke run on a tiny model.

  agreement   leading tokens, of those of our greedy answers, that the other's answers share
  prefill     prompt tokens/s of one prompt until its first token
  decode      tokens/s of n sequences that decode together, first tokens excluded
  poisson     tokens/s of requests with exponential gaps and uniform lengths, from the first arrival to the last token:
              here and in llama.cpp they join and leave the running batch, in genai a batch ends with its longest
  estimate    of these requests: how far the engine's own estimate of the time to first token is off, in the median
  streams     time of four concurrent answers over the time of one
  prefix      time to first token of a prompt seen before over that of one never seen
  outside     share of the time between two runs of ONNX Runtime in which neither runs
  bandwidth   bytes that fp32 decoding with n=1 reads a second, weights and KV, as a share of what the memory gives
  lateness    how late the trio loop wakes a timer while 16 sequences decode, 99th percentile
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nodes.model_tools.llama_onnx import Precision
from nodes.model_tools.random_llama import SIZES
from tests.benchmark.engine import models, rows
from tests.benchmark.engine.rows import GENAI, LLAMA_CPP, OURS
from tests.benchmark.engine.worker import Worker
from tests.benchmark.engine.workload import SHORT_PROMPT_TOKENS, prompt
from tests.benchmark.peers_env import python_of

AGREEMENT_PROMPTS, AGREEMENT_PROMPT_TOKENS = 4, 24


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured. decode_tokens: of each sequence. arrivals_per_s: more than any contestant serves, so that
    batches are full. batch: sequences together in the Poisson row, in every contestant."""

    model: str
    rounds: int
    slow_rounds: int
    batches: tuple[int, ...]
    prefill: int
    decode_tokens: int
    arrivals: int
    arrivals_per_s: float
    lengths: tuple[int, int]
    batch: int
    prefix: int


FULL = Size("200m", 7, 2, (1, 2, 4, 8, 16), 256, 40, 64, 8.0, (16, 256), 8, 800)
QUICK = Size("tiny", 1, 1, (1, 4), 64, 200, 6, 200.0, (4, 16), 4, 200)
SLOTS = 16


def start(precision: Precision, size: Size, options: argparse.Namespace, work: Path) -> dict[str, Worker]:
    """The contestants of one precision, by name."""
    folder = models.graph_folder(work, size.model, precision)

    def worker(name: str, python: Path, module: str, model: Path) -> Worker:
        arguments = ["--model", str(model), "--threads", str(options.threads)]
        return Worker(name, [str(python), "-m", f"tests.benchmark.engine.{module}", *arguments])

    workers = {OURS: worker(OURS, Path(sys.executable), "ours", folder)}
    if options.peers is not None:
        python = python_of(options.peers)
        workers[GENAI] = worker(GENAI, python, "genai_worker", folder)
        file = models.gguf_file(work, size.model, precision, options.peers)
        workers[LLAMA_CPP] = worker(LLAMA_CPP, python, "llama_worker", file)
    return workers


class Bandwidth:
    """One reader on each core."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.benchmark.engine.bandwidth"]
        self._workers = [Worker("bandwidth", command) for _ in range(os.cpu_count() or 1)]

    def bytes_per_s(self) -> float:
        for worker in self._workers:
            worker.tell("read")
        return sum(float(worker.answer()["bytes_per_s"]) for worker in self._workers)

    def close(self) -> None:
        for worker in self._workers:
            worker.close()


class Rounds:
    """Asks contestants in turns and keeps what they answer: figures[measurement][contestant][round]."""

    def __init__(self, workers: dict[str, Worker]) -> None:
        self._workers = workers
        self.figures: dict[str, dict[str, list[dict[str, Any]]]] = {}

    def ask(self, key: str, turn: int, do: str, **arguments: Any) -> None:
        """One round of one measurement, of every contestant; who begins changes with the turn."""
        names = list(self._workers)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            self.ask_one(key, name, do, **arguments)

    def ask_one(self, key: str, name: str, do: str, **arguments: Any) -> None:
        slots = {} if name != OURS or "slots" in arguments else {"slots": SLOTS}
        answer = self._workers[name].ask(do, **arguments, **slots)
        self.figures.setdefault(key, {}).setdefault(name, []).append(answer)

    def of(self, key: str, figure: str) -> dict[str, list[float]]:
        return {
            name: [float(answer[figure]) for answer in answers] for name, answers in self.figures.get(key, {}).items()
        }

    def ours(self, key: str, figure: str) -> list[float]:
        return [float(answer[figure]) for answer in self.figures[key][OURS]]


def measure(precision: Precision, size: Size, workers: dict[str, Worker], wanted: Callable[[str], bool]) -> None:
    """Print the rows of one precision as they are complete."""
    rounds = Rounds(workers)
    if wanted("agreement") and len(workers) > 1:
        show(agreement(precision, workers))
    for key, do in (("prefill", "prefill"), ("decode", "decode")):  # bindings, contexts, pages
        if wanted(key):
            for n in size.batches if do == "decode" else (1,):
                for name, worker in workers.items():
                    arguments = {"tokens": 4, "seed": 1} | ({"n": n} if do == "decode" else {})
                    worker.ask(do, **arguments, **({"slots": SLOTS} if name == OURS else {}))
    bandwidth = Bandwidth() if precision == "fp32" and wanted("bandwidth") else None
    read: list[float] = []
    for turn in range(size.rounds):
        one_round(turn, precision, size, rounds, wanted)
        if bandwidth is not None:
            read.append(bandwidth.bytes_per_s())
        progress(f"{precision}, round {turn + 1} of {size.rounds}")
    if bandwidth is not None:
        bandwidth.close()
    show_rounds(precision, size, rounds, read)
    if wanted("poisson"):
        for turn in range(size.slow_rounds):
            shortest, longest = size.lengths
            lengths = {"shortest": shortest, "longest": longest}
            load = {"count": size.arrivals, "per_s": size.arrivals_per_s, "slots": size.batch, "seed": turn}
            rounds.ask("poisson", turn, "poisson", **load, **lengths)
            progress(f"{precision}, Poisson arrivals, round {turn + 1} of {size.slow_rounds}")
        show(rows.rate_row("poisson", precision, None, rounds.of("poisson", "tokens_per_s")) | {"batch": size.batch})
        errors = rounds.ours("poisson", "estimate_error")
        show({"row": "estimate", "precision": precision, "median_error": round(statistics.median(errors), 3)})


def one_round(turn: int, precision: str, size: Size, rounds: Rounds, wanted: Callable[[str], bool]) -> None:
    seed = 1 + 1000 * turn
    if wanted("prefill"):
        rounds.ask("prefill", turn, "prefill", tokens=size.prefill, seed=seed + 500)
    for n in size.batches:
        if wanted("decode") or (n == 1 and (wanted("bandwidth") or wanted("outside"))):
            rounds.ask(f"decode {n}", turn, "decode", n=n, tokens=size.decode_tokens, seed=seed)
    if wanted("streams"):
        for n in (1, 4):
            rounds.ask_one(f"streams {n}", OURS, "streams", n=n, tokens=size.decode_tokens, seed=seed)
    if wanted("prefix") and turn < size.slow_rounds:
        rounds.ask_one("prefix", OURS, "prefix", shared=size.prefix, seed=seed + 700)
    n = size.batches[-1]
    if wanted("outside"):
        sampling = {"temperature": 1.0, "top_p": 0.95}
        rounds.ask_one("outside", OURS, "decode", n=n, tokens=size.decode_tokens, seed=seed, **sampling)
    if wanted("lateness"):
        rounds.ask_one("lateness", OURS, "lateness", n=n, tokens=2 * size.decode_tokens, seed=seed)


def show_rounds(precision: str, size: Size, rounds: Rounds, read: list[float]) -> None:
    if "prefill" in rounds.figures:
        show(rows.rate_row("prefill", precision, None, rounds.of("prefill", "tokens_per_s")))
    for n in size.batches:
        if f"decode {n}" in rounds.figures:
            show(rows.rate_row("decode", precision, n, rounds.of(f"decode {n}", "tokens_per_s")))
    if "streams 1" in rounds.figures:
        pairs = zip(rounds.ours("streams 4", "seconds"), rounds.ours("streams 1", "seconds"), strict=True)
        ratio = statistics.median(four / one for four, one in pairs)
        show(rows.limit_row("streams", precision, {"n": 4}, ratio, rows.STREAMS_RATIO_MAX))
    if "prefix" in rounds.figures:
        cold, warm = rounds.ours("prefix", "cold_s"), rounds.ours("prefix", "warm_s")
        figures = {"tokens": size.prefix, "cold_ms": 1e3 * statistics.median(cold)}
        figures |= {"warm_ms": 1e3 * statistics.median(warm)}
        ratio = statistics.median(w / c for w, c in zip(warm, cold, strict=True))
        show(rows.limit_row("prefix", precision, rounded(figures), ratio, rows.PREFIX_RATIO_MAX))
    for key, n in (("decode 1", 1), ("outside", size.batches[-1])):
        if "outside" in rounds.figures and n in rows.OUTSIDE_SHARE_MAX:
            figures = {"n": n, "us_per_step": statistics.median(rounds.ours(key, "outside_us"))}
            share = statistics.median(rounds.ours(key, "outside_share"))
            show(rows.limit_row("outside", precision, rounded(figures), share, rows.OUTSIDE_SHARE_MAX[n]))
    if "lateness" in rounds.figures:
        p50, p99 = rounds.ours("lateness", "p50_ms"), rounds.ours("lateness", "p99_ms")
        figures = rounded({"p50_ms": statistics.median(p50), "worst_round_p99_ms": max(p99)})
        show(rows.limit_row("lateness", precision, figures, statistics.median(p99), rows.LATENESS_P99_MS_MAX))
    if read:
        tokens = SHORT_PROMPT_TOKENS + size.decode_tokens // 2
        token_bytes = models.decode_bytes(size.model) + models.kv_bytes(size.model, tokens)
        rates = rounds.of("decode 1", "tokens_per_s")
        bandwidth = rounded({"gb_per_s": statistics.median(read) / 1e9, "token_mb": token_bytes / 1e6})
        shares = {
            name: round(
                statistics.median(rate * token_bytes / total for rate, total in zip(found, read, strict=True)), 3
            )
            for name, found in rates.items()
        }
        is_met = shares[OURS] >= rows.BANDWIDTH_SHARE_MIN
        verdict = {"share": shares, "least": rows.BANDWIDTH_SHARE_MIN, "is_met": is_met}
        show({"row": "bandwidth", "precision": precision, **bandwidth, **verdict})


def agreement(precision: str, workers: dict[str, Worker]) -> dict[str, Any]:
    """How many leading tokens of our greedy answers the others' answers share."""
    tokens = 64
    shared = dict.fromkeys([name for name in workers if name != OURS], 0)
    for seed in range(AGREEMENT_PROMPTS):
        ids = prompt(900 + seed, AGREEMENT_PROMPT_TOKENS)
        ours = workers[OURS].ask("greedy", ids=ids, tokens=tokens, slots=SLOTS)["ids"]
        for name in shared:
            theirs = workers[name].ask("greedy", ids=ids, tokens=tokens)["ids"]
            pairs = enumerate(zip(ours, theirs, strict=True))
            shared[name] += next((index for index, (one, other) in pairs if one != other), tokens)
    return {"row": "agreement", "precision": precision, "tokens": tokens * AGREEMENT_PROMPTS, **shared}


def rounded(figures: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 2) for name, value in figures.items()}


def show(row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)


def progress(what: str) -> None:
    print(f"measured: {what}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, metavar="ENVDIR", help="the environment of genai and llama.cpp")
    parser.add_argument("--work", type=Path, help="where models are made and found again; default: a temporary folder")
    parser.add_argument("--size", choices=sorted(SIZES), help="the model's shape; default 200m")
    parser.add_argument("--precision", choices=models.PRECISIONS, action="append", help="default: both")
    parser.add_argument("--rows", nargs="+", help="only these rows")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--threads", type=int, default=0, help="of every contestant; 0: all cores")
    parser.add_argument("--quick", action="store_true", help="a smoke run on a tiny model")
    options = parser.parse_args()
    size = QUICK if options.quick else FULL
    size = replace(size, model=options.size or size.model, rounds=options.rounds or size.rounds)
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        for precision in options.precision or models.PRECISIONS:
            workers = start(precision, size, options, work)
            try:
                measure(precision, size, workers, lambda row: options.rows is None or row in options.rows)
            finally:
                for worker in workers.values():
                    worker.close()


if __name__ == "__main__":
    main()
