"""A repository of a model hub: which files one commit of it has, and their bytes, resumed and checked.

huggingface-hub speaks to the server: HF_ENDPOINT, HF_TOKEN, proxies, retries and progress bars are its own. A file is
read through plain HTTP into a part that survives a broken download, where the library's own download begins anew.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented, and not marked as exported

from nodes.model_tools.errors import HubUnreachable, ModelToolError

LIST_TIMEOUT_S = 30.0
DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # a hub's word that becomes the name of a file here
HASH_BLOCK_BYTES = 1 << 20
COMPLAINT_CHARS_MAX = 200
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
TRANSIENT_STATUSES = (408, 429)
# huggingface-hub has changed its HTTP client twice, and lets that client's errors through.
HTTP_CLIENTS = ("httpx2", "httpx", "httpcore2", "httpcore", "requests", "urllib3")


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a commit. path: in the repository. digest: hex, of the content in sha256 where is_sha256, else the
    sha1 that git gives the file."""

    path: str
    size_bytes: int
    digest: str
    is_sha256: bool


@dataclass(frozen=True, slots=True)
class HubListing:
    """The files of one commit by path. commit: the hash that the revision meant when it was asked for."""

    repo: str
    commit: str
    files: dict[str, HubFile]


def list_files(repo: str, revision: str) -> HubListing:
    """Ask the hub what a revision holds. Raises ModelToolError, HubUnreachable."""
    with _hub_errors(repo, revision):
        api = HfApi(endpoint=_endpoint())
        try:
            info = api.model_info(repo, revision=revision, files_metadata=True, timeout=LIST_TIMEOUT_S)
        except (TypeError, KeyError, AttributeError) as exc:
            raise ValueError("JSON that describes no repository") from exc
    if info.sha is None:
        raise ModelToolError(
            f"{repo}: {_endpoint_name()} names no commit for {revision!r}; is HF_ENDPOINT a model hub?"
        )
    files = {}
    for sibling in info.siblings or ():
        lfs = sibling.lfs
        digest = sibling.blob_id if lfs is None else lfs.sha256
        size = sibling.size if lfs is None else lfs.size
        if digest is not None and size is not None and DIGEST.fullmatch(digest):
            files[sibling.rfilename] = HubFile(sibling.rfilename, size, digest, is_sha256=lfs is not None)
    return HubListing(repo, info.sha, files)


def download(listing: HubListing, file: HubFile, target: Path, parts: Path) -> None:
    """Bring one file to target, which appears whole and checked or not at all. parts: folder for what is incomplete.

    Raises ModelToolError, HubUnreachable; the part read so far then stays, unless it was not the hub's bytes."""
    part = parts / f"{file.digest}.part"
    with _hub_errors(listing.repo, listing.commit):
        parts.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        had_bytes = part.stat().st_size if part.exists() else 0
        _read_into(part, listing, file)
        if not has_digest(part, file) and had_bytes:
            part.unlink()  # the bytes of an earlier run are not the hub's
            _read_into(part, listing, file)
        if not has_digest(part, file):
            part.unlink()
            raise HubUnreachable(
                f"{listing.repo}: {file.path} came with other bytes than {_endpoint_name()} announces; run the command "
                "again, and if it stays so ask whoever runs the proxy or mirror in between"
            )
        part.replace(target)


def _read_into(part: Path, listing: HubListing, file: HubFile) -> None:
    with part.open("ab") as stream:
        if stream.tell() > file.size_bytes:
            stream.truncate(0)
        http_get(
            hf_hub_url(listing.repo, file.path, revision=listing.commit, endpoint=_endpoint()),
            stream,
            resume_size=stream.seek(0, os.SEEK_END),
            # Compressed on the way, a file could not be resumed.
            headers={**build_hf_headers(), "accept-encoding": "identity"},
            expected_size=file.size_bytes,
            displayed_filename=file.path,
        )


def has_digest(path: Path, file: HubFile) -> bool:
    """Whether path holds the hub's bytes. Raises OSError."""
    if path.stat().st_size != file.size_bytes:
        return False
    if file.is_sha256:
        return _hash(path, hashlib.sha256()) == file.digest
    git = hashlib.sha1(b"blob %d\0" % file.size_bytes, usedforsecurity=False)
    return _hash(path, git) == file.digest


def sha256_of(path: Path) -> str:
    """Hex. Raises OSError."""
    return _hash(path, hashlib.sha256())


def _hash(path: Path, digest: hashlib._Hash) -> str:
    with path.open("rb") as stream:
        while block := stream.read(HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _endpoint() -> str | None:
    """Read anew: huggingface-hub reads it once, when it is imported. Raises ModelToolError where it is no URL."""
    endpoint = os.environ.get("HF_ENDPOINT") or None
    if endpoint is not None and not endpoint.startswith(("http://", "https://")):
        raise ModelToolError(f"HF_ENDPOINT is {endpoint[:100]!r}, and should be a URL such as https://hub.example")
    return endpoint


def _endpoint_name() -> str:
    return _endpoint() or "the hub"


@contextmanager
def _hub_errors(repo: str, revision: str) -> Iterator[None]:
    """Whatever goes wrong between here and the hub, as one line with the fix."""
    where = _endpoint_name()
    try:
        yield
    except HFValidationError as exc:
        raise ModelToolError(f"{repo!r} is no repository name; write it as OWNER/NAME") from exc
    except GatedRepoError as exc:
        raise ModelToolError(
            f"{repo} is gated: accept its terms on its page, and set HF_TOKEN to a token of that account"
        ) from exc
    except RevisionNotFoundError as exc:
        raise ModelToolError(f"{repo} has no revision {revision!r}; leave --revision out for the newest") from exc
    except RepositoryNotFoundError as exc:
        raise ModelToolError(
            f"{where} has no repository {repo}, or shows it to its owners only; check the spelling, and set HF_TOKEN "
            "if it is private"
        ) from exc
    except EntryNotFoundError as exc:
        raise ModelToolError(f"{repo} lost a file at {revision}; run the command with --revision main") from exc
    except OfflineModeIsEnabled as exc:
        raise ModelToolError("HF_HUB_OFFLINE is set, so nothing is downloaded; unset it") from exc
    except HfHubHTTPError as exc:
        status = exc.response.status_code
        if status in (401, 403):
            raise ModelToolError(
                f"{where} refuses {repo} ({status}); set HF_TOKEN to a token that may read it"
            ) from exc
        if status in TRANSIENT_STATUSES or status >= 500:
            raise HubUnreachable(f"{where} answered {status} for {repo}; run the command again later") from exc
        raise ModelToolError(f"{where} answered {status} for {repo}; is HF_ENDPOINT a model hub?") from exc
    except ValueError as exc:  # of the answer's JSON, which a hub's is
        raise ModelToolError(f"{where} does not answer as a model hub does; check HF_ENDPOINT and the proxy") from exc
    except Exception as exc:
        if isinstance(exc, OSError) and exc.errno in DISK_ERRORS:
            raise ModelToolError(
                f"{exc.filename or 'the disk'}: {exc.strerror}; free space, or give another folder with --out"
            ) from exc
        if not isinstance(exc, OSError) and type(exc).__module__.partition(".")[0] not in HTTP_CLIENTS:
            raise
        reason = (str(exc).splitlines() or [type(exc).__name__])[0][:COMPLAINT_CHARS_MAX]
        raise HubUnreachable(
            f"{where} cannot be reached ({reason}); check the network, or set HF_ENDPOINT to a mirror, and run the "
            "command again: it goes on where it stopped"
        ) from exc
