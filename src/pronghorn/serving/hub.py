"""Uploads to the hub: content goes up file by file and is not visible; one commit makes all of it visible.

The only place that writes to the hub. Content that reached it is known by its hash: after an interruption it
is not sent again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    ModelCardData,
    get_token,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from pronghorn import __version__
from pronghorn.errors import ExportError, PronghornError
from pronghorn.sources.hub import CARD

_OWN_FILES = frozenset({".gitattributes", CARD})  # what the hub itself, or a person on its pages, puts there
_NAMES = 3


@dataclass(frozen=True)
class Push:
    """Where to upload.

    ``repo`` is OWNER/NAME, or NAME alone for the token's account; ``token`` None is the one of ``hf auth
    login`` or HF_TOKEN; ``private`` None leaves a new repository to the account's default. ``overwrite``
    replaces what the repository holds.
    """

    repo: str
    token: str | None = field(default=None, repr=False)
    private: bool | None = None
    overwrite: bool = False
    message: str = "Upload by pronghorn"


@dataclass(frozen=True)
class Pushed:
    """What a push did: ``commit`` holds exactly the files of the folder, and the card unless it was kept."""

    repo: str
    url: str
    commit: str
    files: int
    bytes_sent: int
    removed: tuple[str, ...]
    card: str

    def __str__(self) -> str:
        removed = f"; removed {_listed(self.removed)}" if self.removed else ""
        size = f"{self.files} files, {self.bytes_sent / 1e6:,.1f} MB"
        return f"pushed to {self.url} (commit {self.commit[:12]}): {size}{removed}; model card: {self.card}"


class Upload:
    """An upload that was allowed: the repository is there, may be written, and holds nothing of others.

    Raises:
        ExportError: no token, no right to the repository, other content in it, offline. Nothing was uploaded.
    """

    def __init__(self, push: Push) -> None:
        self._push = push
        self.failure: ExportError | None = None
        self._sent: dict[str, CommitOperationAdd] = {}
        if push.token is None and get_token() is None:
            raise ExportError(
                f"{push.repo} was not pushed: there is no token for the hub",
                fix="run `hf auth login`, set HF_TOKEN, or pass token= of an account that may write there",
            )
        self._api = HfApi(token=push.token, library_name="pronghorn", library_version=__version__)
        with _explained(push.repo):
            made = self._api.create_repo(push.repo, private=push.private, exist_ok=True)
            self.repo, self._url = made.repo_id, str(made)
            info = self._api.model_info(self.repo)
            # asks only how such a file would be sent, which needs the right to write: known before any work
            self._api.preupload_lfs_files(self.repo, [CommitOperationAdd(CARD, b"-")], revision="main")
        self._parent = info.sha
        self._existing = {one.rfilename for one in info.siblings or ()}
        self._check_privacy(bool(info.private))
        self._check_content()

    def _check_privacy(self, private: bool) -> None:
        if self._push.private is not None and self._push.private != private:
            asked, found = ("private", "public") if self._push.private else ("public", "private")
            raise ExportError(
                f"{self.repo} exists and is {found}, asked for was {asked}",
                fix=f"make it {asked} in its settings on the hub, leave private out, or choose another name",
            )

    def _check_content(self) -> None:
        other = sorted(self._existing - _OWN_FILES)
        if other and not self._push.overwrite:
            raise ExportError(
                f"{self.repo} exists and holds {len(other)} files ({_listed(other)})",
                fix="choose another name, or say overwrite=True (--overwrite) to replace them in one commit",
            )

    def card_there(self) -> str | None:
        """The model card that the repository holds."""
        if CARD not in self._existing:
            return None
        with _explained(self.repo):
            path = self._api.hf_hub_download(self.repo, CARD, revision=self._parent)
        return Path(path).read_text(encoding="utf-8")

    def send(self, path: Path) -> None:
        """Upload one finished file; it stays invisible. ``commit`` raises a failure; the rest is left."""
        if self.failure is not None:
            return
        addition = CommitOperationAdd(path.name, path)
        try:
            with _explained(self.repo):
                self._api.preupload_lfs_files(self.repo, [addition], revision="main")
        except ExportError as error:
            self.failure = error
            return
        if addition.path_or_fileobj == b"":  # the library's mark of content that it sent; small files wait
            self._sent[path.name] = addition

    def commit(self, folder: Path, card: bytes | None, told: str) -> Pushed:
        """Send what is left and make all of it visible, in place of what was there; then compare.

        Args:
            folder: all its files are uploaded but the card.
            card: the content of README.md; None leaves what the repository has.
            told: what became of the card, for the report.

        Raises:
            ExportError: the upload failed and nothing became visible, or what is there is not the folder.
        """
        if self.failure is not None:
            raise self.failure
        additions = [
            self._sent.get(name) or CommitOperationAdd(name, folder / name) for name in files_of(folder)
        ]
        if card is not None:
            additions.append(CommitOperationAdd(CARD, card))
        named = {one.path_in_repo for one in additions}
        stale = sorted(self._existing - named - _OWN_FILES)
        with _explained(self.repo):
            done = self._api.create_commit(
                self.repo,
                [*additions, *map(CommitOperationDelete, stale)],
                commit_message=self._push.message,
                parent_commit=self._parent,
            )
            self._compare(done.oid, additions)
        size = sum(one.upload_info.size for one in additions)
        return Pushed(self.repo, self._url, done.oid, len(additions), size, tuple(stale), told)

    def _compare(self, commit: str, additions: Iterable[CommitOperationAdd]) -> None:
        """What the hub says it holds, against what was meant: names, sizes, and hashes of large files."""
        info = self._api.model_info(self.repo, revision=commit, files_metadata=True)
        there = {one.rfilename: one for one in info.siblings or ()}
        wrong = []
        for one in additions:
            found = there.pop(one.path_in_repo, None)
            large = found.lfs if found is not None else None
            same = found is not None and found.size == one.upload_info.size
            if not same or (large is not None and large.sha256 != one.upload_info.sha256.hex()):
                wrong.append(one.path_in_repo)
        wrong += sorted(set(there) - _OWN_FILES)
        if wrong:
            raise ExportError(
                f"{self.repo} at {commit[:12]} is not what was pushed: {_listed(wrong)}",
                fix="look for a .gitignore in the repository, and push again with overwrite (--overwrite)",
            )


def files_of(folder: Path) -> list[str]:
    """The files of a folder that are uploaded, relative to it: all but hidden ones and the card."""
    found = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    return [
        path.as_posix()
        for path in found
        if path.as_posix() != CARD and not any(part.startswith(".") for part in path.parts)
    ]


def template_lines() -> frozenset[str]:
    """The lines of the empty card that PEFT writes beside every adapter."""
    return frozenset(ModelCard.from_template(ModelCardData()).text.splitlines())


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    try:
        yield
    except PronghornError:
        raise
    except Exception as error:  # the client's HTTP library, and with it its errors, changed between versions
        raise _explain(repo, error) from error


_STATUS: Mapping[int, tuple[str, str]] = {
    401: ("the hub does not accept the token", "run `hf auth login` again, or pass a valid token"),
    403: (
        "this token has no right to write there",
        "use a token with write permission for its owner, or name a repository of your own",
    ),
    409: ("somebody else changed the repository meanwhile", "look at it, then push again"),
    412: ("somebody else changed the repository meanwhile", "look at it, then push again"),
}


def _explain(repo: str, error: Exception) -> ExportError:
    if isinstance(error, HFValidationError):
        return ExportError(f"{repo!r} is no name on the hub", fix="write OWNER/NAME, or NAME alone")
    if isinstance(error, OfflineModeIsEnabled):
        return ExportError(
            f"{repo} was not pushed: the hub is switched off (HF_HUB_OFFLINE)", fix="unset HF_HUB_OFFLINE"
        )
    known = _STATUS.get(_status(error))
    if known is not None:
        return ExportError(f"{repo} was not pushed: {known[0]}", fix=known[1])
    return ExportError(
        f"{repo} was not pushed: {type(error).__name__}: {error}",
        fix="check the network and push again: content that reached the hub is not sent twice",
    )


def _status(error: BaseException | None) -> int:
    """The HTTP status behind an error, which the client may have wrapped; 0 without one."""
    while error is not None:
        if isinstance(error, HfHubHTTPError) and error.response is not None:
            return int(error.response.status_code)
        error = error.__cause__
    return 0


def _listed(names: Iterable[str]) -> str:
    found = list(names)
    shown = ", ".join(found[:_NAMES])
    return shown if len(found) <= _NAMES else f"{shown} and {len(found) - _NAMES} more"
