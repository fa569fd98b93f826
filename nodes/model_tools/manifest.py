"""Where a model folder came from: repository, commit, and each file's hash, in manifest.json."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from pydantic.dataclasses import dataclass

from nodes.model_tools.errors import ModelToolError
from nodes.model_tools.hub import sha256_of
from nodes.model_tools.variants import is_inside

MANIFEST_FILE = "manifest.json"
MANIFEST_BYTES_MAX = 1 << 20  # some hundred bytes a file


@dataclass(frozen=True, slots=True)
class ManifestFile:
    """file: in the folder. source: in the repository. Both with slashes."""

    file: str
    source: str
    size_bytes: int
    sha256: str

    @field_validator("file")
    @classmethod
    def _inside(cls, value: str) -> str:
        if not is_inside(value):
            raise ValueError("leaves the folder")
        return value


class Manifest(BaseModel):
    """What `models pull` put into a folder. variant: the last one asked for or chosen; files: of all pulled so far."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    repo: str
    revision: str
    commit: str
    variant: str
    files: tuple[ManifestFile, ...]


def read_manifest(folder: Path) -> Manifest | None:
    """None where there is none. Raises ModelToolError."""
    file = folder / MANIFEST_FILE
    try:
        with file.open("rb") as stream:
            content = stream.read(MANIFEST_BYTES_MAX)
        return Manifest.model_validate_json(content)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise ModelToolError(f"{file} cannot be read ({exc.strerror}); make it readable") from exc
    except ValidationError as exc:
        raise ModelToolError(f"{file} is no manifest of `models pull`; move it away, or give another --out") from exc


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replaces the old one at once. Raises OSError."""
    new = folder / f"{MANIFEST_FILE}.new"
    new.write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    os.replace(new, folder / MANIFEST_FILE)


def broken_files(folder: Path, manifest: Manifest) -> list[ManifestFile]:
    """Files that are missing or hold other bytes than the manifest says; reads every byte. Raises OSError."""
    broken = []
    for entry in manifest.files:
        path = folder / entry.file
        if not path.is_file() or path.stat().st_size != entry.size_bytes or sha256_of(path) != entry.sha256:
            broken.append(entry)
    return broken
