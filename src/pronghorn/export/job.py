"""One export: where from, where to, and the check of what was staged before it appears."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pronghorn.adapters.files import AdapterFolder, no_adapter, read_adapter
from pronghorn.adapters.tokenizer_files import TOKENIZER_FILES
from pronghorn.errors import VerificationError
from pronghorn.export.merged import Progress
from pronghorn.export.onto import Onto
from pronghorn.export.verify import verify as check
from pronghorn.export.verify_folder import Row
from pronghorn.sources.source import Source, SourceKind

# marks, in a Source's config, an adapter that lies in a subfolder of the folder that was named
SUBFOLDER = "_pronghorn_subfolder"


@dataclass(frozen=True)
class Watch:
    """What is told while an export writes.

    ``bytes`` is called with the bytes of weights written so far and in all, ``file`` with each file of merged
    weights once it is complete and on the disk, before the folder is verified and appears.
    """

    bytes: Progress | None = None
    file: Callable[[Path], None] | None = None


@dataclass(frozen=True)
class Job:
    """What ``export`` was asked for, resolved; of a model that is whole, ``adapter`` is that model, too."""

    adapter: Source
    base: Source
    target: Path
    overwrite: bool
    verify: bool
    progress: Progress | None
    onto: Onto = "decoded"
    text_only: bool = False
    goal: Path | None = None
    """where the result of a step in between (``target``) ends up: what messages name"""
    finished: Callable[[Path], None] | None = None
    """told of each file of merged weights, where these are the result and no step in between"""

    @property
    def named(self) -> Path:
        """The folder the caller asked for."""
        return self.goal or self.target

    @property
    def whole(self) -> bool:
        """Whether a whole model was given, with no adapter to merge."""
        return self.adapter.kind is SourceKind.BASE

    def read_adapter(self) -> AdapterFolder:
        """What is merged into the base: nothing where the model is whole.

        Raises:
            AdapterError, NotSupportedError, SourceError: as ``adapters.files.read_adapter``.
        """
        return no_adapter(self.base.path) if self.whole else read_adapter(self.adapter.path)

    @property
    def tokenizer(self) -> Path:
        """Where the tokenizer of training lies: with the adapter, or one up where PEFT made a subfolder."""
        places = (self.adapter.path, self.adapter.path.parent)
        named = places if self.adapter.config.get(SUBFOLDER) else places[:1]
        return next((place for place in named if (place / TOKENIZER_FILES[1]).is_file()), places[0])


def verified(job: Job, staging: Path, *, against: Path | None, deep: bool | None = None) -> tuple[Row, ...]:
    """Check the staged folder, the deep part in a fresh process; a broken promise keeps it from appearing.

    Raises:
        VerificationError: a promise is broken, or could not be checked.
    """
    deep = against is not None if deep is None else deep
    report = check(staging, deep=deep, against=against, base=job.base.path, onto=job.onto)
    failure = report.first_failure
    if failure is None:
        return report.rows
    detail = failure.detail.replace(str(staging), str(job.named))
    if failure.ok is None:
        raise VerificationError(
            f"{job.named} was not verified, so it was not written: {failure.name}: {detail}",
            fix="remove the cause, or export with verify=False (--no-verify) and check it elsewhere",
        )
    raise VerificationError(
        f"{job.named} was not written, it would break a promise: {failure.name}: {detail}",
        fix="please report this; verify=False (--no-verify) writes the folder for a closer look",
    )
