"""Answers that must look a certain way: which tokens may come next, through llguidance.

A GrammarCompiler belongs to a model, a GrammarMatcher to one sequence. Compiling takes microseconds to, for what is
badly written, a second, so it is done in a worker thread. A mask takes about 0.05 ms, at times several; MaskWorker
computes those of a batch while the session decodes, so that they are there when its logits are. A fault in a grammar
ends the sequence that has it and no other: GrammarMatcher.error says what it was, and the sampler gives INVALID.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from nodes.engine.errors import EngineError
from nodes.engine.sampling import GrammarSpec, Matcher, SamplingState

FloatArray = npt.NDArray[np.float32]
IdArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

SPEC_BYTES_MAX = 64 * 1024  # a schema of hundreds of properties; 64 KB of choices compile in about 0.1 s
GRAMMARS_MAX = 64  # compiled ones kept; most take below 1 MB, the largest that LIMITS allow some tens
REASON_CHARS_MAX = 200
CAUSE_CHARS_MAX = 100  # of these
# Looked at one by one for what is wrong with a schema, each for some 0.5 ms: 128 tools, which the API allows, and one.
DEFINITIONS_MAX = 129
# What llguidance says, and what that means to somebody who does not use it as a library.
WORDS = {
    "<non-verbose/>": "",
    "Unimplemented keys:": "keywords that are not supported:",
    "oneOf constraints are not supported. Enable 'coerce_one_of' option to approximate oneOf with anyOf": (
        "oneOf is supported only where its alternatives exclude one another; use anyOf"
    ),
}
NO_TEXT = "NoExtensionBias"  # llguidance's word for a grammar that lets no text through
NO_TOKEN = "the grammar allows no token here, nor may the answer end"  # noqa: S105
# Runs of white space in JSON: room for deep indentation, but a model that likes blanks cannot go on with them for ever.
JSON_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,40}"
# What one grammar may cost. Enumerations of 4,000 strings and all formats of JSON Schema stay far below. With
# llguidance's own, wider ones (a{1000}){1000} takes 2.2 s and 170 MB until it is refused, with these 20 ms.
LIMITS = LLParserLimits(
    initial_lexer_fuel=50_000,
    step_lexer_fuel=50_000,
    step_max_items=50_000,
    max_lexer_states=20_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)
_FEW = 256  # so many allowed ids are set one by one, which is faster than masking the row
_WORD_BITS = 32  # llguidance writes its masks in words of so many bits
# [256, 8]: what each byte of a mask means for the logits of its eight tokens, for np.minimum.
_CAPS_OF_BYTES = np.where(
    np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), np.inf, -np.inf
).astype(np.float32)


class GrammarInvalid(EngineError):
    """The client's fault: the grammar is malformed, too large, or more than llguidance can do. Nothing was queued."""

    def __init__(self, kind: str, reason: str) -> None:
        """reason: may be of several lines; the message is one."""
        super().__init__(f"{kind}: {_one_line(reason)}")


class GrammarUnavailable(EngineError):
    """The model's tokenizer is of a kind that llguidance does not know, so no grammar works with this model."""


class _Compiled:
    """A grammar whose copies share one lexer. is_spent: the lexer has reached a limit, as it will in every copy."""

    __slots__ = ("is_spent", "prototype")

    def __init__(self, prototype: LLMatcher) -> None:
        self.prototype = prototype
        self.is_spent = False


class GrammarMatcher:
    """What one sequence's tokens so far leave open for the next. One thread at a time uses it.

    error: in one line, once the grammar broke or a token came that it does not allow; it stays. must_end: after
    prepare(), only an end-of-sequence token is allowed.
    """

    __slots__ = (
        "_allowed_ids",
        "_bits",
        "_caps",
        "_compiled",
        "_eos_ids",
        "_is_allowed",
        "_is_prepared",
        "_matcher",
        "error",
        "must_end",
    )

    def __init__(self, compiled: _Compiled, vocabulary_size: int, eos_ids: IdArray) -> None:
        """eos_ids: below vocabulary_size."""
        self._compiled = compiled
        self._matcher = compiled.prototype.deep_copy()
        self._eos_ids = eos_ids
        self._bits = np.empty(-(-vocabulary_size // _WORD_BITS) * _WORD_BITS // 8, np.uint8)
        self._is_allowed: BoolArray = np.empty(vocabulary_size, np.bool_)
        self._allowed_ids: IdArray | None = None  # where they are few; else there are caps
        self._caps: FloatArray = np.empty(0, np.float32)  # of the logits: infinite, negative where not allowed
        self._is_prepared = False
        self.must_end = False
        self.error: str | None = None

    def accept(self, token_id: int) -> None:
        """The answer's next token is this one. One that the grammar does not allow sets error."""
        if self.error is not None:
            return
        was_allowed = self._is_prepared and 0 <= token_id < len(self._is_allowed) and bool(self._is_allowed[token_id])
        self._is_prepared = False
        try:
            reason = "" if self._matcher.consume_token(token_id) else self._matcher.get_error()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as exc:  # ids that its vocabulary lacks, of several types; a panic in Rust is no Exception
            reason = str(exc) or type(exc).__name__
        if reason:
            self.error = f"the grammar does not take token {token_id}: {_one_line(reason)}"
            self._compiled.is_spent |= was_allowed

    def prepare(self) -> None:
        """Compute the mask for the next token, unless it was; never raises."""
        if self._is_prepared or self.error is not None:
            return
        try:
            self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
            reason = self._matcher.get_error()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as exc:  # a panic in Rust is no Exception; whatever it is ends this sequence only
            reason = str(exc) or type(exc).__name__
        if reason:
            self.error = f"the grammar's mask failed: {_one_line(reason)}"
            self._compiled.is_spent = True
            return
        allowed = np.unpackbits(self._bits, count=len(self._is_allowed), bitorder="little").view(np.bool_)
        allowed[self._eos_ids] = False
        count = np.count_nonzero(allowed)
        may_end = self._matcher.is_accepting()
        if not count and not may_end:
            self.error = NO_TOKEN
            return
        self.must_end = not count
        allowed[self._eos_ids] = may_end
        self._is_allowed = allowed
        if count <= _FEW:
            self._allowed_ids = np.flatnonzero(allowed)
        else:
            self._allowed_ids = None
            self._caps = _CAPS_OF_BYTES[self._bits].reshape(-1)[: len(allowed)]
            self._caps[self._eos_ids] = np.inf if may_end else -np.inf
        self._is_prepared = True

    def some_token(self) -> int | None:
        """The lowest allowed id that does not end the answer; None when there is none. prepare() left no error."""
        ids = np.flatnonzero(self._is_allowed)
        ids = ids[~np.isin(ids, self._eos_ids)]
        return int(ids[0]) if len(ids) else None

    def forbid(self, row: FloatArray) -> None:
        """Set the logits of the tokens that may not come next to minus infinity. row: [vocabulary or more].

        prepare() was called and left no error."""
        assert self._is_prepared, "a mask that was not computed"
        if self._allowed_ids is not None:
            values = row[self._allowed_ids]
            row.fill(-np.inf)
            row[self._allowed_ids] = values
        else:
            known = row[: len(self._caps)]
            np.minimum(known, self._caps, out=known)
            row[len(self._caps) :] = -np.inf


class GrammarCompiler:
    """Makes matchers for one model. Safe to use from several threads at once; compile() blocks."""

    def __init__(self, tokenizer_json: str, vocabulary_size: int, eos_ids: Iterable[int]) -> None:
        """tokenizer_json: the text of the model's tokenizer.json. vocabulary_size: logits in a row. eos_ids: all."""
        self._tokenizer_json = tokenizer_json
        self._vocabulary_size = vocabulary_size
        self._eos_ids = sorted(token_id for token_id in eos_ids if 0 <= token_id < vocabulary_size)
        self._tokenizer: LLTokenizer | None = None  # made when the first grammar comes: a second for a large vocabulary
        self._tokenizer_lock = threading.Lock()
        self._compiled: OrderedDict[GrammarSpec, _Compiled] = OrderedDict()  # the last used last
        self._compiled_lock = threading.Lock()

    def compile(self, spec: GrammarSpec) -> GrammarMatcher:
        """A fresh matcher. Raises GrammarInvalid, GrammarUnavailable."""
        with self._compiled_lock:
            compiled = self._compiled.get(spec)
            if compiled is not None and not compiled.is_spent:
                self._compiled.move_to_end(spec)
                return self._matcher(compiled)
        try:
            compiled = self._compile(spec)
        except (EngineError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as exc:  # a panic in Rust is no Exception, and would end more than this request
            raise GrammarInvalid(spec.kind, f"llguidance failed: {exc}") from exc
        with self._compiled_lock:
            self._compiled[spec] = compiled
            self._compiled.move_to_end(spec)
            while len(self._compiled) > GRAMMARS_MAX:
                self._compiled.popitem(last=False)
            return self._matcher(compiled)

    def _matcher(self, compiled: _Compiled) -> GrammarMatcher:
        return GrammarMatcher(compiled, self._vocabulary_size, np.array(self._eos_ids, np.int64))

    def _compile(self, spec: GrammarSpec) -> _Compiled:
        grammar = _llguidance_grammar(spec)
        compiled = _Compiled(LLMatcher(self._load_tokenizer(), grammar, log_level=0, limits=LIMITS))
        if compiled.prototype.is_error():
            raise GrammarInvalid(spec.kind, self._fault(spec, compiled.prototype.get_error()))
        # Lexers are built when they are needed: what is too much for LIMITS at once is refused here, not in the answer.
        probe = self._matcher(compiled)
        probe.prepare()
        if probe.error is not None:
            raise GrammarInvalid(spec.kind, _refusal(probe.error))
        if (token_id := probe.some_token()) is not None:
            probe.accept(token_id)
            probe.prepare()
        if compiled.is_spent:
            raise GrammarInvalid(spec.kind, _refusal(probe.error or ""))
        return compiled

    def _fault(self, spec: GrammarSpec, reason: str) -> str:
        """The reason, and in which definition of a schema it is, if it is in one that refers to no other."""
        definitions = _parse_json(spec).get("$defs") if spec.kind == "json_schema" else None
        if not isinstance(definitions, dict):
            return reason
        for name, definition in islice(definitions.items(), DEFINITIONS_MAX):
            alone = _json_grammar({"$ref": f"#/$defs/{name}", "$defs": {name: definition}})
            if LLMatcher(self._load_tokenizer(), alone, log_level=0, limits=LIMITS).get_error() == reason:
                return f"$defs/{name[:CAUSE_CHARS_MAX]}: {reason}"
        return reason

    def _load_tokenizer(self) -> LLTokenizer:
        with self._tokenizer_lock:
            if self._tokenizer is None:
                if not self._eos_ids:
                    raise GrammarUnavailable("the model has no end-of-sequence token, so no answer could end")
                if not self._tokenizer_json.lstrip().startswith("{"):  # the library would take it for a file's name
                    raise GrammarUnavailable("the model's tokenizer is not a tokenizer.json")
                try:
                    self._tokenizer = LLTokenizer(
                        self._tokenizer_json, n_vocab=self._vocabulary_size, eos_token=self._eos_ids
                    )
                except Exception as exc:  # ValueError for most; the library promises no type
                    raise GrammarUnavailable(
                        f"grammars do not work with this tokenizer: {_one_line(str(exc))}"
                    ) from exc
                self._tokenizer_json = ""  # megabytes
            return self._tokenizer


class MaskWorker:
    """Computes masks beside the session, in one thread. The engine thread alone calls it."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="grammar-masks")
        self._running: Future[None] | None = None

    def begin(self, states: Iterable[SamplingState]) -> None:
        """Start computing the masks of those that have a matcher; until wait() returns, nobody else uses these."""
        self.wait()
        matchers = [state.matcher for state in states if state.matcher is not None]
        if matchers:
            self._running = self._executor.submit(_prepare_all, matchers)

    def wait(self) -> None:
        """Return once what begin() started is done. Bounded: LIMITS bound each mask."""
        if self._running is not None:
            running, self._running = self._running, None
            running.result()

    def close(self) -> None:
        """End the thread, after the masks that it computes. Any number of times."""
        self._executor.shutdown(wait=False)


def _prepare_all(matchers: list[Matcher]) -> None:
    for matcher in matchers:
        matcher.prepare()


def _refusal(error: str) -> str:
    """Why a grammar without a mistake is refused. error: the one of a matcher's first steps."""
    if NO_TEXT in error or error == NO_TOKEN:
        return "no text can follow it: it contradicts itself, or never comes to an end"
    cause = error.partition(": ")[2]
    return "it is too large, or leaves too much open" + (f" ({cause})" if cause else "")


def _llguidance_grammar(spec: GrammarSpec) -> str:
    """What LLMatcher takes. Raises GrammarInvalid; that text is a grammar is checked here for JSON only."""
    try:
        size = len(spec.text.encode())
    except UnicodeEncodeError as exc:
        raise GrammarInvalid(spec.kind, "the text has lone surrogates") from exc
    if size > SPEC_BYTES_MAX:
        raise GrammarInvalid(spec.kind, f"{size} bytes exceed {SPEC_BYTES_MAX}")
    match spec.kind:
        case "json_object":
            return _json_grammar({"type": "object"})
        case "json_schema":
            schema = _parse_json(spec)
            if schema is True:
                schema = {}
            if not isinstance(schema, dict):
                raise GrammarInvalid(spec.kind, "a schema is a JSON object")
            try:
                return _json_grammar(schema)
            except (ValueError, RecursionError) as exc:  # what llguidance refuses to read, as nested too deep
                raise GrammarInvalid(spec.kind, str(exc)) from exc
        case "regex":
            return str(LLMatcher.grammar_from_regex(spec.text))
        case "choice":
            return _choice_grammar(spec)
        case "grammar":
            return str(LLMatcher.grammar_from_lark(spec.text))


def _json_grammar(schema: dict[str, Any]) -> str:
    text = json.dumps(schema)
    return str(LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": JSON_WHITESPACE}))


def _choice_grammar(spec: GrammarSpec) -> str:
    choices = _parse_json(spec)
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise GrammarInvalid(spec.kind, "the choices are a JSON list of strings")
    if not choices or not all(choices):
        raise GrammarInvalid(spec.kind, "there is no choice, or an empty one")
    try:
        "".join(choices).encode()
    except UnicodeEncodeError as exc:
        raise GrammarInvalid(spec.kind, "a choice has lone surrogates") from exc
    # One terminal, which Lark tells by its capitals: alternatives of a rule are items of the parser, at most 2,000.
    alternatives = " | ".join(json.dumps(choice).replace("\x7f", "\\u007f") for choice in dict.fromkeys(choices))
    return str(LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {alternatives}"))


def _parse_json(spec: GrammarSpec) -> Any:
    try:
        return json.loads(spec.text)
    except (ValueError, RecursionError) as exc:
        raise GrammarInvalid(spec.kind, f"the text is no JSON: {exc}") from exc


def _one_line(text: str) -> str:
    """llguidance quotes a wrong expression whole, and several times; behind it one line says what is wrong with it."""
    for theirs, ours in WORDS.items():
        text = text.replace(theirs, ours)
    line = " ".join(text.split())
    if len(line) <= REASON_CHARS_MAX:
        return line
    causes = [f" {part[:CAUSE_CHARS_MAX]}" for part in text.splitlines() if part.startswith("error: ")]
    end = f"...{causes[0] if causes else ''}"
    return line[: REASON_CHARS_MAX - len(end)] + end
