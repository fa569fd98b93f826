"""`models pull`: one model of a hub's repository into a folder that a node serves, pinned to a commit and checked.

A folder that its manifest finds whole is left alone and needs no network. Files come in an order that leaves the
manifest for last, so that a folder with a manifest was whole once.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from nodes.engine.onnx_file import OnnxFileInvalid, read_onnx_file
from nodes.model_tools.errors import ModelToolError
from nodes.model_tools.hub import HubFile, HubListing, download, has_digest, list_files, sha256_of
from nodes.model_tools.locking import held
from nodes.model_tools.manifest import (
    MANIFEST_FILE,
    Manifest,
    ManifestFile,
    broken_files,
    read_manifest,
    write_manifest,
)
from nodes.model_tools.variants import GENAI_CONFIG_FILE, Variant, choose_variant, companions, is_inside, place

DEFAULT_REVISION = "main"
PARTS_FOLDER = ".pull"  # in the model folder: what is incomplete, and the lock
DISK_RESERVE_BYTES = 64 * 1024 * 1024  # a disk filled to its last byte breaks more than this download

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Pulled:
    """What a pull did. downloaded_bytes: 0 where the folder was whole already."""

    folder: Path
    manifest: Manifest
    downloaded_files: int
    downloaded_bytes: int


def pull(repo: str, *, revision: str | None, variant: str | None, out: Path, say: Say = lambda line: None) -> Pulled:
    """Fill `out` with a model. revision: branch, tag or commit; None is what the folder is pinned to, else the newest.
    variant: None is the folder's, else the one that runs best on a CPU. say: told what is chosen and done.

    Raises ModelToolError and its HubUnreachable; what is whole stays, and the same call goes on from there."""
    _refuse_foreign(out)
    manifest = read_manifest(out)
    if manifest is not None and manifest.repo != repo:
        raise ModelToolError(f"{out} holds {manifest.repo}; give {repo} another folder with --out")
    try:
        (out / PARTS_FOLDER).mkdir(parents=True, exist_ok=True)
        busy = f"another pull is filling {out}; wait for it, or give another folder with --out"
        with held(out / PARTS_FOLDER / "lock", busy):
            try:
                pulled = _Pull(repo, revision, variant, out, manifest, say).run()
            finally:
                _tidy(out)
    except OSError as exc:
        raise ModelToolError(f"{exc.filename or out}: {exc.strerror}; give a writable folder with --out") from exc
    return pulled


def _tidy(out: Path) -> None:
    """Remove what was made for the work: all of it once the folder has its manifest or nothing came, else what is
    incomplete stays for the next pull."""
    names = {entry.name for entry in out.iterdir()}
    parts = list((out / PARTS_FOLDER).glob("*.part"))
    if MANIFEST_FILE in names and not parts:
        shutil.rmtree(out / PARTS_FOLDER, ignore_errors=True)
    elif names == {PARTS_FOLDER} and not parts:
        shutil.rmtree(out, ignore_errors=True)


def _refuse_foreign(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ModelToolError(f"{out} is a file; give a folder with --out")
    with suppress(FileNotFoundError):
        names = {entry.name for entry in out.iterdir()}
        if names and MANIFEST_FILE not in names and PARTS_FOLDER not in names:
            raise ModelToolError(f"{out} holds files that no pull put there; give another folder with --out")


class _Pull:
    def __init__(
        self, repo: str, revision: str | None, variant: str | None, out: Path, manifest: Manifest | None, say: Say
    ) -> None:
        self._repo = repo
        self._revision = revision
        self._variant = variant
        self._out = out
        self._manifest = manifest
        self._say = say
        self._files: dict[str, ManifestFile] = {}
        self._downloaded_files = 0
        self._downloaded_bytes = 0

    def run(self) -> Pulled:
        pinned = self._manifest
        if pinned is not None and self._asks_for(pinned):
            broken = broken_files(self._out, pinned)
            if not broken:
                return Pulled(self._out, pinned, 0, 0)
            names = ", ".join(entry.file for entry in broken)
            self._say(f"missing or damaged, downloaded again: {names}")
        revision = self._revision or (pinned.commit if pinned else DEFAULT_REVISION)
        listing = list_files(self._repo, revision)
        wanted = self._variant or (pinned.variant if pinned else None)
        variant = choose_variant(self._repo, listing.files, wanted)
        self._say(f"{self._repo} at {listing.commit}, variant {variant.name}")
        if pinned is not None and pinned.commit == listing.commit:
            placed = {entry.source: entry.file for entry in pinned.files if entry.source in listing.files}
            self._bring(listing, placed)
        self._fetch(listing, variant)
        named = self._revision or (pinned.revision if pinned else DEFAULT_REVISION)
        manifest = Manifest(
            repo=self._repo,
            revision=named,
            commit=listing.commit,
            variant=variant.name,
            files=tuple(self._files[name] for name in sorted(self._files)),
        )
        write_manifest(self._out, manifest)
        return Pulled(self._out, manifest, self._downloaded_files, self._downloaded_bytes)

    def _asks_for(self, pinned: Manifest) -> bool:
        """Whether the folder is pinned to what is wanted, which no hub need be asked for."""
        return self._revision in (None, pinned.commit) and self._variant in (None, pinned.variant)

    def _fetch(self, listing: HubListing, variant: Variant) -> None:
        self._bring(listing, companions(variant, listing.files))
        graph = variant.graph or self._graph_of_genai(variant)
        if graph not in listing.files:
            raise ModelToolError(f"{self._repo}: {graph}, which {GENAI_CONFIG_FILE} names, is not in the repository")
        self._bring(listing, {graph: place(variant, graph)})
        self._bring(listing, self._external_files(listing, variant, graph))

    def _graph_of_genai(self, variant: Variant) -> str:
        file = self._out / GENAI_CONFIG_FILE
        try:
            name = json.loads(file.read_bytes())["model"]["decoder"]["filename"]
        except (OSError, ValueError, LookupError, TypeError) as exc:
            raise ModelToolError(
                f"{self._repo}: its {GENAI_CONFIG_FILE} names no graph; choose another --variant"
            ) from exc
        if not isinstance(name, str) or not is_inside(name):
            raise ModelToolError(f"{self._repo}: {GENAI_CONFIG_FILE} names a graph outside its folder: {name!r}")
        return f"{variant.folder}/{name}" if variant.folder else name

    def _external_files(self, listing: HubListing, variant: Variant, graph: str) -> dict[str, str]:
        """The files that the graph says its weights are in, beside it."""
        try:
            locations = read_onnx_file(self._out / place(variant, graph)).external_files
        except OnnxFileInvalid as exc:
            raise ModelToolError(f"{self._repo}: {graph} is no ONNX graph ({exc}); choose another --variant") from exc
        placed = {}
        for location in sorted(locations):
            source = str(PurePosixPath(graph).parent / location)
            if not is_inside(location) or source not in listing.files:
                raise ModelToolError(
                    f"{self._repo}: {graph} has weights in {location!r}, which the repository does not hold beside it; "
                    "choose another --variant"
                )
            placed[source] = place(variant, source)
        return placed

    def _bring(self, listing: HubListing, placed: dict[str, str]) -> None:
        """Download what is not there yet. placed: place in the model folder by path in the repository."""
        if foreign := [source for source, name in placed.items() if not is_inside(name)]:
            raise ModelToolError(f"{self._repo}: {foreign[0]!r} would be written outside the folder; do not use it")
        missing = [
            listing.files[source] for source, name in placed.items() if not self._is_there(listing, source, name)
        ]
        self._check_disk(missing)
        for file in missing:
            target = self._out / placed[file.path]
            download(listing, file, target, self._out / PARTS_FOLDER)
            self._downloaded_files += 1
            self._downloaded_bytes += file.size_bytes
        for source, name in placed.items():
            file = listing.files[source]
            digest = file.digest if file.is_sha256 else sha256_of(self._out / name)
            self._files[name] = ManifestFile(name, source, file.size_bytes, digest)

    def _is_there(self, listing: HubListing, source: str, name: str) -> bool:
        target = self._out / name
        return target.is_file() and has_digest(target, listing.files[source])

    def _check_disk(self, missing: list[HubFile]) -> None:
        parts = self._out / PARTS_FOLDER
        have = sum(part.stat().st_size for file in missing if (part := parts / f"{file.digest}.part").exists())
        needed_mb = (sum(file.size_bytes for file in missing) - have) / 1e6
        free_mb = max(0, shutil.disk_usage(self._out).free - DISK_RESERVE_BYTES) / 1e6
        if needed_mb > free_mb:
            raise ModelToolError(
                f"{self._out}: {needed_mb:,.0f} MB are to come, and {free_mb:,.0f} MB are free there; "
                "give a folder on another disk with --out, or choose a smaller --variant"
            )
