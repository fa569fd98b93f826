"""Samples training examples from the corpus: a question as somebody might type it, and the group that answers it.

Every choice comes from the random.Random that is passed in, so a seed replays a training. Held-out text is never
drawn: where a lost word or a synonym turns a trained wording into a held-out one by chance, the draw is repeated.
"""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from deploy.models.demo.corpus import Group, Unrelated, Wording, normalise
from deploy.models.demo.frames import AFTER, BEFORE, TRAINED

FALLBACK_GROUP = -1

UNRELATED_SHARE = 0.39  # of all examples
SMALLTALK_WEIGHT = 2  # greetings are asked literally, with many wordings each
RARE_WORD_GROUPS_MAX = 6  # a word that stands in at most so many groups points at its answer
SYNONYM_WORDS_MAX = 3  # the longest phrase that synonyms.txt replaces

LETTERS = ("bcdfghjklmnpqrstvwxz", "aeiou", "asdfghjkl", "qwertyuiop", "0123456789")
ENDINGS = ("?",) * 55 + (" ?",) * 4 + (".",) * 5 + ("??",) * 2 + ("!",) * 3 + ("",) * 31


@dataclass(frozen=True, slots=True)
class Example:
    """A question and the index of its group, or FALLBACK_GROUP."""

    question: str
    group: int


class Generator:
    """Draws examples without end. One generator serves one training; it is not shared between threads."""

    def __init__(
        self,
        groups: Sequence[Group],
        unrelated: Unrelated,
        synonyms: Sequence[tuple[str, ...]],
        rng: random.Random,
        unrelated_share: float = UNRELATED_SHARE,
    ) -> None:
        self._unrelated_share = unrelated_share
        self._groups = groups
        self._unrelated = unrelated
        self._rng = rng
        self._weights = [SMALLTALK_WEIGHT if group.is_smalltalk else 1 for group in groups]
        self._synonyms: dict[str, list[str]] = defaultdict(list)
        for words in synonyms:
            for word in words:
                self._synonyms[word.lower()] += [other for other in words if other != word]
        self._noise = [word for words in unrelated.words.values() for word in words]
        groups_of_word = Counter(
            word for group in groups for word in {w for x in group.wordings for w in normalise(x.text).split()}
        )
        self._rare = {word for word, count in groups_of_word.items() if count <= RARE_WORD_GROUPS_MAX}
        self._known = set(groups_of_word)
        held_out = [text for group in groups for text in group.held_out]
        self._held_out = {normalise(text) for text in (*held_out, *unrelated.held_out, *unrelated.held_out_near)}

    def example(self) -> Example:
        while True:
            example = self._draw()
            if normalise(example.question) not in self._held_out:
                return example

    def _draw(self) -> Example:
        if self._rng.random() < self._unrelated_share:
            return Example(self.unrelated(), FALLBACK_GROUP)
        (index,) = self._rng.choices(range(len(self._groups)), self._weights)
        return Example(self.related(self._groups[index]), index)

    def related(self, group: Group) -> str:
        """One way to ask for the group's answer."""
        rng = self._rng
        wording = rng.choice(group.wordings)
        if wording.kind == "L":
            return self._surface(wording.text, strength=0.6)
        text = wording.text
        dice = rng.random()
        if dice < 0.06:
            other = rng.choice(group.wordings)
            return self._surface(self._splice(text, other.text))
        if dice < 0.11:
            return self._surface(self._keywords(group, wording))
        if dice < 0.20:
            return self._surface(self._from_answer(group, wording))
        if rng.random() < 0.6:
            text = self._synonym(text, rng.choice((0.1, 0.25, 0.5)))
        text = rng.choice(TRAINED[wording.kind]).format(text)
        return self._surface(self._affix(text))

    def unrelated(self) -> str:
        """A question that the fallback answers."""
        dice = self._rng.random()
        if dice < 0.40:
            text = self._fill(self._rng.choice(self._unrelated.frames))
        elif dice < 0.68:
            text = self._rng.choice(self._unrelated.sentences)
        elif dice < 0.86:
            text = self._displaced()
        elif dice < 0.93:
            kind = self._rng.choice("HWQ")
            words = {"H": "{verb} {noun}", "W": "{noun}", "Q": self._rng.choice(self._unrelated.frames)}[kind]
            text = self._rng.choice(TRAINED[kind]).format(self._fill(words))
        else:
            text = " ".join(
                self._gibberish() if self._rng.random() < 0.4 else self._rng.choice(self._noise)
                for _ in range(self._rng.randint(1, 5))
            )
        return self._surface(text)

    def _splice(self, text: str, other: str) -> str:
        """The beginning of one wording and the end of another of the same group, or both after one another."""
        if self._rng.random() < 0.4:
            return f"{text}{self._rng.choice((', ', '. ', ' - ', ' '))}{other}"
        first, second = text.split(), other.split()
        return " ".join(
            first[: self._rng.randint(len(first) // 2, len(first))]
            + second[self._rng.randint(0, (len(second) + 1) // 2) :]
        )

    def _keywords(self, group: Group, wording: Wording) -> str:
        """The words that point at the answer, as one types them into a search box."""
        words = [word for word in wording.text.split() if normalise(word) in self._rare]
        if len(words) < 2:
            more = self._rng.choice(group.wordings).text.split()
            words += [word for word in more if normalise(word) in self._rare and word not in words]
        if len(words) < 2:
            return wording.text
        if self._rng.random() < 0.3:
            self._rng.shuffle(words)
        return " ".join(words)

    def _from_answer(self, group: Group, wording: Wording) -> str:
        """A question with words of the answer: whoever knows half of it asks with them."""
        rng = self._rng
        words = re.sub(r"[`,.;:()]", " ", group.answer).split()
        dice = rng.random()
        if dice < 0.33:
            start = rng.randrange(len(words))
            return " ".join(words[start : start + rng.randint(3, 8)])
        telling = [word for word in words if word.lower() in self._rare or word.lower() not in self._known]
        if dice < 0.66 and len(telling) >= 2:
            return " ".join(rng.sample(telling, min(len(telling), rng.randint(2, 4))))
        asked = wording.text.split()
        for word in rng.sample(words, min(len(words), rng.randint(1, 3))):
            asked.insert(rng.randint(0, len(asked)), word)
        return " ".join(asked)

    def _displaced(self) -> str:
        """A wording about AI Cluster whose telling words are exchanged for others: its frame alone says nothing."""
        wording = self._rng.choice(self._rng.choice(self._groups).wordings)
        kind = "Q" if wording.kind == "L" else wording.kind
        words = self._rng.choice(TRAINED[kind]).format(wording.text).split()
        spots = [i for i, word in enumerate(words) if normalise(word) in self._rare]
        if not spots:
            return self._fill(self._rng.choice(self._unrelated.frames))
        for spot in spots:
            words[spot] = self._rng.choice(self._noise)
        return " ".join(
            self._rng.choice(self._noise) if w.lower() in {"cluster", "node", "nodes", "mesh"} else w for w in words
        )

    def _fill(self, frame: str) -> str:
        return re.sub(r"\{([a-z]+)\d*\}", lambda match: self._slot(match[1]), frame)

    def _slot(self, name: str) -> str:
        return str(self._rng.randint(0, 999)) if name == "number" else self._rng.choice(self._unrelated.words[name])

    def _gibberish(self) -> str:
        rng = self._rng
        return "".join(rng.choice(rng.choice(LETTERS)) for _ in range(rng.randint(2, 11)))

    def _synonym(self, text: str, share: float) -> str:
        words, out = text.split(), []
        position = 0
        while position < len(words):
            for length in range(min(SYNONYM_WORDS_MAX, len(words) - position), 0, -1):
                phrase = " ".join(words[position : position + length])
                choices = self._synonyms.get(phrase.lower())
                if choices and self._rng.random() < share:
                    out.append(self._rng.choice(choices))
                    position += length
                    break
            else:
                out.append(words[position])
                position += 1
        return " ".join(out)

    def _affix(self, text: str) -> str:
        if self._rng.random() < 0.15:
            text = self._rng.choice(BEFORE) + text
        if self._rng.random() < 0.15:
            text += self._rng.choice(AFTER)
        return text

    def _surface(self, text: str, strength: float = 1.0) -> str:
        """How people type: case, a word lost or too many, slips of the finger, punctuation."""
        rng = self._rng
        dice = rng.random()
        if dice < 0.45:
            text = text.lower()
        elif dice < 0.78:
            text = text[:1].upper() + text[1:]
        words = text.split(" ")
        if len(words) > 3:
            if rng.random() < 0.10 * strength:
                del words[rng.randrange(len(words))]
            if rng.random() < 0.07 * strength:
                spots = [i for i, word in enumerate(words) if normalise(word) not in self._rare]
                if spots:
                    words[rng.choice(spots)] = rng.choice(self._noise)
            if rng.random() < 0.06 * strength:
                words.insert(rng.randrange(len(words)), rng.choice(self._noise))
        text = " ".join(words)
        if rng.random() < 0.12 * strength:
            for _ in range(rng.choice((1, 1, 2))):
                text = self._typo(text)
        return text + rng.choice(ENDINGS)

    def _typo(self, text: str) -> str:
        rng = self._rng
        if len(text) < 5:
            return text
        i, dice = rng.randrange(1, len(text) - 1), rng.random()
        if text[i] in "/_0123456789":
            return text
        if dice < 0.3:
            return text[:i] + text[i + 1 :]
        if dice < 0.55:
            return text[:i] + text[i + 1] + text[i] + text[i + 2 :]
        if dice < 0.75:
            return text[:i] + text[i] + text[i:]
        return text[:i] + rng.choice("abcdefghijklmnoprstuvwy") + text[i + 1 :]
