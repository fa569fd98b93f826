"""The hot and warm sections: read as written, refused when they are not of this protocol."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from types import MappingProxyType

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import MalformedDatagram
from mesh.state import decode_load, decode_profile, encode_load, encode_profile, is_urgent
from mesh.view import EMBEDDING, GENERATION, UNKNOWN_KIND, ModelInfo, ModelLoad, NodeLoad, NodeProfile, Readiness
from mesh.wire import VERSION_MAX

counts = st.integers(0, 2**40)
rates = st.floats(0, 1e9, width=32)
names = st.text(min_size=1, max_size=12)
model_loads = st.builds(ModelLoad, counts, counts, counts, rates, rates, counts, counts, rates, rates, rates, rates)
loads = st.builds(
    NodeLoad,
    st.sampled_from(Readiness),
    counts,
    rates,
    rates,
    st.dictionaries(names, model_loads, max_size=5).map(MappingProxyType),
    st.binary(max_size=60),
    st.integers(0, VERSION_MAX),
    st.integers(0, 2**32 - 1),
)
fingerprints = st.binary(min_size=1, max_size=32).map(bytes.hex) | st.text(max_size=12)
kinds = st.sampled_from([GENERATION, EMBEDDING])
models = st.builds(ModelInfo, names, fingerprints, counts, counts, counts, kinds)
profiles = st.builds(
    NodeProfile, st.text(max_size=30), st.text(max_size=8), st.lists(models, max_size=5).map(tuple), fingerprints
)


@given(loads)
def test_a_load_is_decoded_as_it_was_encoded(load: NodeLoad) -> None:
    assert decode_load(encode_load(load)) == load


@given(profiles)
def test_a_profile_is_decoded_as_it_was_encoded(profile: NodeProfile) -> None:
    assert decode_profile(encode_profile(profile)) == profile


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_a_section_or_refused(section: bytes) -> None:
    for decode in (decode_load, decode_profile):
        with contextlib.suppress(MalformedDatagram):
            decode(section)


@given(loads, profiles, st.data())
def test_a_mutated_section_is_a_section_or_refused(load: NodeLoad, profile: NodeProfile, data: st.DataObject) -> None:
    for decode, section in ((decode_load, encode_load(load)), (decode_profile, encode_profile(profile))):
        mutated = bytearray(section)
        mutated[data.draw(st.integers(0, len(mutated) - 1))] = data.draw(st.integers(0, 255))
        with contextlib.suppress(MalformedDatagram):
            decode(bytes(mutated))


def test_a_load_of_one_model_is_small() -> None:
    model = ModelLoad(3, 2, 5, 2048.0, 24.5, 100_000, 900, 0.01, 2.5, 0.001, 180.0)
    assert len(encode_load(NodeLoad(Readiness.READY, 3, 24.5, 0.01, {"demo": model}))) <= 68


@pytest.mark.parametrize(
    "load",
    [
        pytest.param(NodeLoad(active_requests=-1), id="negative count"),
        pytest.param(NodeLoad(tokens_per_s=float("nan")), id="no number"),
        pytest.param(NodeLoad(loop_lag_s=float("inf")), id="infinite"),
        pytest.param(NodeLoad(models={"": ModelLoad()}), id="nameless model"),
        pytest.param(NodeLoad(models={"x" * 257: ModelLoad()}), id="long name"),
        pytest.param(NodeLoad(models={f"model-{i}-of-many": ModelLoad() for i in range(60)}), id="too many models"),
    ],
)
def test_a_load_that_peers_would_refuse_is_refused_at_home(load: NodeLoad) -> None:
    with pytest.raises(ValueError, match=r"."):
        encode_load(load)


def test_a_profile_of_too_many_models_says_how_many_bytes_there_are() -> None:
    models = tuple(ModelInfo(f"model-{i}", "ab" * 32, 2048, 8) for i in range(40))
    with pytest.raises(ValueError, match=r"40 models takes \d+ bytes of 896"):
        encode_profile(NodeProfile(models=models))


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param([0, 0, 0.0, 0.0], id="a field is missing"),
        pytest.param([0, 0, -1.0, 0.0, []], id="negative rate"),
        pytest.param([0, 0, float("nan"), 0.0, []], id="no number"),
        pytest.param([0, 0, 2e12, 0.0, []], id="a rate beyond all machines"),
        pytest.param([0, 0, 2**63, 0.0, []], id="a whole number beyond all machines"),
        pytest.param([0, 0, 0.0, 0.0, [["m", 1]]], id="short model"),
        pytest.param([0, 0, 0.0, 0.0, [["m", 1, 2, 3, 4.0, 5.0, 6, 7, -1.0]]], id="negative appended rate"),
        pytest.param([0, 0, 0.0, 0.0, {}], id="a map of models"),
        pytest.param({}, id="a map"),
    ],
)
def test_what_is_no_load_is_refused(fields: object) -> None:
    with pytest.raises(MalformedDatagram):
        decode_load(msgpack.packb(fields))


def test_a_kind_of_model_of_a_later_version_is_read_as_one_that_nothing_is_asked_of() -> None:
    profile = decode_profile(msgpack.packb(["", "", [["m", "f", 2048, 8, 512, 77], ["n", "f", 2048, 8, 512]]]))
    assert [model.kind for model in profile.models] == [UNKNOWN_KIND, GENERATION]


def test_a_model_that_generates_is_told_of_as_every_version_reads_it() -> None:
    section = encode_profile(NodeProfile(models=(ModelInfo("m", "f", 2048, 8),)))
    assert len(msgpack.unpackb(section)[2][0]) == 5


def test_a_fingerprint_that_no_node_could_have_sent_is_refused() -> None:
    with pytest.raises(MalformedDatagram):
        decode_profile(msgpack.packb(["", "", [["m", b"f" * 129, 2048, 8, 512]]]))


def test_fields_and_words_of_a_newer_version_are_ignored() -> None:
    model = ["m", 1, 2, 3, 4.0, 5.0, 6, 7, 8.0, 9.0, 10.0, 11.0, "later"]
    load = decode_load(msgpack.packb([17, 1, 2.0, 0.5, [model], "later"]))
    expected = ModelLoad(1, 2, 3, 4.0, 5.0, 6, 7, 8.0, 9.0, 10.0, 11.0)
    assert load == NodeLoad(Readiness.LOADING, 1, 2.0, 0.5, {"m": expected})


@pytest.mark.parametrize("length", range(8, 13))
def test_the_row_of_a_model_may_end_after_any_field_that_was_appended(length: int) -> None:
    row = ["m", 1, 2, 3, 4.0, 5.0, 6, 7, 8.0, 9.0, 10.0, 11.0][:length]
    load = decode_load(msgpack.packb([1, 1, 2.0, 0.5, [row]]))
    assert load.models == {"m": ModelLoad(*row[1:])}


QUIET = NodeLoad(Readiness.READY, 1, 5.0, 0.0, {"m": ModelLoad(queued=4)})


@pytest.mark.parametrize(
    ("after", "urgent"),
    [
        pytest.param(QUIET, False, id="the same"),
        pytest.param(replace(QUIET, active_requests=9, tokens_per_s=90.0), False, id="busier"),
        pytest.param(replace(QUIET, readiness=Readiness.DRAINING), True, id="draining"),
        pytest.param(replace(QUIET, models={"m": ModelLoad(queued=11)}), False, id="a few more queued"),
        pytest.param(replace(QUIET, models={"m": ModelLoad(queued=12)}), True, id="many more queued"),
        pytest.param(replace(QUIET, models={}), True, id="a model gone"),
        pytest.param(replace(QUIET, models={"m": ModelLoad(queued=4), "n": ModelLoad()}), True, id="a model more"),
    ],
)
def test_a_change_is_urgent_when_routers_must_know(after: NodeLoad, urgent: bool) -> None:
    assert is_urgent(QUIET, after) is urgent
