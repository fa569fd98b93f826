"""Measures a model folder against the corpus: `python -m deploy.models.demo.evaluate nodes/models/demo`.

An answer counts when greedy decoding says it word for word, to its end. Needs onnxruntime, tokenizers, numpy and
jinja2, which every node has; no torch. Ends with status 1 when a gate is missed.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
import numpy.typing as npt
import onnxruntime
from tokenizers import Tokenizer

from deploy.models.demo.corpus import FALLBACK, Group, Unrelated, load_groups, load_unrelated
from deploy.models.demo.frames import HELD_OUT, TRAINED

SAMPLE = 500  # questions of the two sets that could be much larger
SEED = 99
ROWS_MAX = 128  # decoded together; more only takes memory


@dataclass(frozen=True, slots=True)
class Asked:
    """A question and the answer it should get."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class QuestionSet:
    """Questions that are measured together. gate is the least share of right answers; None is a figure only."""

    name: str
    gate: float | None
    asked: tuple[Asked, ...]


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one set. misses holds the question and what was said instead."""

    name: str
    gate: float | None
    count: int
    misses: tuple[tuple[Asked, str], ...]

    @property
    def share(self) -> float:
        return 1 - len(self.misses) / self.count

    @property
    def is_passed(self) -> bool:
        return self.gate is None or self.share >= self.gate


class DemoModel:
    """A model folder, opened for greedy batches over one shared past and present buffer."""

    def __init__(self, folder: Path, threads: int = 2) -> None:
        config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]
        decoder = config["decoder"]
        self._end = int(config["eos_token_id"])
        self._kv_shape = (int(decoder["num_key_value_heads"]), int(decoder["head_size"]))
        self._layers = int(decoder["num_hidden_layers"])
        self._vocab = int(config["vocab_size"])
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokens = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        self._template = jinja2.Environment(autoescape=False).from_string(tokens["chat_template"])  # noqa: S701
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(
            str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )

    def prompt(self, question: str) -> list[int]:
        text = self._template.render(messages=[{"role": "user", "content": question}], add_generation_prompt=True)
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def answers(self, questions: Sequence[str], tokens_max: int) -> list[str]:
        """What the model says to each question, greedily, until its end token or tokens_max."""
        prompts = [self.prompt(question) for question in questions]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        said = [""] * len(prompts)
        for start in range(0, len(order), ROWS_MAX):
            rows = order[start : start + ROWS_MAX]
            generated = self._generate([prompts[i] for i in rows], tokens_max)
            for i, ids in zip(rows, generated, strict=True):
                said[i] = self._tokenizer.decode(ids, skip_special_tokens=False)
        return said

    def _generate(self, prompts: list[list[int]], tokens_max: int) -> list[list[int]]:
        """Greedy tokens of each prompt, without the end token. Prompts are sorted by length."""
        heads, head_dim = self._kv_shape
        lengths = np.array([len(prompt) for prompt in prompts])
        capacity = int(lengths.max()) + tokens_max
        past = [
            (f"past_key_values.{layer}.{side}", np.zeros((len(prompts), heads, capacity, head_dim), np.float32))
            for layer in range(self._layers)
            for side in ("key", "value")
        ]
        logits = np.empty((len(prompts), 1, self._vocab), np.float32)

        def run(first: int, ids: npt.NDArray[np.int64], mask: npt.NDArray[np.int64]) -> None:
            rows = len(ids)
            binding = self._session.io_binding()
            binding.bind_input("input_ids", "cpu", 0, np.int64, ids.shape, ids.ctypes.data)
            binding.bind_input("attention_mask", "cpu", 0, np.int64, mask.shape, mask.ctypes.data)
            for name, buffer in past:
                shape, pointer = (rows, *buffer.shape[1:]), buffer[first:].ctypes.data
                binding.bind_input(name, "cpu", 0, np.float32, shape, pointer)
                binding.bind_output(f"present{name[15:]}", "cpu", 0, np.float32, shape, pointer)
            binding.bind_output("logits", "cpu", 0, np.float32, (rows, 1, self._vocab), logits[first:].ctypes.data)
            self._session.run_with_iobinding(binding)

        for length in np.unique(lengths):
            (rows,) = np.nonzero(lengths == length)
            ids = np.array([prompts[row] for row in rows], np.int64)
            run(int(rows[0]), ids, np.ones_like(ids))
        generated = logits[:, 0].argmax(-1)[:, None]
        while generated.shape[1] < tokens_max and not (generated == self._end).any(axis=1).all():
            lengths += 1
            mask = (np.arange(capacity) < lengths[:, None]).astype(np.int64)
            run(0, np.ascontiguousarray(generated[:, -1:]), mask)
            generated = np.concatenate([generated, logits[:, 0].argmax(-1)[:, None]], axis=1)
        return [row[: row.index(self._end)] if self._end in row else row for row in generated.tolist()]


def question_sets(groups: Sequence[Group], unrelated: Unrelated, sample: int = SAMPLE) -> list[QuestionSet]:
    """The sets with their gates; the same questions each time. sample bounds each set."""
    rng = random.Random(SEED)
    about = [group for group in groups if not group.is_smalltalk]
    greetings = [group for group in groups if group.is_smalltalk]
    trained = [
        Asked(_asked(rng.choice(TRAINED[wording.kind]).format(wording.text)), group.answer)
        for group in about
        for wording in group.wordings
        if wording.kind != "L"
    ]
    framed = [
        Asked(_asked(rng.choice(HELD_OUT[wording.kind]).format(wording.text)), group.answer)
        for group in about
        for wording in group.wordings
        if wording.kind != "L"
    ]
    greeted = [Asked(text, group.answer) for group in greetings for text in group.held_out]
    paraphrased = [Asked(_asked(text), group.answer) for group in about for text in group.held_out]

    def some(asked: Sequence[Asked]) -> tuple[Asked, ...]:
        return tuple(asked if len(asked) <= sample else rng.sample(asked, sample))

    return [
        QuestionSet("trained wordings", 0.95, some(trained)),
        QuestionSet("new frames around known wordings", 0.90, some(framed)),
        QuestionSet("unrelated questions", 0.92, some([Asked(text, FALLBACK) for text in unrelated.held_out])),
        QuestionSet("near-domain unrelated", 0.85, some([Asked(text, FALLBACK) for text in unrelated.held_out_near])),
        QuestionSet("greetings", 0.85, some(greeted)),
        QuestionSet("paraphrases with new words", None, some(paraphrased)),
    ]


def measure(model: DemoModel, questions: QuestionSet, tokens_max: int) -> Result:
    said = model.answers([asked.question for asked in questions.asked], tokens_max)
    misses = tuple((a, text) for a, text in zip(questions.asked, said, strict=True) if text != a.answer)
    return Result(questions.name, questions.gate, len(questions.asked), misses)


def answer_tokens_max(model: DemoModel, groups: Sequence[Group]) -> int:
    """Tokens of the longest answer, with a few to spare for seeing that one goes on too long."""
    return max(len(model.prompt(group.answer)) for group in groups) + 4


def table(results: Sequence[Result]) -> str:
    lines = ["| questions | number | answered rightly | gate | |", "|---|---|---|---|---|"]
    for result in results:
        gate = "none" if result.gate is None else f"{result.gate:.0%}"
        verdict = "" if result.gate is None else "passed" if result.is_passed else "MISSED"
        lines.append(f"| {result.name} | {result.count} | {result.share:.1%} | {gate} | {verdict} |")
    return "\n".join(lines)


def _asked(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sample", type=int, default=SAMPLE, help="questions a set at most")
    parser.add_argument("--misses", action="store_true", help="print every question that was answered wrongly")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    began = time.monotonic()
    groups = load_groups()
    model = DemoModel(arguments.folder, arguments.threads)
    tokens_max = answer_tokens_max(model, groups)
    results = [
        measure(model, questions, tokens_max) for questions in question_sets(groups, load_unrelated(), arguments.sample)
    ]
    if arguments.misses:
        names = {group.answer: group.name for group in groups} | {FALLBACK: "fallback"}
        for result in results:
            for asked, said in result.misses:
                print(f"{result.name}: {asked.question!r} wants {names[asked.answer]}, got {names.get(said, said)}")
    print(table(results))
    wordings = sum(len(group.wordings) for group in groups)
    print(f"{len(groups)} answers, {wordings} trained wordings, {time.monotonic() - began:.0f} s")
    sys.exit(0 if all(result.is_passed for result in results) else 1)


if __name__ == "__main__":
    main()
