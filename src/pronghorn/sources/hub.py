"""Hub snapshots through huggingface_hub: one fixed commit, only the files a loader reads, never a pickle."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from pronghorn.errors import SourceError

FILE_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")
# a second copy of the weights in their maker's own layout, and all subfolders (onnx/, original/)
SKIPPED_PATTERNS = ("consolidated*", "*/*")
CODE_PATTERN = "*.py"
CARD = "README.md"


def download(name: str, *, revision: str | None, token: str | bool | None, code: bool) -> tuple[Path, str]:
    """Fetch (or find in the cache) the snapshot of a hub model; returns its folder and its commit.

    HF_HUB_OFFLINE=1 and HF_ENDPOINT are obeyed by huggingface_hub itself. ``code`` also fetches .py files.

    Raises:
        SourceError: no such id or revision, no access, or the hub is out of reach and not in the cache.
    """
    patterns = [*FILE_PATTERNS, CODE_PATTERN] if code else list(FILE_PATTERNS)
    try:
        folder = huggingface_hub.snapshot_download(
            name,
            revision=revision,
            token=token,
            allow_patterns=patterns,
            ignore_patterns=list(SKIPPED_PATTERNS),
        )
    except Exception as error:  # the client's HTTP library, and with it its errors, changed between versions
        raise _explain(name, revision, error) from error
    return Path(folder), Path(folder).name


def read_card(name: str, revision: str | None) -> str | None:
    """The model card of a hub model at a revision; None where it has none or it cannot be read."""
    try:
        return Path(huggingface_hub.hf_hub_download(name, CARD, revision=revision)).read_text(
            encoding="utf-8"
        )
    except Exception:  # a card adds to what is said of a base, and nothing depends on it
        return None


def _explain(name: str, revision: str | None, error: Exception) -> SourceError:
    at = f" at revision {revision!r}" if revision else ""
    if isinstance(error, HFValidationError):
        return SourceError(
            f"{name!r} is neither a local folder nor a hub id (owner/model)",
            fix="check the path for typing errors",
        )
    if isinstance(error, GatedRepoError):
        return SourceError(
            f"the hub model {name!r} is gated and this account has no access",
            fix="accept its terms on the model's page, then pass token= or run `hf auth login`",
        )
    if isinstance(error, RepositoryNotFoundError):
        return SourceError(
            f"{name!r} is not a local folder, and the hub has no such model (or hides it without a token)",
            fix="check the spelling; for a private model pass token=",
        )
    if isinstance(error, RevisionNotFoundError):
        return SourceError(
            f"the hub model {name!r} has no revision {revision!r}", fix="check the branch, tag or commit"
        )
    if isinstance(error, LocalEntryNotFoundError):
        return SourceError(
            f"{name!r} is not a local folder; the hub was not reached, the cache does not hold the model{at}",
            fix="go online once (unset HF_HUB_OFFLINE) to download it, or pass the path of a local copy",
        )
    if isinstance(error, EntryNotFoundError):
        return SourceError(f"the hub model {name!r}{at} lacks a file: {error}", fix="choose another revision")
    return SourceError(
        f"the hub model {name!r}{at} could not be downloaded: {type(error).__name__}: {error}",
        fix="check the network and the disk, then run again: what was downloaded is kept",
    )
