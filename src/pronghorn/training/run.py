"""``train``: one configuration in, one run folder out; started again on the same folder it goes on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from transformers import TrainerCallback, set_seed

from pronghorn.errors import (
    ConfigError,
    MissingDependencyError,
    NotSupportedError,
    Preempted,
    PronghornError,
    RunConflictError,
)
from pronghorn.training import ranks
from pronghorn.training.checkpoint import Checkpoint, list_checkpoints, newest_valid, rotate
from pronghorn.training.config import RunConfig, as_config, with_lora_defaults
from pronghorn.training.failures import is_out_of_memory, out_of_memory, save_failed
from pronghorn.training.folder import RunFolder, write_json, write_whole
from pronghorn.training.lock import RunLock
from pronghorn.training.manifest import (
    add_fallbacks,
    changed_versions,
    require_same_config,
    require_same_content,
)
from pronghorn.training.material import Material, gather
from pronghorn.training.metrics import MetricsLog, read_metrics
from pronghorn.training.progress import Narrator
from pronghorn.training.signals import StopSignals
from pronghorn.training.trackers import check_trackers

if TYPE_CHECKING:
    from pronghorn.training.meter import Meter


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    ``losses`` has one value per optimizer step; ``eval`` is the last evaluation (``eval_loss`` in nats per
    token, ``eval_token_accuracy``, ``eval_tokens``), None without an evaluation split; ``resumed_from`` the
    step of the checkpoint this call went on from; ``was_finished`` whether there was nothing left to do.
    """

    folder: Path
    adapter: Path
    steps: int
    losses: tuple[float, ...]
    eval: dict[str, float] | None
    resumed_from: int | None = None
    was_finished: bool = False


def train(
    config: RunConfig | str | Path | dict[str, Any], *, callbacks: Sequence[TrainerCallback] = ()
) -> RunResult:
    """Fine-tune as ``config`` says, into ``output.folder``; an unfinished run in that folder is resumed.

    Args:
        config: A RunConfig, the path of a run.yaml, or its content as a mapping.
        callbacks: Further callbacks for the Trainer (transformers' own kind).

    Raises:
        ConfigError: a key or value is wrong.
        SourceError, AdapterError, DataError: the base, the adapter or the rows cannot be used.
        RunConflictError: the folder holds another run or other files, or another process works in it.
        NonFiniteLossError: the loss or a gradient became NaN or infinite; the last good checkpoint stays.
        OutOfMemoryError: names the setting to change.
        Preempted: a signal stopped the run, its state is sealed; calling again goes on.
        TrainingError: a checkpoint could not be written or restored.
    """
    config = as_config(config)
    folder = RunFolder(config.output.folder.expanduser().absolute())
    ranks.join()
    narrator = Narrator(quiet=config.logging.progress == "none" or not ranks.is_first())
    if ranks.is_first():
        folder.create()
    ranks.wait()
    lock = RunLock(folder.root) if ranks.is_first() else contextlib.nullcontext()
    with lock, StopSignals() as stop, _kept_environment():
        config = _settled(config, folder)
        if folder.adapter.is_dir():
            narrator.say(f"{folder.root} is a finished run; its adapter is {folder.adapter}")
            return _result(folder, was_finished=True)
        if ranks.is_first():
            folder.clean()
        ranks.wait()
        return _run(config, folder, narrator, stop, callbacks)


def _settled(config: RunConfig, folder: RunFolder) -> RunConfig:
    """The configuration with nothing left open, compared with that of the run which the folder holds."""
    if not folder.config.exists():
        return with_lora_defaults(config)
    try:
        old = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{folder.config} is not valid YAML: {error}", fix="choose another output.folder"
        ) from None
    if not isinstance(old, dict) or "schema_version" not in old:  # every resolved one says it
        raise RunConflictError(
            f"{folder.config} was not written by a run, and would be replaced",
            fix="move it out of output.folder, or choose another output.folder",
        )
    if not _holds_progress(folder):
        return with_lora_defaults(config)
    if config.lora is None and old.get("lora") is not None:
        config = with_lora_defaults(config, adapter=False)
    require_same_config(old, config, folder.root)
    return config


def _holds_progress(folder: RunFolder) -> bool:
    """Whether there is a sealed state or an adapter to lose; before that, another run.yaml may start over."""
    return folder.adapter.is_dir() or bool(list_checkpoints(folder.checkpoints))


def _run(
    config: RunConfig,
    folder: RunFolder,
    narrator: Narrator,
    stop: StopSignals,
    callbacks: Sequence[TrainerCallback],
) -> RunResult:
    check_trackers(config.logging.report_to)
    if ranks.is_first():
        write_whole(folder.config, config.to_yaml())
    meter = _planned(config, narrator)
    set_seed(config.seed)
    try:
        material = gather(config, narrator)
    except Exception as error:
        if is_out_of_memory(error):
            raise out_of_memory(config, 0, "loading") from error
        raise
    if _holds_progress(folder):
        require_same_content(folder.manifest, material.manifest)
    start = newest_valid(folder.checkpoints, narrator.say)
    ranks.wait()  # all have looked before the first one tidies up
    if start is not None:
        if ranks.is_first():  # the run may have been killed just before it
            rotate(folder.checkpoints, config.checkpoints.keep)
        changed = changed_versions(folder.manifest)
        if changed:
            narrator.say(f"libraries changed since the run began: {', '.join(changed)}")
    if ranks.is_first():
        write_whole(folder.page, material.inspection.html())
        narrator.say(f"what trains, token by token: {folder.page}")
        if start is None or not folder.manifest.exists():
            planned = {} if meter is None else {"plan": meter.plan.as_dict()}
            write_json(folder.manifest, {**material.manifest, **planned})
        MetricsLog(folder.metrics).continue_after(-1 if start is None else start.step)
    _loop(config, folder, narrator, stop, material, start, callbacks, meter)
    if ranks.is_first():
        material.save(folder.adapter)
        folder.clean()
        folder.scratch.rmdir()
    ranks.wait()
    narrator.say(f"adapter written to {folder.adapter}")
    return _result(folder, resumed_from=start.step if start else None)


def _planned(config: RunConfig, narrator: Narrator) -> Meter | None:
    """Plan the run before anything is loaded, and refuse it if it does not fit; None where that is skipped.

    Raises:
        OutOfMemoryError: the run does not fit, and ``training.over_budget`` is "refuse".
        MissingDependencyError: trl is not installed.
    """
    if config.training.over_budget == "skip":
        return None
    try:
        from pronghorn.training.meter import Meter
        from pronghorn.training.plan import Planner, detect, require_fit
    except ImportError as error:
        raise MissingDependencyError(f"training needs trl: {error}", fix="pip install trl") from error
    try:
        planner = Planner(config, detect())
    except NotSupportedError as error:  # what cannot be loaded either says so again when it is
        narrator.say(f"memory is not predicted: {error.message}")
        return None
    made = planner.brief()
    narrator.say(str(made))
    if config.training.over_budget == "refuse":
        require_fit(made)
    return Meter(planner, made)


def _loop(
    config: RunConfig,
    folder: RunFolder,
    narrator: Narrator,
    stop: StopSignals,
    material: Material,
    start: Checkpoint | None,
    callbacks: Sequence[TrainerCallback],
    meter: Meter | None,
) -> None:
    try:
        from pronghorn.training.loop import Loop
    except ImportError as error:
        raise MissingDependencyError(f"training needs trl: {error}", fix="pip install trl") from error
    loop: Loop | None = None
    try:
        loop = Loop(config, folder, narrator, stop, material, callbacks)
        loop.run(start, meter)
    except PronghornError:
        raise
    except Exception as error:
        step, phase = (loop.step + 1, loop.phase) if loop else (0, "loading")
        if is_out_of_memory(error):
            raise out_of_memory(config, step, phase) from error
        if phase == "saving" and loop is not None:
            raise save_failed(error, loop.step, loop.last_sealed) from error
        raise
    finally:
        if loop is not None:
            loop.close()
    if material.acceleration is not None and (counted := material.acceleration.fallbacks()):
        for kind, reasons in add_fallbacks(folder.manifest, counted).items():
            why = "; ".join(f"{calls}: {reason}" for reason, calls in reasons.items())
            narrator.say(f"calls that ran the original {kind}: {why}")
    if loop.unfinished:
        raise Preempted(
            f"stopped by {stop.requested} after step {loop.step} of {loop.total}; its checkpoint is "
            f"{folder.checkpoints / f'step-{loop.step}'}",
            fix="run the same command again to go on",
        )


def _result(folder: RunFolder, *, resumed_from: int | None = None, was_finished: bool = False) -> RunResult:
    rows = read_metrics(folder.metrics)
    losses = tuple(float(row["loss"]) for row in rows if "loss" in row)
    evaluations = [row for row in rows if "eval_loss" in row]
    last = (
        {key: value for key, value in evaluations[-1].items() if key.startswith("eval_")}
        if evaluations
        else None
    )
    return RunResult(folder.root, folder.adapter, len(losses), losses, last, resumed_from, was_finished)


@contextlib.contextmanager
def _kept_environment() -> Iterator[None]:
    """Give the process its environment back: transformers and accelerate write settings of a run into it."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update({name: value for name, value in before.items() if os.environ.get(name) != value})
