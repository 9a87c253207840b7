"""``export``: adapter and base in, a complete and verified folder out."""

from __future__ import annotations

import errno
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path

from pronghorn.adapters.files import choose_adapter, read_adapter
from pronghorn.adapters.tokenizer_files import CONFIG, TOKENIZER_FILES, FolderEdits
from pronghorn.errors import AdapterError, ConfigError, ExportError, NotSupportedError, PronghornError
from pronghorn.export.calibrated import CalibratedJob, write_calibrated
from pronghorn.export.class_modules import class_model
from pronghorn.export.files import check_apart, check_space, copy_into, left_out, small_files
from pronghorn.export.formats import FROM_WHOLE, QUANTISED, gguf_kinds, unknown_format
from pronghorn.export.gguf_run import GgufJob, write_gguf
from pronghorn.export.job import SUBFOLDER, Job, Watch, verified
from pronghorn.export.layout import OutputShard, lay_out
from pronghorn.export.merged import Progress, with_divisors, write_shards, zero_updates
from pronghorn.export.onto import MergeFormat, without_quantization
from pronghorn.export.original import original_of
from pronghorn.export.packed import NOTE, write_packed
from pronghorn.export.plan import MergePlan, plan_merge
from pronghorn.export.portable import write_portable
from pronghorn.export.quantized import Quantisation, lay_out_codes, plan_quantisation
from pronghorn.export.report import ExportReport, changed_share, merge_warnings
from pronghorn.export.text_only import check_text_class, keep_text_files, weights_of
from pronghorn.export.vocabulary import for_both_generations, merged_files, remove_quantization
from pronghorn.quant.stored import StoredNF4
from pronghorn.sources.record import RECORD_NAME
from pronghorn.sources.resolve import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BASE_CONFIG,
    read_json,
    resolve,
    resolve_base,
)
from pronghorn.sources.source import Source, SourceKind
from pronghorn.weights.writer import StagedFolder


def export(
    adapter: str | Path,
    target: str | Path,
    *,
    format: str | MergeFormat = "merged_16bit",
    base: str | Path | None = None,
    overwrite: bool = False,
    adapter_name: str | None = None,
    verify: bool = True,
    progress: Progress | Watch | None = None,
) -> ExportReport:
    """Write what an adapter was trained to be as a folder that other programs open.

    Args:
        adapter: The adapter's folder or hub id; for formats that quantise, and for ``text_only``, a whole
            model, too.
        target: The folder to write; it appears only when complete (and verified).
        format: "merged_16bit", the base with the adapter merged in; "w4a16", "w8a8", "fp8" or "nvfp4", the
            same quantised for vLLM and transformers (compressed-tensors); "merged_4bit", the same in
            bitsandbytes' NF4; "adapter", the adapter in the portable form that vLLM, llama.cpp and PEFT read
            alike; "lora", the adapter as it is and its tokenizer; "gguf-q8_0" and so on, files for llama.cpp
            and Ollama. A MergeFormat also says onto which values of a 4-bit base, on which rows to calibrate,
            and whether of a multimodal base only the language model is written.
        base: Where the base is; by default the place recorded with the adapter.
        overwrite: Replace ``target`` where it has content, in one step.
        adapter_name: Which adapter, where the folder holds several.
        verify: Check the result in a fresh process before it appears.
        progress: Called with the bytes of weights written so far and in all; a Watch is told more.

    Raises:
        NotSupportedError: an unknown format, or an adapter of a kind that cannot be merged.
        SourceError, AdapterError: the adapter or the base cannot be used, or do not belong together.
        ExportError: an adapter tensor has no place in the base, the base holds NaN or cannot be built, or the
            disk refuses; nothing appears.
        VerificationError: the result broke a promise; nothing appears.
    """
    wanted = format if isinstance(format, MergeFormat) else MergeFormat(format)
    write, whole = _writer(wanted)
    started = time.perf_counter()
    # a model's own code (trust_remote_code) is copied, never run: neither here nor in verification
    source = _find_adapter(adapter, adapter_name, wanted.name, whole=whole)
    if source.kind is SourceKind.BASE:
        _check_whole(source, wanted, {"base (--base)": base, "adapter_name (--adapter-name)": adapter_name})
    original = None
    if source.kind is SourceKind.BASE:
        found = source
    else:
        original = original_of(source, base) if wanted.onto == "original" and base is not None else None
        found = original[0] if original else resolve_base(source, base=base, trust_remote_code=True)
    goal = Path(target).expanduser()
    check_apart(goal, {"base": found.path, "adapter": source.path})
    if wanted.text_only:
        check_text_class(found)
    watch = progress if isinstance(progress, Watch) else Watch(progress)
    job = Job(
        source,
        found,
        goal,
        overwrite,
        verify,
        watch.bytes,
        wanted.onto,
        wanted.text_only,
        finished=watch.file,
    )
    with _disk_errors(goal):
        report = write(job)
    trained_on = original[1] if original else None
    seconds = time.perf_counter() - started
    return replace(report, whole=job.whole, trained_on=trained_on, seconds=seconds)


def _writer(wanted: MergeFormat) -> tuple[Callable[[Job], ExportReport], bool]:
    """What writes a format, and whether it makes something of a whole model, too, not only of an adapter."""
    kinds = gguf_kinds(wanted.name)
    if wanted.llama_python is not None and kinds is None:
        raise ConfigError(f"llama_python does nothing for the format {wanted.name}", fix="leave it out")
    if wanted.calibrate is not None and kinds is not None:
        raise ConfigError(f"calibrate does nothing for the format {wanted.name}", fix="leave it out")
    if kinds is not None:
        return lambda job: write_gguf(GgufJob(job, kinds, wanted.llama_python, _merged)), True
    if wanted.name not in _FORMATS:
        message, fix = unknown_format(wanted.name)
        raise NotSupportedError(message, fix=fix)
    if wanted.calibrate is not None:
        name, rows, python = wanted.name, wanted.calibrate, wanted.calibrate_python
        return lambda job: write_calibrated(CalibratedJob(job, name, rows, python, _merged)), True
    return _FORMATS[wanted.name], wanted.text_only or wanted.name in FROM_WHOLE


def _find_adapter(adapter: str | Path, name: str | None, format_: str, *, whole: bool) -> Source:
    local = Path(adapter).expanduser()
    folder = local if local.is_dir() else resolve(adapter, trust_remote_code=True).path
    holds = _holds_adapter(folder)
    chosen = choose_adapter(folder, name) if holds else folder
    if whole and not holds and gguf_kinds(format_) is None:
        _check_16_bit(folder, format_)
    source = resolve(chosen, trust_remote_code=True)
    if source.kind is not SourceKind.ADAPTER and not whole:
        raise AdapterError(
            f"{adapter} is a whole model, not an adapter",
            fix="give the adapter's folder; a whole model can be quantised (w4a16, ...) or become GGUF",
        )
    nested = {SUBFOLDER: True} if chosen != folder else {}
    return replace(source, name=str(adapter), config={**source.config, **nested})


def _check_16_bit(folder: Path, format_: str) -> None:
    config = folder / BASE_CONFIG
    if config.is_file() and without_quantization(read_json(config)):
        raise NotSupportedError(
            f"{folder} is quantised already, and {format_} is written from 16-bit weights",
            fix="give the 16-bit model it was made from",
        )


def _check_whole(source: Source, wanted: MergeFormat, given: Mapping[str, object]) -> None:
    """A whole model has no base and no adapters to name."""
    given = {**given, "onto (--onto)": wanted.onto if wanted.onto != "decoded" else None}
    for option, value in given.items():
        if value is not None:
            raise ConfigError(
                f"{source.name} is a whole model: {option} does nothing", fix=f"leave out {option}"
            )


def _holds_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file() or any(folder.glob(f"*/{ADAPTER_CONFIG}"))


@contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, PronghornError):
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ExportError(
                f"the disk of {target} became full; nothing was kept", fix="free some space"
            ) from error
        raise ExportError(
            f"{target} cannot be written: {error.strerror or error}; nothing was kept",
            fix="choose a target where you may write",
        ) from error


def _merged(job: Job, quantised: str | None = None) -> ExportReport:
    adapter = job.read_adapter()
    base = weights_of(job)
    weights = base.weights
    plan = plan_merge(weights, job.base.config, adapter, base.quantised)
    zero = _check_values(plan)
    codes = None
    if quantised:
        config, text_only = job.base.config, job.text_only
        codes = plan_quantisation(quantised, weights, config, job.base.path, text_only=text_only)
    shards = lay_out(plan) if codes is None else lay_out_codes(lay_out(plan), codes)
    if codes is not None and codes.scheme.two_scales:
        shards = with_divisors(shards, adapter.shard)
    edits = merged_files(
        job.base.path, job.tokenizer, vocabulary=plan.vocabulary, untied=plan.untied is not None
    )
    remove_quantization(edits, job.base.path)
    if job.text_only:
        tied = plan.untied is None and "lm_head.weight" not in weights.tensors
        keep_text_files(edits, job.base.path, tied=tied)
    for_both_generations(edits, job.base.path)
    if codes is not None:
        _add_quantisation(edits, codes, job.base.path)
    copied, left = small_files(job.base.path)
    copied = [name for name in copied if str(name) not in edits.files]
    updated = {name for name, change in plan.changes.items() if change.update and not change.tokens}
    needed = sum(shard.size for shard in shards) + sum(
        (job.base.path / name).stat().st_size for name in copied
    )
    check_space(job.named, needed)
    with StagedFolder(job.target, job.overwrite) as staging:
        counts = write_shards(shards, adapter.shard, staging, job.progress, job.finished)
        copy_into(job.base.path, copied, staging)
        _write_edits(edits, staging)
        _write_index(plan, shards, staging, same=codes is None)
        checks = verified(job, staging, against=job.adapter.path) if job.verify else ()
    return ExportReport(
        folder=job.target,
        format=quantised or "merged_16bit",
        adapter=job.adapter.path,
        base=job.base.path,
        tensors_merged=len(plan.changes),
        tensors_copied=sum(len(shard.tensors) for shard in shards) - len(plan.changes),
        bytes_written=needed,
        changed_share=None if job.whole else changed_share(counts),
        warnings=merge_warnings(counts, updated, zero),
        changes=tuple(edits.listed) if codes is None else (codes.told, *edits.listed),
        onto=base.note,
        left_out=left_out(weights, left),
        seconds=0.0,
        verified=True if job.verify else None,
        checks=checks,
    )


def _packed(job: Job) -> ExportReport:
    """The merged model, verified in 16-bit and then written in NF4."""
    class_model(
        job.base.path, text_only=job.text_only
    )  # one that cannot be built is refused before the merge
    goal = job.target
    goal.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{goal.name}.merged-", dir=goal.parent) as scratch:
        step = replace(job, target=Path(scratch) / "merged", overwrite=False, goal=goal, finished=None)
        report = _merged(step)
        stored = [name for name, one in weights_of(job).quantised.items() if isinstance(one, StoredNF4)]
        with StagedFolder(goal, job.overwrite) as staging:
            count = write_packed(report.folder, staging, job.base.path, stored or None)
            rows = verified(job, staging, against=None, deep=True) if job.verify else ()
            written = sum(path.stat().st_size for path in staging.iterdir())
    return replace(
        report,
        folder=goal,
        format="merged_4bit",
        bytes_written=written,
        changes=(*report.changes, f"{CONFIG}: quantization_config of {count} tensors in NF4"),
        warnings=(*report.warnings, NOTE),
        checks=(*report.checks, *rows),
    )


def _check_values(plan: MergePlan) -> list[str]:
    """Read the adapter once: refuse what is not finite; return the file tensors whose update is zero."""
    adapter = plan.adapter
    zero, broken = zero_updates(adapter.shard)
    if broken:
        raise ExportError(
            f"{len(broken)} tensors of the adapter {adapter.path} hold NaN or infinity, first {broken[0]}",
            fix="export an earlier checkpoint",
        )
    return [
        name
        for name, change in plan.changes.items()
        if change.update is not None
        and change.update.pair.magnitude is None
        and not zero.isdisjoint((change.update.pair.a.name, change.update.pair.b.name))
    ]


def _add_quantisation(edits: FolderEdits, codes: Quantisation, base: Path) -> None:
    edits.files[BASE_CONFIG] = codes.edit(edits.document(base, BASE_CONFIG))
    edits.listed.append(f"{BASE_CONFIG}: quantization_config added ({codes.scheme.layout})")


def _write_edits(edits: FolderEdits, staging: Path) -> None:
    for name, content in edits.files.items():
        if content is not None:
            (staging / name).write_bytes(content)


def _write_index(plan: MergePlan, shards: tuple[OutputShard, ...], staging: Path, *, same: bool) -> None:
    """The base's index, byte for byte where nothing changes; ``same``: tensors have the base's names."""
    index = plan.weights.index
    if index is None:
        return
    if same and plan.same_layout:
        (staging / index.name).write_bytes(index.read_bytes())
        return
    document = json.loads(index.read_text(encoding="utf-8"))
    entries = {
        entry.name: (shard.name, entry) for shard in shards for one in shard.tensors for entry in one.entries
    }
    document["weight_map"] = {name: entries[name][0] for name in sorted(entries)}
    metadata = document.get("metadata")
    if isinstance(metadata, dict) and "total_size" in metadata:
        metadata["total_size"] = sum(entry.nbytes for _, entry in entries.values())
    if isinstance(metadata, dict) and "total_parameters" in metadata and same:
        metadata["total_parameters"] = sum(prod(entry.shape) for _, entry in entries.values())
    (staging / index.name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _lora(job: Job) -> ExportReport:
    """The adapter as PEFT wrote it, with the tokenizer it was trained with (else the base's)."""
    read_adapter(job.adapter.path)
    names = [ADAPTER_CONFIG, ADAPTER_WEIGHTS, RECORD_NAME, "README.md"]
    tokenizer = job.tokenizer if (job.tokenizer / TOKENIZER_FILES[1]).is_file() else job.base.path
    pieces = [(job.adapter.path, name) for name in names] + [(tokenizer, name) for name in TOKENIZER_FILES]
    pieces = [(folder, name) for folder, name in pieces if (folder / name).is_file()]
    needed = sum((folder / name).stat().st_size for folder, name in pieces)
    check_space(job.target, needed)
    with StagedFolder(job.target, job.overwrite) as staging:
        for folder, name in pieces:
            copy_into(folder, [Path(name)], staging)
        checks = verified(job, staging, against=None) if job.verify else ()
    return ExportReport(
        folder=job.target,
        format="lora",
        adapter=job.adapter.path,
        base=job.base.path,
        tensors_merged=0,
        tensors_copied=len(read_adapter(job.adapter.path).shard.tensors),
        bytes_written=needed,
        changed_share=None,
        warnings=(),
        changes=() if tokenizer == job.tokenizer else ("tokenizer: the base's, the adapter has none",),
        left_out=(),
        seconds=0.0,
        verified=True if job.verify else None,
        checks=checks,
    )


_FORMATS: dict[str, Callable[[Job], ExportReport]] = {
    "merged_16bit": _merged,
    **{name: partial(_merged, quantised=name) for name in QUANTISED},
    "merged_4bit": _packed,
    "merged_4bit_forced": _packed,
    "adapter": write_portable,
    "lora": _lora,
}
