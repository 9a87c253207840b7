"""The portable adapter: what PEFT, vLLM and llama.cpp all read the same way.

Each module's scaling is folded into its B, all modules have one rank (zeros fill the rest), lora_alpha is r,
and there are no patterns. Modules carry the names of the class that serves the base; a name that does not
exist there would be ignored without a word.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pronghorn.adapters.files import AdapterFolder, LoraPair, read_adapter
from pronghorn.adapters.merge import tiles
from pronghorn.adapters.portable import Blocker, blockers, refuse
from pronghorn.adapters.record import write_record
from pronghorn.adapters.tokenizer_files import TOKENIZER_FILES
from pronghorn.errors import AdapterError, ExportError
from pronghorn.export.class_modules import ClassModule, class_modules, serving_name
from pronghorn.export.files import check_space, copy_into
from pronghorn.export.job import Job, verified
from pronghorn.export.layout import write_header
from pronghorn.export.merged import zero_updates
from pronghorn.export.onto import adapter_note
from pronghorn.export.report import ExportReport
from pronghorn.sources.resolve import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from pronghorn.weights import keymap
from pronghorn.weights.folder import WeightFolder, open_weights
from pronghorn.weights.reader import TORCH_DTYPES, read_rows
from pronghorn.weights.shards import Shard, TensorEntry
from pronghorn.weights.writer import StagedFolder, write_all

_PREFIX = "base_model.model."
_KINDS = ("Linear", "Embedding", "Conv1D")


@dataclass(frozen=True)
class Served:
    """A pair under the name ``module`` of the serving class."""

    pair: LoraPair
    module: str
    kind: str


@dataclass(frozen=True)
class _Piece:
    """A tensor to write from the rows of ``source``: times ``scale``, with zeros up to ``entry``'s shape."""

    entry: TensorEntry
    source: TensorEntry
    scale: float


def served_pairs(folder: Path, base: Path) -> tuple[AdapterFolder, tuple[Served, ...]]:
    """The adapter, and each of its pairs at its place in the serving class.

    Raises:
        NotSupportedError: something in the adapter cannot be served; every such thing is named.
        AdapterError: a module that the class lacks, or of other widths.
    """
    refuse(folder, blockers(folder))
    adapter = read_adapter(folder)
    refuse(folder, _changed_embeddings(adapter, open_weights(base)))
    known = class_modules(base)
    return adapter, tuple(_place(pair, known, adapter, base) for pair in adapter.pairs)


def _changed_embeddings(adapter: AdapterFolder, weights: WeightFolder) -> Iterator[Blocker]:
    """Copies of embeddings that PEFT saved along: harmless where they are the base's, else never served."""
    for name, entry in adapter.saved.items():
        target = keymap.find(name, weights.tensors)
        for embedding, head in keymap.TIED:
            target = target or (keymap.find(embedding, weights.tensors) if name == head else None)
        if target is None or not _same_values(adapter.shard, entry, *weights.tensors[target]):
            yield Blocker(
                f"changed embeddings ({name})",
                "vLLM leaves them out without a word",
                "merge it: --format merged_16bit",
            )


def _same_values(one: Shard, entry: TensorEntry, other: Shard, stored: TensorEntry) -> bool:
    if entry.shape != stored.shape or len(entry.shape) != 2:
        return False
    dtype = TORCH_DTYPES[stored.dtype]
    pairs = (
        (read_rows(one, entry, *rows).to(dtype), read_rows(other, stored, *rows))
        for rows in tiles(*stored.shape)
    )
    return all(torch.equal(left, right) for left, right in pairs)


def _place(pair: LoraPair, known: Mapping[str, ClassModule], adapter: AdapterFolder, base: Path) -> Served:
    module = pair.parameter.removesuffix(".weight")
    name = serving_name(module, known)
    other_base = "give the base the adapter was trained on (base=PATH, --base)"
    if name is None:
        raise AdapterError(
            f"{adapter.path} adapts {module}, which the class of {base} does not have; "
            "vLLM would ignore it and answer as the base",
            fix=other_base,
        )
    found = known[name]
    widths = (pair.b.shape[0], pair.a.shape[1])
    if found.kind not in _KINDS:
        raise AdapterError(
            f"{adapter.path} adapts {module}, a {found.kind}; only linear layers and embeddings are served",
            fix="merge it: --format merged_16bit",
        )
    if widths != (found.shape if found.kind == "Linear" else found.shape[::-1]):
        raise AdapterError(
            f"{adapter.path}: the update of {module} is {list(widths)}, the class of {base} has "
            f"{list(found.shape)}; vLLM would not notice",
            fix=other_base,
        )
    return Served(pair, name, found.kind)


def write_portable(job: Job) -> ExportReport:
    """The export format "adapter".

    Raises:
        NotSupportedError, AdapterError: as ``served_pairs``.
        ExportError: the adapter holds NaN or infinity.
        VerificationError: PEFT does not compute the same from the result; nothing appears.
    """
    adapter, served = served_pairs(job.adapter.path, job.base.path)
    zero, broken = zero_updates(adapter.shard)
    if broken:
        raise ExportError(
            f"{len(broken)} tensors of the adapter {adapter.path} hold NaN or infinity, first {broken[0]}",
            fix="export an earlier checkpoint",
        )
    rank = max(pair.rank for pair in adapter.pairs)
    prefix, pieces = _lay_out(served, rank)
    config = portable_config(adapter.config, served, rank, class_modules(job.base.path))
    tokenizer = job.tokenizer if (job.tokenizer / TOKENIZER_FILES[1]).is_file() else job.base.path
    copied = [(tokenizer, name) for name in TOKENIZER_FILES if (tokenizer / name).is_file()]
    needed = pieces[-1].entry.end + sum((folder / name).stat().st_size for folder, name in copied)
    check_space(job.target, needed)
    renamed = [one for one in served if one.module + ".weight" != one.pair.parameter]
    with StagedFolder(job.target, job.overwrite) as staging:
        _write_weights(staging / ADAPTER_WEIGHTS, prefix, pieces, adapter.shard, job)
        (staging / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for folder, name in copied:
            copy_into(folder, [Path(name)], staging)
        if adapter.record is not None:
            trainable = () if renamed else adapter.record.trainable
            write_record(staging, replace(adapter.record, rank=rank, trainable=trainable))
        # renamed modules have no place in the model of training: then the result is held against the base
        against = None if renamed else adapter.path
        checks = verified(job, staging, against=against, deep=True) if job.verify else ()
    return ExportReport(
        folder=job.target,
        format="adapter",
        adapter=job.adapter.path,
        base=job.base.path,
        tensors_merged=0,
        tensors_copied=len(pieces),
        bytes_written=needed,
        changed_share=None,
        warnings=_warnings(served, zero),
        changes=tuple(_changes(adapter, served, rank)),
        left_out=tuple(f"{name} (equal to the base's)" for name in adapter.saved),
        onto=adapter_note(adapter.record),
        seconds=0.0,
        verified=True if job.verify else None,
        checks=checks,
    )


def portable_config(
    config: Mapping[str, Any], served: tuple[Served, ...], rank: int, known: Mapping[str, ClassModule]
) -> dict[str, Any]:
    """adapter_config.json of the portable form; keys that say nothing about the update stay."""
    plain: dict[str, Any] = {
        "r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False,
        "use_dora": False, "bias": "none", "lora_bias": False, "modules_to_save": None,
        "init_lora_weights": True, "target_modules": _targets(served, known), "exclude_modules": None,
        "layers_to_transform": None, "layers_pattern": None, "target_parameters": None,
        "trainable_token_indices": None, "inference_mode": True,
    }  # fmt: skip
    return {**config, **{key: value for key, value in plain.items() if key in config or value}}


def _targets(served: tuple[Served, ...], known: Mapping[str, ClassModule]) -> list[str]:
    """The last names where they mean exactly these modules, else full names."""
    wanted = {one.module for one in served}
    leaves = sorted({name.rpartition(".")[2] for name in wanted})
    meant = {name for name in known if name.rpartition(".")[2] in leaves}
    return leaves if meant == wanted else sorted(wanted)


def _lay_out(served: tuple[Served, ...], rank: int) -> tuple[bytes, tuple[_Piece, ...]]:
    pieces = []
    for one in sorted(served, key=lambda each: each.module):
        pair = one.pair
        first, second = ("lora_embedding_A", "lora_embedding_B") if pair.embedding else (
            "lora_A.weight", "lora_B.weight"
        )  # fmt: skip
        a = replace(pair.a, name=f"{_PREFIX}{one.module}.{first}", shape=(rank, pair.a.shape[1]))
        # a power of two is exact in every dtype but float16 (its range); other products are kept in float32
        exact = pair.scaling == 1 or (math.frexp(pair.scaling)[0] == 0.5 and pair.b.dtype != "F16")
        b = replace(
            pair.b,
            name=f"{_PREFIX}{one.module}.{second}",
            shape=(pair.b.shape[0], rank),
            dtype=pair.b.dtype if exact else "F32",
        )
        pieces += [_Piece(a, pair.a, 1.0), _Piece(b, pair.b, pair.scaling)]
    prefix, entries = write_header({"format": "pt"}, [piece.entry for piece in pieces])
    return prefix, tuple(replace(piece, entry=entry) for piece, entry in zip(pieces, entries, strict=True))


def _write_weights(path: Path, prefix: bytes, pieces: tuple[_Piece, ...], source: Shard, job: Job) -> None:
    """Row tiles of one tensor after the other; memory holds one tile."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    total = pieces[-1].entry.end
    try:
        os.truncate(descriptor, total)  # rows and columns that are not written are zeros
        write_all(descriptor, prefix, 0)
        for piece in pieces:
            entry = piece.entry
            row_bytes = entry.nbytes // entry.shape[0]
            for first, last in tiles(*piece.source.shape):
                rows = read_rows(source, piece.source, first, last)
                scaled = (rows.float() * piece.scale) if piece.scale != 1 else rows
                padded = torch.zeros(last - first, entry.shape[1], dtype=TORCH_DTYPES[entry.dtype])
                padded[:, : rows.shape[1]] = scaled
                data = padded.view(torch.uint8).numpy().data.cast("B")
                write_all(descriptor, data, entry.start + first * row_bytes)
            if job.progress:
                job.progress(entry.end, total)
    finally:
        os.close(descriptor)


def _changes(adapter: AdapterFolder, served: tuple[Served, ...], rank: int) -> Iterator[str]:
    scalings = sorted({one.pair.scaling for one in served})
    told = ", ".join(f"{value:.4g}" for value in scalings[:4]) + (", ..." if len(scalings) > 4 else "")
    yield f"scaling {told} folded into B; lora_alpha = r = {rank}"
    padded = sum(one.pair.rank < rank for one in served)
    if padded:
        yield f"{padded} modules of a smaller rank filled with zeros"
    renamed = [one for one in served if one.module + ".weight" != one.pair.parameter]
    if renamed:
        first = renamed[0]
        before = first.pair.parameter.removesuffix(".weight")
        yield f"{len(renamed)} modules renamed for the serving class, {before} -> {first.module}"


def _warnings(served: tuple[Served, ...], zero: set[str]) -> tuple[str, ...]:
    idle = [one.module for one in served if not zero.isdisjoint((one.pair.a.name, one.pair.b.name))]
    if not idle:
        return ()
    return (f"B*A is all zero, so nothing was learned, for {len(idle)} modules, first {idle[0]}",)
