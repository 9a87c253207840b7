"""Push a finished folder, or an export while it is written, to the hub, with a model card."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from pronghorn.errors import ExportError
from pronghorn.export.verify import verify
from pronghorn.export.verify_folder import Row
from pronghorn.serving.card import Result, is_empty, is_ours, model_card
from pronghorn.serving.hub import Push, Pushed, Upload, files_of, template_lines
from pronghorn.sources.hub import CARD
from pronghorn.sources.record import read_record
from pronghorn.sources.resolve import ADAPTER_CONFIG

if TYPE_CHECKING:
    from pronghorn.export.job import Watch
    from pronghorn.export.merged import Progress
    from pronghorn.export.report import ExportReport

# a training's own state beside the weights: files that run code when they are opened
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


def push_folder(folder: str | Path, push: Push, *, adapter: str | Path | None = None) -> Pushed:
    """Check a folder's files and upload it: a model, an adapter or GGUF, made by pronghorn or another tool.

    Args:
        folder: nothing in it is changed.
        push: where to.
        adapter: of a merged model, the adapter's folder, from which the card tells base, data and metrics.

    Raises:
        SourceError: ``folder`` holds no model.
        VerificationError: it breaks a promise; nothing was uploaded.
        ExportError: the hub refuses, or holds something else; nothing became visible.
    """
    place = Path(folder).expanduser().resolve()
    rows = _checked(place)
    pickles = [name for name in files_of(place) if any(fnmatch(name, pattern) for pattern in _PICKLES)]
    if pickles:
        raise ExportError(
            f"{folder} holds {pickles[0]}, which runs code when it is opened",
            fix="write a clean folder first: pronghorn export ADAPTER DIR --format lora",
        )
    is_adapter = (place / ADAPTER_CONFIG).is_file()
    trained = Path(adapter).expanduser().resolve() if adapter is not None else place if is_adapter else None
    kind = "lora" if is_adapter else "gguf" if any(place.glob("*.gguf")) else "model"
    record = read_record(trained) if trained is not None else None
    base = Path(record.base_path) if record is not None and record.base_path else None
    return _finish(Upload(push), Result(place, kind, trained, base, rows))


def push_export(
    push: Push,
    write: Callable[[Watch], ExportReport],
    *,
    progress: Progress | None = None,
    stays: bool = True,
) -> tuple[ExportReport, Pushed]:
    """Export and upload: shards of a merge go up while others are written; visible when verified.

    The folder appears under its own name before anything is visible on the hub. Where the upload fails, the
    export still goes on to its end.

    Args:
        push: where to; the right to write there is known before anything is written.
        write: calls ``export`` with the watch it is given as ``progress``.
        progress: bytes written so far and in all.
        stays: whether the folder outlives the call, so that it can be pushed again.

    Raises:
        ExportError: the hub refuses, or the export failed; nothing became visible.
    """
    from pronghorn.export.job import Watch

    upload = Upload(push)
    report = write(Watch(progress, upload.send))
    checks = report.checks or _checked(report.folder)
    adapter = None if report.whole else report.adapter
    result = Result(report.folder, report.format, adapter, report.base, checks, report.warnings, report.onto)
    try:
        return report, _finish(upload, result)
    except ExportError as error:
        if not stays:
            raise
        raise ExportError(
            f"{error.message}. The folder {report.folder} is complete",
            fix=f"{error.fix}; pronghorn push {report.folder} {push.repo}"
            + (f" --adapter {adapter}" if adapter is not None else ""),
        ) from error


def _checked(folder: Path) -> tuple[Row, ...]:
    report = verify(folder)
    report.raise_if_broken()
    return report.rows


def _finish(upload: Upload, result: Result) -> Pushed:
    card, told = _choose_card(upload, result)
    return upload.commit(result.folder, card.encode() if card is not None else None, told)


def _choose_card(upload: Upload, result: Result) -> tuple[str | None, str]:
    """A card that a person wrote, in the folder or on the hub; else one made here."""
    template = template_lines()
    own, base = _text(result.folder / CARD), _text(result.base / CARD) if result.base is not None else None
    if own is not None and own != base and not is_ours(own) and not is_empty(own, template):
        return own, f"the folder's {CARD}"
    there = upload.card_there()
    if there is not None and not is_ours(there) and not is_empty(there, template):
        return None, "the one in the repository was kept"
    return model_card(upload.repo, result), "made from the files of the run"


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None
