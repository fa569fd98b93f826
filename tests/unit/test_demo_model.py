"""The built-in model: its corpus is sound, its generator replays, and the shipped folder passes its gates."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from deploy.models.demo.corpus import (
    CORPUS,
    FALLBACK,
    Group,
    Unrelated,
    load_groups,
    load_synonyms,
    load_unrelated,
    normalise,
    problems,
)
from deploy.models.demo.evaluate import DemoModel, answer_tokens_max, measure, question_sets
from deploy.models.demo.frames import HELD_OUT, TRAINED
from deploy.models.demo.generate import FALLBACK_GROUP, Generator

FOLDER = Path(__file__).parents[2] / "nodes" / "models" / "demo"
FOLDER_BYTES_MAX = 18_000_000
SAMPLE = 200
ABOUT_GROUPS_MIN = 150


@pytest.fixture(scope="module")
def groups() -> list[Group]:
    return load_groups()


@pytest.fixture(scope="module")
def unrelated() -> Unrelated:
    return load_unrelated()


@pytest.fixture(scope="module")
def model() -> DemoModel:
    return DemoModel(FOLDER)


def generator(groups: Sequence[Group], unrelated: Unrelated, seed: int) -> Generator:
    return Generator(groups, unrelated, load_synonyms(), random.Random(seed))


def test_corpus_keeps_its_rules(groups: list[Group], unrelated: Unrelated) -> None:
    assert problems(groups, unrelated) == []


def test_corpus_answers_enough_questions_and_measures_enough(groups: list[Group], unrelated: Unrelated) -> None:
    about = [group for group in groups if not group.is_smalltalk]
    assert len(about) >= ABOUT_GROUPS_MIN
    gated = {questions.name: len(questions.asked) for questions in question_sets(groups, unrelated)}
    assert min(gated.values()) >= 200, gated


def test_a_wording_in_two_groups_is_found(groups: list[Group], unrelated: Unrelated) -> None:
    first, second = groups[:2]
    shared = Group(second.name, second.answer, (*second.wordings, first.wordings[0]), second.held_out)
    assert any("stands in" in problem for problem in problems([first, shared], unrelated))


def test_a_held_out_wording_that_is_trained_is_found(groups: list[Group], unrelated: Unrelated) -> None:
    leaking = Group(groups[0].name, groups[0].answer, groups[0].wordings, (groups[0].wordings[0].text.upper(), "x"))
    assert any("is held out" in problem for problem in problems([leaking], unrelated))


def test_a_line_that_cannot_be_read_is_refused_with_its_file(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_text("[one]\nA: An answer.\nZ: what is this\n")
    with pytest.raises(ValueError, match=r"bad\.txt"):
        load_groups(tmp_path)


def test_wordings_for_a_group_without_answer_are_refused(tmp_path: Path) -> None:
    (tmp_path / "lost.txt").write_text("[lost]\nQ: what is this\n")
    with pytest.raises(ValueError, match="lost"):
        load_groups(tmp_path)


def test_no_frame_is_trained_and_held_out() -> None:
    for kind, frames in HELD_OUT.items():
        assert not set(frames) & set(TRAINED[kind])
        assert all(frame.count("{}") == 1 for frame in (*frames, *TRAINED[kind]))


def test_verbs_of_the_synonyms_are_inflected() -> None:
    sets = load_synonyms()
    assert any({"starts", "launches", "boots"} <= set(words) for words in sets)
    assert any({"stopping", "shutting down"} <= set(words) for words in sets)


def test_generator_replays_from_its_seed(groups: list[Group], unrelated: Unrelated) -> None:
    first, second, other = (generator(groups, unrelated, seed) for seed in (7, 7, 8))
    drawn = [first.example() for _ in range(200)]
    assert drawn == [second.example() for _ in range(200)]
    assert drawn != [other.example() for _ in range(200)]


def test_generator_fills_every_slot_and_never_draws_held_out_text(groups: list[Group], unrelated: Unrelated) -> None:
    held_out = {normalise(text) for group in groups for text in group.held_out}
    held_out |= {normalise(text) for text in (*unrelated.held_out, *unrelated.held_out_near)}
    source = generator(groups, unrelated, 1)
    examples = [source.example() for _ in range(5000)]
    slots = {f"{{{slot}}}" for slot in (*unrelated.words, "number")}
    assert not [example for example in examples if any(slot in example.question for slot in slots)]
    assert not [example for example in examples if normalise(example.question) in held_out]
    assert {example.group for example in examples} >= {FALLBACK_GROUP, 0, len(groups) - 1}


def test_shipped_folder_is_small_and_complete() -> None:
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert {"genai_config.json", "model.onnx", "tokenizer.json", "tokenizer_config.json"} <= files.keys()
    assert sum(files.values()) <= FOLDER_BYTES_MAX


def test_chat_template_renders_only_the_last_user_message(model: DemoModel) -> None:
    template = json.loads((FOLDER / "tokenizer_config.json").read_text())["chat_template"]
    import jinja2

    environment = jinja2.Environment(autoescape=True)
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "how do I add a node"},
    ]
    rendered = environment.from_string(template).render(messages=messages, add_generation_prompt=True)
    alone = environment.from_string(template).render(messages=messages[-1:], add_generation_prompt=True)
    assert rendered == alone
    assert "how do I add a node" in rendered


@pytest.mark.parametrize("index", range(5), ids=["trained", "frames", "unrelated", "near", "greetings"])
def test_shipped_model_passes_its_gate(model: DemoModel, groups: list[Group], unrelated: Unrelated, index: int) -> None:
    questions = question_sets(groups, unrelated, SAMPLE)[index]
    result = measure(model, questions, answer_tokens_max(model, groups))
    assert result.is_passed, f"{result.name}: {result.share:.1%} of {result.count}, gate {result.gate:.0%}"


def test_fallback_names_the_command_that_serves_a_real_model() -> None:
    assert "ai-cluster serve --model PATH" in FALLBACK
    assert CORPUS.is_dir()
