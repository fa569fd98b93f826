"""The API's description as one page of HTML: no script, no style sheet, nothing from another host."""

from __future__ import annotations

from html import escape
from typing import Any

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24 }
code, .path { font-family: ui-monospace, monospace; font-size: .92em }
details { border: 1px solid #d0d7de; border-radius: 6px; margin: .5rem 0; padding: .4rem .8rem }
summary { cursor: pointer } table { border-collapse: collapse; width: 100%; margin: .5rem 0 }
td, th { border-bottom: 1px solid #d0d7de; padding: .3rem .5rem; text-align: left; vertical-align: top }
.method { display: inline-block; min-width: 3.5rem; font-weight: 600; color: #0550ae }
@media (prefers-color-scheme: dark) {
  body { background: #0d1117; color: #e6edf3 } .method, a { color: #79c0ff }
  details, td, th { border-color: #30363d }
}
"""


def docs_page(document: dict[str, Any]) -> str:
    """document: OpenAPI 3.1."""
    info = document["info"]
    by_tag: dict[str, list[str]] = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            by_tag.setdefault(operation["tags"][0], []).append(_operation(method, path, operation))
    sections = [f"<h2>{escape(tag)}</h2>{''.join(operations)}" for tag, operations in by_tag.items()]
    schemas = [_schema(name, schema) for name, schema in sorted(document["components"]["schemas"].items())]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(info['title'])} API</title><style>{STYLE}</style></head><body>"
        f"<h1>{escape(info['title'])} API <small>{escape(info['version'])}</small></h1>"
        f'<p>{escape(info["description"])}</p><p>For programs: <a href="openapi.json">openapi.json</a></p>'
        f"{''.join(sections)}<h2>Types</h2>{''.join(schemas)}</body></html>"
    )


def _operation(method: str, path: str, operation: dict[str, Any]) -> str:
    rows = [
        ("parameter", escape(parameter["name"]), f"in the {escape(parameter['in'])}")
        for parameter in operation.get("parameters", ())
    ]
    if "requestBody" in operation:
        for content_type, content in operation["requestBody"]["content"].items():
            rows.append(("body", _type(content["schema"]), escape(content_type)))
    for status, response in operation["responses"].items():
        kinds = ", ".join(
            f"{_type(_payload(content['schema']))} as {escape(content_type)}"
            for content_type, content in response["content"].items()
        )
        rows.append((escape(status), kinds, escape(response["description"])))
    return (
        f'<details><summary><span class="method">{escape(method.upper())}</span> '
        f'<span class="path">{escape(path)}</span> – {escape(operation["summary"])}</summary>{_table(rows)}</details>'
    )


def _schema(name: str, schema: dict[str, Any]) -> str:
    required = schema.get("required", ())
    rows = [
        (f"<code>{escape(field)}</code>{'' if field in required else ' ?'}", _type(kind), _limits(kind))
        for field, kind in schema.get("properties", {}).items()
    ]
    text = f"<p>{escape(schema['description'])}</p>" if "description" in schema else ""
    return f'<details id="{escape(name)}"><summary><code>{escape(name)}</code></summary>{text}{_table(rows)}</details>'


def _table(rows: list[tuple[str, str, str]]) -> str:
    """Of HTML."""
    return "<table>" + "".join(f"<tr><td>{a}</td><td>{b}</td><td>{c}</td></tr>" for a, b, c in rows) + "</table>"


def _payload(schema: dict[str, Any]) -> dict[str, Any]:
    """Of an event, what its data holds; of anything else, itself."""
    for form in schema.get("properties", {}).get("data", {}).get("anyOf", ()):
        if "contentSchema" in form:
            found: dict[str, Any] = form["contentSchema"]
            return found
    return schema


def _type(schema: dict[str, Any]) -> str:
    """HTML that names it."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return " or ".join(dict.fromkeys(_type(kind) for kind in schema[key]))
    if "const" in schema:
        return f"<code>{escape(repr(schema['const']))}</code>"
    if "enum" in schema:
        return " or ".join(f"<code>{escape(repr(value))}</code>" for value in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    return escape(str(schema.get("type", "anything")))


_LIMITS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
    "minLength": "characters, at least",
    "maxLength": "characters, at most",
    "minItems": "items, at least",
    "maxItems": "items, at most",
    "maxProperties": "entries, at most",
    "pattern": "pattern",
}


def _limits(schema: dict[str, Any]) -> str:
    parts = [escape(schema["description"])] if "description" in schema else []
    for kind in (schema, *schema.get("anyOf", ())):
        parts += [f"{words} {escape(str(kind[key]))}" for key, words in _LIMITS.items() if key in kind]
    return "; ".join(dict.fromkeys(parts))
