"""Configurations of log shippers: read by the tool's own reader where one can be installed, else by its reference."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from vrl_python import VRLRuntime

from observability.log_lines import json_formatter
from tests.alloy_syntax import AlloySyntaxError, Block, Call, Reference, Sum, parse

FOLDER = Path(__file__).parents[2] / "observability" / "logging"
LINES = "/var/log/ai-cluster/*/combined.log"
LABELS = {"job", "node_id", "level"}
# What of Alloy's reference may be used: block → (attributes it must have, those it may have, blocks within).
ALLOY: dict[str, tuple[set[str], set[str], set[str]]] = {
    "local.file_match": ({"path_targets"}, {"sync_period"}, set()),
    "loki.source.file": ({"targets", "forward_to"}, {"tail_from_end"}, {"file_watch", "decompression"}),
    "loki.process": (
        {"forward_to"},
        set(),
        {"stage.json", "stage.timestamp", "stage.labels", "stage.label_drop", "stage.structured_metadata"},
    ),
    "loki.write": (set(), {"external_labels"}, {"endpoint"}),
    "endpoint": ({"url"}, {"tenant_id"}, {"basic_auth"}),
    "stage.json": ({"expressions"}, {"source", "drop_malformed"}, set()),
    "stage.timestamp": ({"source", "format"}, {"location"}, set()),
    "stage.labels": ({"values"}, set(), set()),
    "stage.label_drop": ({"values"}, set(), set()),
    "stage.structured_metadata": ({"values"}, set(), set()),
}
ALLOY_EXPORTS = {"local.file_match": "targets", "loki.process": "receiver", "loki.write": "receiver"}


def example_line(*, with_error: bool = False) -> dict[str, Any]:
    """A line as a node writes it."""
    record = logging.LogRecord("nodes.api.access", logging.INFO, __file__, 1, "request", None, None)
    if with_error:
        try:
            raise ValueError("broken")
        except ValueError:
            record.exc_info = sys.exc_info()
    record.__dict__ |= {"request_id": "req_1", "model": "demo", "http.response.status_code": 200}
    line: dict[str, Any] = json.loads(json_formatter("node-1").format(record))
    return line


# Alloy.


def blocks(block: Block) -> Iterator[Block]:
    for inner in block.blocks:
        yield inner
        yield from blocks(inner)


def references(value: object) -> Iterator[str]:
    match value:
        case Reference(name):
            yield name
        case Call(_, arguments) | Sum(arguments):
            for argument in arguments:
                yield from references(argument)
        case list():
            for item in value:
                yield from references(item)
        case dict():
            for item in value.values():
                yield from references(item)


@pytest.fixture
def alloy() -> Block:
    return parse((FOLDER / "config.alloy").read_text())


def test_alloy_s_blocks_and_attributes_are_of_its_reference(alloy: Block) -> None:
    for block in blocks(alloy):
        needed, allowed, inner = ALLOY[block.name]
        assert needed <= block.attributes.keys() <= needed | allowed, block.name
        assert {one.name for one in block.blocks} <= inner, block.name
    assert all(block.label for block in alloy.blocks)


def test_alloy_s_components_lead_from_the_files_to_loki(alloy: Block) -> None:
    exports = {f"{one.name}.{one.label}.{ALLOY_EXPORTS[one.name]}" for one in alloy.blocks if one.name in ALLOY_EXPORTS}
    used = {name for block in blocks(alloy) for value in block.attributes.values() for name in references(value)}
    assert used == exports
    (files,) = [block for block in alloy.blocks if block.name == "local.file_match"]
    assert files.attributes["path_targets"] == [{"__path__": LINES, "job": "ai-cluster"}]


def test_alloy_reads_fields_that_lines_have_and_labels_few(alloy: Block) -> None:
    stages = {block.name: block for block in blocks(alloy) if block.name.startswith("stage.")}
    expressions = stages["stage.json"].attributes["expressions"]
    assert isinstance(expressions, dict)
    fields = {str(value).strip('"') for value in expressions.values()}
    assert fields - {"trace_id"} <= example_line().keys()
    labels = stages["stage.labels"].attributes["values"]
    assert isinstance(labels, dict)
    assert labels.keys() | {"job"} == LABELS
    for stage in ("stage.labels", "stage.structured_metadata"):
        values = stages[stage].attributes["values"]
        assert isinstance(values, dict)
        assert set(values.values()) <= expressions.keys()
    assert expressions[str(stages["stage.timestamp"].attributes["source"])] == '"@timestamp"'
    assert stages["stage.timestamp"].attributes["format"] == "RFC3339Nano"


@pytest.mark.parametrize(
    "text",
    ['a "b" {', 'a "b" { c = }', "a = [1\n]", "a = 1 b = 2", "a = 1\na = 2", 'a "b c" {}', "a { b.c = 1 }", "a = 'b'"],
)
def test_what_alloy_refuses_is_refused(text: str) -> None:
    with pytest.raises(AlloySyntaxError):
        parse(text)


# Vector.


@pytest.fixture
def vector() -> dict[str, Any]:
    configuration: dict[str, Any] = yaml.safe_load((FOLDER / "vector.yaml").read_text())
    return configuration


def remap(vector: dict[str, Any], text: str) -> dict[str, Any]:
    source = vector["transforms"]["ai_cluster"]["source"]
    event: dict[str, Any] = VRLRuntime().execute(source, {"message": text}).processed_event
    return event


def test_vector_s_program_gives_each_field_of_a_line_and_its_time(vector: dict[str, Any]) -> None:
    line = example_line(with_error=True)
    event = remap(vector, json.dumps(line))
    assert event.items() >= line.items()
    assert "\n" in event["error.stack_trace"]
    assert event["timestamp"].removesuffix(" UTC").replace(" ", "T") + "Z" == line["@timestamp"]


@pytest.mark.parametrize("text", ["no JSON", "[1, 2]", "null"])
def test_vector_s_program_keeps_a_line_that_is_no_object(vector: dict[str, Any], text: str) -> None:
    assert remap(vector, text) == {"message": text, "service": "ai-cluster"}


def test_vector_s_compiler_refuses_a_bad_program() -> None:
    with pytest.raises(ValueError, match="unhandled fallible assignment"):
        VRLRuntime().execute(".a = parse_json(.message)", {})


def test_vector_s_components_lead_from_the_files_to_loki(vector: dict[str, Any]) -> None:
    assert vector.keys() == {"data_dir", "sources", "transforms", "sinks"}
    (source,) = vector["sources"].values()
    assert (source["type"], source["include"]) == ("file", [LINES])
    assert vector["transforms"]["ai_cluster"]["inputs"] == list(vector["sources"])
    (sink,) = vector["sinks"].values()
    assert sink["inputs"] == ["ai_cluster"]
    assert sink["encoding"] == {"codec": "json"}
    assert sink["labels"].keys() == LABELS


# Filebeat and Elasticsearch.


def test_filebeat_reads_the_lines_as_json_under_their_own_names() -> None:
    configuration = yaml.safe_load((FOLDER / "filebeat.yml").read_text())
    (source,) = configuration["filebeat.inputs"]
    assert source.keys() == {"type", "id", "paths", "prospector.scanner.check_interval", "parsers", "processors"}
    assert (source["type"], source["paths"]) == ("filestream", [LINES])
    (parser,) = source["parsers"]
    assert parser == {"ndjson": {"target": "", "overwrite_keys": True, "expand_keys": True, "add_error_key": True}}
    assert {next(iter(processor)) for processor in source["processors"]} == {"add_fields", "drop_fields"}
    output = configuration["output.elasticsearch"]
    template = json.loads((FOLDER / "elasticsearch-index-template.json").read_text())
    (pattern,) = template["index_patterns"]
    assert re.fullmatch(pattern.replace("*", ".*"), output["index"])
    assert configuration["setup.template.enabled"] is False


def test_elasticsearch_has_a_type_for_the_fields_of_every_line() -> None:
    template = json.loads((FOLDER / "elasticsearch-index-template.json").read_text())
    assert template.keys() == {"index_patterns", "data_stream", "priority", "template"}
    properties = template["template"]["mappings"]["properties"]
    for name in example_line(with_error=True):
        at: Any = {"properties": properties}
        for part in name.split("."):
            at = at["properties"][part]
        assert at["type"], name
    assert properties["@timestamp"] == {"type": "date"}


# Datadog and New Relic.


def test_datadog_reads_the_lines() -> None:
    configuration = yaml.safe_load((FOLDER / "datadog.yaml").read_text())
    (source,) = configuration.pop("logs")
    assert not configuration
    assert (source["type"], source["path"], source["source"]) == ("file", LINES, "ai-cluster")
    assert source.keys() <= {
        "type", "path", "service", "source", "tags", "start_position", "encoding", "exclude_paths",
        "log_processing_rules", "auto_multi_line_detection",
    }  # fmt: skip


def sections(path: Path) -> list[tuple[str, dict[str, list[str]]]]:
    """Fluent Bit's classic form: [SECTION] lines, and indented `Key value` lines."""
    found: list[tuple[str, dict[str, list[str]]]] = []
    for line in path.read_text().splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        if heading := re.fullmatch(r"\[([A-Z]+)\]", line):
            found.append((heading[1], {}))
            continue
        entry = re.fullmatch(r"    (\S+)\s+(\S.*)", line)
        assert entry, f"{path.name}: {line!r}"
        found[-1][1].setdefault(entry[1].lower(), []).append(entry[2])
    return found


def test_new_relic_reads_the_lines_with_fluent_bit() -> None:
    folder = FOLDER / "new-relic"
    (entry,) = yaml.safe_load((folder / "ai-cluster.yml").read_text())["logs"]
    assert entry.keys() == {"name", "fluentbit"}
    names = {key: Path(path) for key, path in entry["fluentbit"].items()}
    assert names.keys() == {"config_file", "parsers_file"}
    assert all((folder / path.name).exists() for path in names.values())
    ((kind, reader), (filter_kind, changes)) = sections(folder / names["config_file"].name)
    assert (kind, filter_kind) == ("INPUT", "FILTER")
    assert (reader["name"], reader["path"]) == (["tail"], [LINES])
    assert changes["match"] == reader["tag"]
    ((_, parser),) = sections(folder / names["parsers_file"].name)
    assert parser["name"] == reader["parser"]
    assert parser["format"] == ["json"]
    assert parser["time_key"] == ["@timestamp"]
    assert all(change.split()[0] not in example_line() for change in changes["add"])


def test_the_time_format_of_fluent_bit_is_that_of_the_lines() -> None:
    ((_, parser),) = sections(FOLDER / "new-relic" / "ai-cluster-parsers.conf")
    # Fluent Bit's %L is a dot's fraction of a second; %f is Python's.
    datetime.strptime(example_line()["@timestamp"], parser["time_format"][0].replace("%L", "%f"))
