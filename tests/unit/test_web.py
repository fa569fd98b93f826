"""The status page's files: served with a strict policy, complete, and of this host alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nodes.api.web import CONTENT_TYPES, FOLDER
from tests.unit.scripted_api import Api, ScriptedDispatch

FILES = sorted(path for path in FOLDER.iterdir() if path.is_file())


async def test_the_page_is_at_the_root_with_a_policy_that_allows_nothing_inline_or_foreign() -> None:
    response = await Api(ScriptedDispatch()).client.get("/")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert {policy[name] for name in ("script-src", "style-src", "connect-src", "img-src")} == {"'self'"}
    assert policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert response.headers["x-content-type-options"] == "nosniff"


async def test_every_file_that_the_page_names_is_served() -> None:
    api = Api(ScriptedDispatch())
    page = (await api.client.get("/")).text
    named = set(re.findall(r'(?:src|href)="(web/[^"]+)"', page))
    for path in FILES:
        if path.suffix == ".js":
            named |= {f"web/{name}" for name in re.findall(r'from "\./([^"]+)"', path.read_text())}
    assert named == {f"web/{path.name}" for path in FILES} - {"web/index.html"}
    for name in named:
        response = await api.client.get(f"/{name}")
        assert response.status_code == 200
        assert response.headers["content-type"] == CONTENT_TYPES[Path(name).suffix]
        assert "content-security-policy" in response.headers


async def test_a_file_that_the_browser_has_is_not_sent_again() -> None:
    api = Api(ScriptedDispatch())
    first = await api.client.get("/web/app.js")
    again = await api.client.get("/web/app.js", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert (await api.client.get("/web/app.js", headers={"if-none-match": '"other"'})).status_code == 200


@pytest.mark.parametrize("name", ["absent.js", "..%2fapi%2fweb.py", "%2e%2e/config.py"])
async def test_nothing_else_is_served(name: str) -> None:
    response = await Api(ScriptedDispatch()).client.get(f"/web/{name}")
    assert response.status_code == 404
    assert "error" in response.json()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_file_names_another_host_or_makes_markup_of_text(path: Path) -> None:
    text = path.read_text()
    assert set(re.findall(r"https?://[\w.]+", text)) <= {"http://www.w3.org"}  # the name of SVG, which nobody fetches
    for risk in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "style=", "onclick="):
        assert risk not in text


def test_ids_that_scripts_ask_for_are_in_the_page() -> None:
    page = (FOLDER / "index.html").read_text()
    there = re.findall(r'id="([^"]+)"', page)
    assert len(there) == len(set(there))
    asked = {
        name for path in FILES if path.suffix == ".js" for name in re.findall(r'byId\("([^"]+)"\)', path.read_text())
    }
    assert asked <= set(there)
