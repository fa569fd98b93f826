"""Reads the corpus: what the model is asked and what it says. The only place that knows the file format.

One group of a file is one answer: `[name]`, `A:` the answer, then wordings separated by `|` on lines that begin with
H (fits "how do I ..."), W (fits "what is ..."), Q (a whole question), L (literal, gets no frame: greetings) or
X (held out: never trained, only measured). A group without an answer adds its wordings to the group of that name.
"""

import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
FALLBACK = (
    "I am a small built-in model that only knows AI Cluster, so I cannot answer that. "
    "For anything else, serve a real model with `ai-cluster serve --model PATH`."
)

WORDINGS_MIN = 20  # independent wordings an answer needs before new ones are understood
HELD_OUT_MIN = 2
ANSWER_WORDS_MAX = 60  # keeps answers to one short paragraph and the training within its time


@dataclass(frozen=True, slots=True)
class Wording:
    """One way to ask. kind is the letter of its line."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Group:
    """One answer and the wordings that lead to it; held_out is never trained."""

    name: str
    answer: str
    wordings: tuple[Wording, ...]
    held_out: tuple[str, ...]

    @property
    def is_smalltalk(self) -> bool:
        return any(wording.kind == "L" for wording in self.wordings)


@dataclass(frozen=True, slots=True)
class Unrelated:
    """What the fallback answers. words maps a slot of a frame, such as noun, to what may fill it."""

    frames: tuple[str, ...]
    sentences: tuple[str, ...]
    words: dict[str, tuple[str, ...]]
    held_out: tuple[str, ...]
    held_out_near: tuple[str, ...]


def load_groups(folder: Path = CORPUS) -> list[Group]:
    """All groups of the folder's files, in the order of file names. Raises ValueError with file and line."""
    read = [group for path in sorted(folder.glob("*.txt")) for group in _read_groups(path)]
    groups = {group.name: group for group in read if group.answer}
    for more in (group for group in read if not group.answer):
        group = groups.get(more.name)
        if group is None:
            raise ValueError(f"no group {more.name!r} has an answer")
        wordings = tuple(dict.fromkeys(group.wordings + more.wordings))
        groups[group.name] = replace(group, wordings=wordings, held_out=group.held_out + more.held_out)
    if len(groups) != sum(1 for group in read if group.answer):
        raise ValueError("two groups have one name")
    return list(groups.values())


def load_unrelated(folder: Path = CORPUS / "unrelated") -> Unrelated:
    lines = {path.stem: _read_lines(path) for path in sorted(folder.glob("*.txt"))}
    return Unrelated(
        frames=lines.pop("frames"),
        sentences=lines.pop("sentences"),
        held_out=lines.pop("heldout_unrelated"),
        held_out_near=lines.pop("heldout_near"),
        words={name.removesuffix("s") if not name.endswith("ies") else name[:-3] + "y": v for name, v in lines.items()},
    )


def load_synonyms(path: Path = Path(__file__).parent / "synonyms.txt") -> list[tuple[str, ...]]:
    """Sets of words that may stand for each other. A line that begins with `v:` gives verbs, whose forms are added."""
    sets: list[tuple[str, ...]] = []
    for line in _read_lines(path):
        items = tuple(item.strip() for item in line.removeprefix("v:").split("|"))
        sets.append(items)
        if line.startswith("v:"):
            sets += [tuple(_inflect(item, form) for item in items) for form in ("s", "ing")]
    return sets


def normalise(text: str) -> str:
    """What decides whether two wordings are the same: letters and digits only, in lower case."""
    return " ".join(re.findall(r"\w+", text.lower()))


def problems(groups: list[Group], unrelated: Unrelated) -> list[str]:
    """One sentence for each rule of the corpus that is broken; empty when it is sound."""
    found = [f"two groups are called {name}" for name, count in Counter(g.name for g in groups).items() if count > 1]
    found += [
        f"two groups give the answer {a!r}" for a, count in Counter(g.answer for g in groups).items() if count > 1
    ]
    owner: dict[str, str] = {}
    for group in groups:
        if len(group.wordings) < WORDINGS_MIN:
            found.append(f"{group.name} has {len(group.wordings)} wordings, fewer than {WORDINGS_MIN}")
        if len(group.held_out) < HELD_OUT_MIN:
            found.append(f"{group.name} has {len(group.held_out)} held-out wordings, fewer than {HELD_OUT_MIN}")
        if not 2 <= len(group.answer.split()) <= ANSWER_WORDS_MAX:
            found.append(f"the answer of {group.name} has {len(group.answer.split())} words")
        for wording in group.wordings:
            key = normalise(wording.text)
            if owner.setdefault(key, group.name) != group.name:
                found.append(f"{wording.text!r} stands in {owner[key]} and in {group.name}")
    trained = owner | {normalise(text): "the unrelated sentences" for text in unrelated.sentences}
    held_out = [(text, group.name) for group in groups for text in group.held_out]
    held_out += [(text, "the unrelated lists") for text in (*unrelated.held_out, *unrelated.held_out_near)]
    for text, where in held_out:
        if normalise(text) in trained:
            found.append(f"{text!r} is held out in {where} but trained in {trained[normalise(text)]}")
    slots = {slot for frame in unrelated.frames for slot in re.findall(r"\{([a-z]+)\d*\}", frame)}
    found += [f"no list fills the slot {slot}" for slot in sorted(slots - unrelated.words.keys() - {"number"})]
    return found


def _read_groups(path: Path) -> list[Group]:
    groups: list[Group] = []
    for block in re.split(r"\n(?=\[)", "\n" + path.read_text(encoding="utf-8")):
        name, answer = "", ""
        wordings: list[Wording] = []
        held_out: list[str] = []
        for line in (line.strip() for line in block.splitlines()):
            letter, colon, rest = line.partition(":")
            items = [item.strip() for item in rest.split("|") if item.strip()]
            if not line or line.startswith("#"):
                continue
            if line.startswith("[") and line.endswith("]"):
                name = line[1:-1]
            elif colon and letter == "A":
                answer = rest.strip()
            elif colon and letter == "X":
                held_out += items
            elif colon and letter in {"H", "W", "Q", "L"}:
                wordings += [Wording(letter, item) for item in items]
            else:
                raise ValueError(f"{path.name}: cannot read the line {line!r} of group {name!r}")
        if name:
            groups.append(Group(name, answer, tuple(dict.fromkeys(wordings)), tuple(dict.fromkeys(held_out))))
    return groups


def _read_lines(path: Path) -> tuple[str, ...]:
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return tuple(dict.fromkeys(line for line in lines if line and not line.startswith("#")))


def _inflect(phrase: str, ending: str) -> str:
    """The verb that begins phrase with -s or -ing; English spelling, as far as it is regular."""
    verb, space, rest = phrase.partition(" ")
    if ending == "ing":
        if verb.endswith("e") and not verb.endswith(("ee", "ie")):
            verb = verb[:-1]
        elif verb.endswith("ie"):
            verb = verb[:-2] + "y"
        elif re.fullmatch(r"[^aeiou]*[aeiou][bdgmnprt]", verb):
            verb += verb[-1]
        return f"{verb}ing{space}{rest}"
    if verb.endswith(("s", "x", "ch", "sh", "o")):
        return f"{verb}es{space}{rest}"
    if re.search(r"[^aeiou]y$", verb):
        return f"{verb[:-1]}ies{space}{rest}"
    return f"{verb}s{space}{rest}"
