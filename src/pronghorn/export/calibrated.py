"""Quantised formats with calibration: llm-compressor chooses the codes, by GPTQ on given rows.

Only codes and scales are taken from it. Files, names, config and tokenizer are those of the merge, which is
checked in 16 bit first.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from pronghorn.adapters.tokenizer_files import CONFIG, TOKENIZER_FILES
from pronghorn.data.options import DataOptions
from pronghorn.data.prepare import prepare
from pronghorn.errors import ConfigError, ExportError, NotSupportedError
from pronghorn.export.calibrate_engine import compressor, solve
from pronghorn.export.files import check_space, copy_into, small_files
from pronghorn.export.job import Job, verified
from pronghorn.export.layout import OutputShard, OutputTensor, write_header
from pronghorn.export.merged import write_shards
from pronghorn.export.quantized import Quantisation, parts_of, plan_quantisation
from pronghorn.export.report import ExportReport
from pronghorn.export.text_only import weights_of
from pronghorn.sources.resolve import read_json
from pronghorn.weights.folder import WeightFolder, open_weights
from pronghorn.weights.shards import Shard, TensorEntry
from pronghorn.weights.writer import StagedFolder

CALIBRATED = ("w4a16",)
# what llm-compressor's examples use: more rows changed little
_MOST_ROWS, _MOST_TOKENS = 512, 2048


@dataclass(frozen=True)
class CalibratedJob:
    """``rows`` are as for training; ``python`` has llmcompressor, where it is not this interpreter."""

    job: Job
    format: str
    rows: Path
    python: Path | None
    merge: Callable[[Job], ExportReport]


def write_calibrated(work: CalibratedJob) -> ExportReport:
    """Merge, calibrate, and write the codes that GPTQ chose.

    Raises:
        ConfigError: a format that is not calibrated.
        MissingDependencyError: llm-compressor is not installed.
        DataError: the rows cannot be used.
        NotSupportedError: the model cannot be quantised so.
        ExportError: llm-compressor failed, or gave other tensors than asked for; nothing appears.
        VerificationError: the merge or the result broke a promise; nothing appears.
    """
    job = work.job
    if work.format not in CALIBRATED:
        raise ConfigError(
            f"calibrate does nothing for the format {work.format}",
            fix=f"leave it out, or use {' or '.join(CALIBRATED)}",
        )
    weights = weights_of(job).weights
    _plan(work.format, weights, dict(job.base.config), job.base.path, text_only=job.text_only)
    python = compressor(work.python)
    rows = _tokenised(work)
    goal = job.target
    goal.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{goal.name}.merged-", dir=goal.parent) as scratch:
        merged = Path(scratch) / "merged"
        report = work.merge(replace(job, target=merged, overwrite=False, goal=goal))
        weights = open_weights(merged)
        plan = _plan(work.format, weights, read_json(merged / CONFIG), merged)
        solve(python, merged, rows, plan.scheme.config(plan.ignore), Path(scratch) / "codes")
        shards = _lay_out(weights, plan, open_weights(Path(scratch) / "codes"))
        written = sum(shard.size for shard in shards)
        check_space(goal, written)
        with StagedFolder(goal, job.overwrite) as staging:
            write_shards(shards, weights.shards[0], staging)
            _write_rest(merged, weights, plan, shards, staging)
            checks = verified(job, staging, against=job.adapter.path) if job.verify else ()
    told = f"{plan.told}; codes chosen by GPTQ (llm-compressor) on {len(rows)} rows"
    edit = f"{CONFIG}: quantization_config added ({plan.scheme.layout})"
    return replace(
        report,
        folder=goal,
        format=work.format,
        bytes_written=written,
        changes=(told, edit, *report.changes),
        checks=checks,
    )


def _plan(
    format_: str, weights: WeightFolder, config: dict[str, Any], folder: Path, *, text_only: bool = False
) -> Quantisation:
    plan = plan_quantisation(format_, weights, config, folder, text_only=text_only)
    mixture = any(".experts." in name for name in plan.coded)
    if mixture or plan.towers:
        kind = "a mixture of experts" if mixture else "a multimodal model"
        raise NotSupportedError(
            f"calibration of {kind} is not proven", fix="leave out calibrate (--calibrate)"
        )
    return replace(plan, scheme=replace(plan.scheme, order="static"))


def _tokenised(work: CalibratedJob) -> list[list[int]]:
    """Token ids of the rows, as training would see them."""
    tokenizer = work.job.tokenizer
    home = tokenizer if (tokenizer / TOKENIZER_FILES[1]).is_file() else work.job.base.path
    opened = AutoTokenizer.from_pretrained(home, local_files_only=True, trust_remote_code=False)
    prepared = prepare(DataOptions(train=(str(work.rows),)), opened, opened.model_max_length).train
    return [
        list(row["input_ids"])[:_MOST_TOKENS]
        for row in prepared.select(range(min(len(prepared), _MOST_ROWS)))
    ]


def _lay_out(weights: WeightFolder, plan: Quantisation, codes: WeightFolder) -> tuple[OutputShard, ...]:
    """The merged model's files again; what is coded is taken from ``codes``."""
    return tuple(_shard(shard, plan, codes) for shard in weights.shards)


def _shard(shard: Shard, plan: Quantisation, codes: WeightFolder) -> OutputShard:
    wanted: list[TensorEntry] = []
    found: list[tuple[Shard, TensorEntry]] = []
    for entry in shard.tensors.values():
        if entry.name in plan.coded:
            parts = parts_of(entry, plan.scheme)
            wanted += parts
            found += [_found(part, codes) for part in parts]
        else:
            wanted.append(entry)
            found.append((shard, entry))
    prefix, placed = write_header({"format": "pt"}, wanted)
    tensors = (OutputTensor(entry, base, None) for entry, base in zip(placed, found, strict=True))
    return OutputShard(shard.path.name, prefix, tuple(tensors))


def _found(part: TensorEntry, codes: WeightFolder) -> tuple[Shard, TensorEntry]:
    shard, entry = codes.tensors.get(part.name, (None, None))
    if shard is None or entry is None or (entry.shape, entry.dtype) != (part.shape, part.dtype):
        given = f"gave {entry.dtype} {list(entry.shape)}" if entry else "did not give it"
        raise ExportError(
            f"{part.name} was to be {part.dtype} {list(part.shape)}, and llm-compressor {given}",
            fix="leave out calibrate (--calibrate)",
        )
    return shard, entry


def _write_rest(
    merged: Path, weights: WeightFolder, plan: Quantisation, shards: tuple[OutputShard, ...], staging: Path
) -> None:
    copied, _ = small_files(merged)
    copy_into(merged, [name for name in copied if str(name) != CONFIG], staging)
    (staging / CONFIG).write_bytes(plan.edit(read_json(merged / CONFIG)))
    if weights.index is not None:
        listed = {one.entry.name: shard.name for shard in shards for one in shard.tensors}
        size = sum(one.entry.nbytes for shard in shards for one in shard.tensors)
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(listed.items()))}
        (staging / weights.index.name).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
