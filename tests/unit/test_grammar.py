"""Grammars: whatever the logits say, the text is what the grammar asks for, and a fault ends one sequence only."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from nodes.engine import grammar
from nodes.engine.grammar import (
    REASON_CHARS_MAX,
    GrammarCompiler,
    GrammarInvalid,
    GrammarMatcher,
    GrammarUnavailable,
    MaskWorker,
)
from nodes.engine.sampler import INVALID, sample
from nodes.engine.sampling import GrammarSpec, SamplingParams, SamplingState
from nodes.engine.tokenizer import Tokenizer
from nodes.model_tools.random_llama import BOS, IM_END, small_tokenizer

SMALL_JSON = small_tokenizer(512).to_str()
SMALL = Tokenizer(small_tokenizer(512))
WIDTH = 520  # of a row of logits: a few more than the tokenizer has ids
EOS = frozenset({IM_END, BOS})
DEMO_PATH = Path(grammar.__file__).parents[1] / "models" / "demo" / "tokenizer.json"
PROMPT = [5, 6, 7]
TOKENS_MAX = 400

COMPILER = GrammarCompiler(SMALL_JSON, WIDTH, EOS)
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
OVERLAPPING = {"oneOf": [{"type": "string"}, {"minLength": 2}]}
IN_A_DEFINITION = {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}], "$defs": {"a": {}, "b": OVERLAPPING}}
CHOICES = ["yes", "no", "no, never", "😀\n\x7f", 'say "hi"', "a\\b/c"]


def is_person(text: str) -> bool:
    person = json.loads(text)
    return (
        {"name", "age"} <= person.keys() <= {"name", "age", "tags"}
        and len(person["name"]) <= 12
        and 0 <= person["age"] <= 150
        and len(person.get("tags", [])) <= 3
        and set(person.get("tags", [])) <= {"a", "b"}
    )


SPECS: dict[str, tuple[GrammarSpec, Callable[[str], object]]] = {
    "json_object": (GrammarSpec("json_object"), lambda text: isinstance(json.loads(text), dict)),
    "json_schema": (GrammarSpec("json_schema", json.dumps(PERSON)), is_person),
    "regex": (
        GrammarSpec("regex", r"[a-z]{2,5}-é[0-9]+(/x|😀)?"),
        re.compile(r"[a-z]{2,5}-é[0-9]+(/x|😀)?").fullmatch,
    ),
    "choice": (GrammarSpec("choice", json.dumps(CHOICES)), CHOICES.__contains__),
    "grammar": (
        GrammarSpec("grammar", 'start: sum\nsum: NUMBER ("+" NUMBER)*\nNUMBER: /[0-9]{1,3}/'),
        re.compile(r"[0-9]{1,3}(\+[0-9]{1,3})*").fullmatch,
    ),
}
each_kind = pytest.mark.parametrize("kind", SPECS)


def state_of(spec: GrammarSpec, compiler: GrammarCompiler = COMPILER, **params: object) -> SamplingState:
    options = SamplingParams(grammar=spec, **params)  # type: ignore[arg-type]
    return SamplingState(options, PROMPT, EOS, matcher=compiler.compile(spec))


def closing_bias(tokenizer: Tokenizer, width: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """1 for tokens that help a text to its end, or random logits would hardly ever close a string."""
    return np.array([float((tokenizer.token(i) or "")[:1] in set('"}]')) for i in range(width)], np.float32)


def generate(
    state: SamplingState, rng_seed: int, tokenizer: Tokenizer = SMALL, width: int = WIDTH, eos: frozenset[int] = EOS
) -> list[int]:
    """Sample over logits that are a function of the position, as a model's are of the tokens, until the end."""
    answer: list[int] = []
    closing = closing_bias(tokenizer, width)
    while state.generated < TOKENS_MAX:
        rng = np.random.default_rng([rng_seed, state.position])
        logits = rng.normal(0, 4, width).astype(np.float32) + closing * np.float32(0.2 * state.generated)
        logits[sorted(eos)] += np.float32(0.2 * state.generated)
        token_id = sample(logits[None], [state])[0].token_id
        assert token_id != INVALID, state.error
        if token_id in eos:
            return answer
        answer.append(token_id)
        state.accept(token_id)
    raise AssertionError(f"no end after {TOKENS_MAX} tokens: {tokenizer.decode(answer)!r}")


@each_kind
@pytest.mark.parametrize("temperature", [0.0, 1.0, 30.0])
def test_random_logits_become_a_text_of_the_grammar(kind: str, temperature: float) -> None:
    spec, is_valid = SPECS[kind]
    for seed in range(4):
        text = SMALL.decode(generate(state_of(spec, temperature=temperature, seed=seed), seed))
        assert is_valid(text), text


@each_kind
def test_the_demo_models_tokenizer_knows_every_kind(kind: str) -> None:
    tokenizer = Tokenizer.from_file(DEMO_PATH)
    width, eos = tokenizer.vocabulary_size, frozenset({1})
    compiler = GrammarCompiler(DEMO_PATH.read_text(encoding="utf-8"), width, eos)
    spec, is_valid = SPECS[kind]
    options = SamplingParams(grammar=spec, top_p=0.9, seed=3)
    state = SamplingState(options, PROMPT, eos, matcher=compiler.compile(spec))
    text = tokenizer.decode(generate(state, 5, tokenizer, width, eos))
    assert is_valid(text), text


@each_kind
def test_a_sequence_that_goes_on_elsewhere_goes_on_alike(kind: str) -> None:
    spec, _ = SPECS[kind]
    whole = generate(state_of(spec, seed=9), 1)
    elsewhere = GrammarCompiler(SMALL_JSON, WIDTH, EOS)
    for cut in {0, 1, len(whole) // 2, len(whole)}:
        state = state_of(spec, elsewhere, seed=9)
        for token_id in whole[:cut]:
            state.accept(token_id)
        assert generate(state, 1) == whole[cut:]


@pytest.mark.parametrize("params", [{"ignore_eos": True}, {"min_tokens": 50}], ids=["ignore_eos", "min_tokens"])
def test_a_complete_answer_ends_whatever_the_params_say(params: dict[str, object]) -> None:
    spec = GrammarSpec("choice", '["yes"]')
    assert SMALL.decode(generate(state_of(spec, **params), 1)) == "yes"
    assert state_of(spec, **params).ignores_eos is False


def test_min_tokens_keeps_an_answer_going_that_could_end() -> None:
    spec = GrammarSpec("regex", "a+")
    assert len(SMALL.decode(generate(state_of(spec, min_tokens=20), 1))) >= 20


def test_every_end_is_allowed_where_the_answer_may_end_and_nowhere_else() -> None:
    state = state_of(GrammarSpec("regex", "(ab)+"))
    matcher = state.matcher
    assert matcher is not None
    a, b = SMALL.encode("a")[0], SMALL.encode("b")[0]

    def allowed() -> list[int]:
        row = np.zeros(WIDTH, np.float32)
        matcher.prepare()
        matcher.forbid(row)
        return np.flatnonzero(row == 0).tolist()

    assert allowed() == [a]
    state.accept(a)
    assert allowed() == [b]
    state.accept(b)
    assert allowed() == [*sorted(EOS), a]
    assert not matcher.must_end


def test_a_complete_grammar_allows_the_end_alone() -> None:
    state = state_of(GrammarSpec("choice", '["ab"]'))
    assert state.matcher is not None
    for token_id in SMALL.encode("ab"):
        state.matcher.prepare()
        assert not state.matcher.must_end
        state.accept(token_id)
    state.matcher.prepare()
    assert state.matcher.must_end
    row = np.zeros(WIDTH, np.float32)
    state.matcher.forbid(row)
    assert np.flatnonzero(row == 0).tolist() == sorted(EOS)


def test_masks_of_many_and_of_few_tokens_forbid_the_same() -> None:
    """Whichever way a mask is applied; ids beyond the tokenizer's are never allowed."""
    matcher = COMPILER.compile(GrammarSpec("regex", ".*"))
    matcher.prepare()
    rows = np.zeros((2, WIDTH + 3), np.float32)
    matcher.forbid(rows[0])
    assert matcher._allowed_ids is None
    matcher._allowed_ids = np.flatnonzero(rows[0] == 0)
    matcher.forbid(rows[1])
    assert (rows[0] == rows[1]).all()
    assert set(np.flatnonzero(rows[0] == 0).tolist()) <= set(range(512))


def test_a_token_that_the_grammar_forbids_ends_that_sequence_alone() -> None:
    states = [state_of(GrammarSpec("regex", "[ab]+"), temperature=0) for _ in range(2)]
    states[0].accept(SMALL.encode("z")[0])
    logits = np.zeros((2, WIDTH), np.float32)
    sampled = sample(logits, states)
    assert sampled[0].token_id == INVALID
    assert states[0].error is not None
    assert "does not take token" in states[0].error
    assert "\n" not in states[0].error
    assert sampled[1].token_id == SMALL.encode("a")[0]
    assert states[1].error is None
    states[0].accept(4)  # to no further harm
    assert sample(logits, states)[0].token_id == INVALID


@pytest.mark.parametrize("token_id", [-1, WIDTH + 5, 2**40])
def test_a_token_that_no_vocabulary_has_ends_the_sequence(token_id: int) -> None:
    state = state_of(GrammarSpec("json_object"))
    state.accept(token_id)
    assert state.error is not None


def test_a_mask_that_fails_ends_the_sequence_and_the_grammar_is_compiled_anew() -> None:
    compiler, spec = GrammarCompiler(SMALL_JSON, WIDTH, EOS), GrammarSpec("json_object")
    matcher = compiler.compile(spec)
    matcher._matcher.consume_token(SMALL.encode("z")[0])  # as a limit reached inside does
    matcher.prepare()
    assert matcher.error is not None
    broken = matcher._compiled
    assert compiler.compile(spec)._compiled is not broken
    assert compiler.compile(spec).error is None


class Panic(BaseException):
    """As PyO3 raises where Rust panics: no Exception."""


def panic(*args: object, **kwargs: object) -> None:
    raise Panic("index out of bounds")


def test_a_panic_inside_the_library_ends_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    states = [state_of(GrammarSpec("regex", "[ab]+"), temperature=0) for _ in range(3)]

    class PanickingMatcher:
        consume_token = unsafe_compute_mask_ptr = panic

    for state in states[:2]:
        assert state.matcher is not None
        monkeypatch.setattr(state.matcher, "_matcher", PanickingMatcher())
    states[0].accept(4)
    sampled = sample(np.zeros((3, WIDTH), np.float32), states)
    assert [token.token_id for token in sampled] == [INVALID, INVALID, SMALL.encode("a")[0]]
    assert all("index out of bounds" in str(state.error) for state in states[:2])

    monkeypatch.setattr(grammar, "_llguidance_grammar", panic)
    with pytest.raises(GrammarInvalid, match="index out of bounds"):
        GrammarCompiler(SMALL_JSON, WIDTH, EOS).compile(GrammarSpec("grammar", "start: nothing"))


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (GrammarSpec("json_schema", "{"), "the text is no JSON"),
        (GrammarSpec("json_schema", "[1]"), "a schema is a JSON object"),
        (GrammarSpec("json_schema", '{"type": "nope"}'), "Invalid type"),
        (GrammarSpec("json_schema", '{"not": {}}'), r'^json_schema: keywords that are not supported: \["not"\]$'),
        (GrammarSpec("json_schema", '{"$ref": "http://127.0.0.1:9/x"}'), "does not fetch"),
        (GrammarSpec("json_schema", '{"a":' * 5_000 + "1" + "}" * 5_000), "recursion"),
        (GrammarSpec("regex", "(a"), "unclosed group"),
        (GrammarSpec("regex", "a(?=b)"), "look-ahead"),
        (GrammarSpec("regex", "(" + "a" * 5_000), r'invalid regex "\(a+\.\.\. error: unclosed group$'),
        (GrammarSpec("regex", "(a{1000}){1000}"), "too many expressions"),
        (GrammarSpec("regex", "a" * 70_000), "70000 bytes exceed 65536"),
        (GrammarSpec("regex", "\ud800"), "lone surrogates"),
        (GrammarSpec("choice", '["a", 3]'), "a JSON list of strings"),
        (GrammarSpec("choice", "[]"), "there is no choice"),
        (GrammarSpec("choice", '["a", ""]'), "an empty one"),
        (GrammarSpec("choice", '["\\ud800"]'), "lone surrogates"),
        (GrammarSpec("grammar", "start: nothing"), "unknown name"),
        (GrammarSpec("json_schema", json.dumps(OVERLAPPING)), "; use anyOf$"),
        (GrammarSpec("json_schema", json.dumps(IN_A_DEFINITION)), r"^json_schema: \$defs/b: oneOf"),
        (
            GrammarSpec("regex", "a{1000000}"),
            r"^regex: it is too large, or leaves too much open \(lexer error: [a-z ]+\)$",
        ),
        (GrammarSpec("regex", r"[^\s\S]"), "^regex: no text can follow it"),
        (GrammarSpec("grammar", "start: start"), "^grammar: no text can follow it: it contradicts itself"),
        (GrammarSpec("grammar", 'start: "a" start'), "^grammar: it is too large, or leaves too much open"),
        (GrammarSpec("grammar", ""), "Empty grammar"),
    ],
    ids=lambda value: f"{value.kind} {value.text[:20]!r}" if isinstance(value, GrammarSpec) else "",
)
def test_what_is_no_grammar_or_too_large_is_refused_in_one_line(spec: GrammarSpec, reason: str) -> None:
    with pytest.raises(GrammarInvalid, match=reason) as raised:
        COMPILER.compile(spec)
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith(f"{spec.kind}: ")
    assert len(str(raised.value)) <= len(f"{spec.kind}: ") + REASON_CHARS_MAX


KEYWORDS_REFUSED = (
    *("not", "if", "then", "else", "uniqueItems", "contains", "minContains", "maxContains", "propertyNames"),
    *("dependentRequired", "dependentSchemas", "dependencies", "unevaluatedItems", "unevaluatedProperties"),
    *("$dynamicRef", "$dynamicAnchor", "$recursiveRef", "$recursiveAnchor"),
)
FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
API_PAGE = Path(grammar.__file__).parents[2] / "docs" / "api.md"


@pytest.mark.parametrize("keyword", KEYWORDS_REFUSED)
def test_a_keyword_that_cannot_be_followed_is_refused_as_the_page_says(keyword: str) -> None:
    with pytest.raises(GrammarInvalid, match="not supported"):
        COMPILER.compile(GrammarSpec("json_schema", json.dumps({keyword: False})))


def test_the_page_has_the_keywords_and_formats_of_schemas() -> None:
    rows = dict(re.findall(r"^\| (Keywords refused|`format` of texts) \| (.*) \|$", API_PAGE.read_text(), re.M))
    assert re.findall("`([^`]+)`", rows["Keywords refused"]) == list(KEYWORDS_REFUSED)
    assert re.findall("`([^`]+)`", rows["`format` of texts"]) == list(FORMATS)
    for name in FORMATS:
        COMPILER.compile(GrammarSpec("json_schema", json.dumps({"type": "string", "format": name})))
    with pytest.raises(GrammarInvalid, match="format"):
        COMPILER.compile(GrammarSpec("json_schema", '{"type": "string", "format": "regex"}'))


@pytest.mark.parametrize(
    ("tokenizer_json", "vocabulary_size", "eos"),
    [("{}", WIDTH, EOS), ("/etc/hostname", WIDTH, EOS), (SMALL_JSON, 100, EOS), (SMALL_JSON, WIDTH, frozenset())],
    ids=["no tokenizer", "a path", "fewer logits than tokens", "no end"],
)
def test_a_tokenizer_that_does_not_fit_is_the_models_fault(
    tokenizer_json: str, vocabulary_size: int, eos: frozenset[int]
) -> None:
    compiler = GrammarCompiler(tokenizer_json, vocabulary_size, eos)
    with pytest.raises(GrammarUnavailable):
        compiler.compile(GrammarSpec("json_object"))


def test_thousands_of_choices_compile() -> None:
    choices = [f"choice number {i}" for i in range(2_000)]
    state = state_of(GrammarSpec("choice", json.dumps(choices)))
    assert SMALL.decode(generate(state, 1)) in choices


def test_a_grammar_is_compiled_once_and_the_least_used_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "GRAMMARS_MAX", 2)
    compiler = GrammarCompiler(SMALL_JSON, WIDTH, EOS)
    specs = [GrammarSpec("regex", letter) for letter in "abc"]
    kept = [compiler.compile(spec)._compiled for spec in specs[:2]]
    assert compiler.compile(specs[0])._compiled is kept[0]
    compiler.compile(specs[2])
    assert compiler.compile(specs[0])._compiled is kept[0]
    assert compiler.compile(specs[1])._compiled is not kept[1]
    assert len(compiler._compiled) == 2


def test_threads_compile_and_match_at_once() -> None:
    compiler = GrammarCompiler(SMALL_JSON, WIDTH, EOS)
    answers: list[tuple[str, str]] = []

    def work(kind: str) -> None:
        answers.append((kind, SMALL.decode(generate(state_of(SPECS[kind][0], compiler, seed=1), 1))))

    threads = [threading.Thread(target=work, args=(kind,)) for kind in [*SPECS] * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(answers) == len(threads)
    assert all(SPECS[kind][1](text) for kind, text in answers)
    assert len(set(answers)) == len(SPECS)


def test_the_worker_prepares_every_mask_of_a_batch() -> None:
    worker = MaskWorker()
    states = [state_of(spec, temperature=0) for spec, _ in SPECS.values()]
    plain = SamplingState(SamplingParams(temperature=0), PROMPT, EOS)
    try:
        for _ in range(3):
            worker.begin([plain, *states])
            worker.wait()
            matchers: Sequence[GrammarMatcher] = [state.matcher for state in states if state.matcher is not None]
            assert all(matcher._is_prepared for matcher in matchers)
            logits = np.zeros((len(states) + 1, WIDTH), np.float32)
            for state, sampled in zip([plain, *states], sample(logits, [plain, *states]), strict=True):
                state.accept(sampled.token_id)
        worker.begin([plain])
        worker.wait()
    finally:
        worker.close()


def test_masks_that_were_prepared_beside_give_the_same_tokens() -> None:
    spec = SPECS["json_schema"][0]
    alone, beside = (state_of(spec, seed=4) for _ in range(2))
    worker = MaskWorker()
    try:
        for position in range(12):
            logits = np.random.default_rng(position).normal(0, 3, (1, WIDTH)).astype(np.float32)
            worker.begin([beside])
            worker.wait()
            token_id = sample(logits.copy(), [alone])[0].token_id
            assert sample(logits.copy(), [beside])[0].token_id == token_id
            if token_id in EOS:
                break
            alone.accept(token_id)
            beside.accept(token_id)
    finally:
        worker.close()
