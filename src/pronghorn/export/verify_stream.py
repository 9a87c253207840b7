"""Weights against weights: W_merged = W_base + s*B*A, tensor by tensor, for models of any size.

Own arithmetic and own reading of the files; nothing is shared with the exporter, and no model is built.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any

import torch

from pronghorn.export.verify_adapter import pattern_value, tail
from pronghorn.export.verify_codes import Coded, coded, is_calibrated
from pronghorn.export.verify_decode import farthest, squared_errors
from pronghorn.export.verify_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Folder, Tensor, read_header

_TILE_ELEMENTS = 1 << 22
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Half a unit in the last place, relative to the value, of each stored dtype.
_HALF_ULP = {"F64": 2.0**-53, "F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}
# A merge computed in the stored dtype itself is off by up to a whole unit more; a lost delta by far more.
_MAX_HALF_ULPS, _RMS_RATIO = 3.0, 1.1
# measured: 1.1 to 1.9; weights without the adapter's update, or another tensor's, are 5 and more
_CALIBRATED_RATIO = 4.0
_FLOAT32_NOISE = 2.0**-20

_LORA = re.compile(r"^base_model\.model\.(.+)\.lora_(embedding_)?([AB])(?:\.weight)?$")
_PLAIN = re.compile(r"^base_model\.model\.(.+?)(?:\.base_layer|\.modules_to_save)?\.(weight|bias)$")


@dataclass
class Change:
    """What the adapter does to one base tensor: replace it, add s*B*A, or both."""

    replacement: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 0.0
    transposed: bool = False


@dataclass
class Comparison:
    """The result over all tensors. ``skipped``: adapter tensors whose effect is not a plain matrix sum."""

    problems: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    changed_tensors: int = 0
    same_tensors: int = 0
    coded_tensors: int = 0
    farthest_calibrated: float = 0.0
    changed_elements: int = 0
    exact_elements: int = 0
    elements: int = 0

    @property
    def told(self) -> str:
        """One line for the report."""
        codes = f"{self.coded_tensors} tensors hold the codes nearest to base + adapter; "
        if self.farthest_calibrated:
            codes = f"{self.coded_tensors} tensors hold calibrated codes, from base + adapter at most "
            codes += f"{self.farthest_calibrated:.3g} x as far as the nearest (root mean square); "
        share = 100 * self.exact_elements / max(self.elements, 1)
        moved = 100 * self.changed_elements / max(self.elements, 1)
        line = f"{self.changed_tensors} tensors equal base + adapter ({share:.4g} % rounded exactly, "
        line += f"{moved:.3g} % of their elements changed), {self.same_tensors} others are the base's bytes"
        return (
            (codes if self.coded_tensors else "")
            + line
            + (f"; not compared: {', '.join(self.skipped[:3])} ({len(self.skipped)})" if self.skipped else "")
        )


def compare_weights(folder: Folder, base: Folder, adapter: Path | None) -> Comparison:
    """Compare every tensor of ``folder`` with base + adapter, or with the base alone."""
    result = Comparison()
    changes = _changes(folder, base, adapter, result) if adapter is not None else {}
    experts = any(".experts" in name for name in result.skipped)
    weights = coded(folder)
    for name, one in weights.items():
        if name in changes or not _skipped(name, result, experts):
            compare = _compare_calibrated if is_calibrated(folder) else _compare_codes
            compare(name, one, base.tensors.get(name), changes.get(name, Change()), result)
    for name, ours in folder.tensors.items():
        change = changes.get(name)
        if name in weights:
            continue
        before = base.tensors.get(name) or _embedding(base)
        if change is None and _skipped(name, result, experts):
            continue
        if change is not None:
            _compare_changed(name, ours, before, change, result)
        elif name in base.tensors:
            _compare_same(name, ours, base.tensors[name], result)
    return result


def _skipped(name: str, result: Comparison, experts: bool) -> bool:
    return name in result.skipped or (experts and ".experts" in name)


def _changes(folder: Folder, base: Folder, adapter: Path, result: Comparison) -> dict[str, Change]:
    """File tensor name -> what the adapter does to it. What cannot be placed is put in ``result.skipped``."""
    config = Folder(adapter).json(ADAPTER_CONFIG)
    names = {tail(name): name for name in (*base.tensors, *folder.tensors)}
    changes: dict[str, Change] = {}
    for stored, tensor in read_header(adapter / ADAPTER_WEIGHTS).items():
        lora, plain = _LORA.match(stored), _PLAIN.match(stored)
        part = f"{lora[1]}.weight" if lora else f"{plain[1]}.{plain[2]}" if plain else stored
        name = names.get(tail(part)) or _renamed(part, names.values())
        if (
            name is None
            or config.get("use_dora")
            or (lora and (".experts" in lora[1] or len(tensor.shape) != 2))
        ):
            if (name or stored) not in result.skipped:
                result.skipped.append(name or stored)
            continue
        change = changes.setdefault(name, Change())
        if lora:
            setattr(change, lora[3].lower(), tensor)
            change.scale = _scale(config, lora[1])
            change.transposed = bool(lora[2]) or bool(config.get("fan_in_fan_out"))
        else:
            change.replacement = tensor
    return changes


def _renamed(part: str, names: Iterable[str]) -> str | None:
    """The one tensor of that layer with that last name: Mixtral's files say block_sparse_moe, PEFT mlp."""
    layer, leaf = re.search(r"layers\.\d+\.", part), re.search(r"[^.]+\.[^.]+$", part)
    if layer is None or leaf is None or ".experts" in part:
        return None
    found = [name for name in names if layer[0] in name and name.endswith("." + leaf[0])]
    return found[0] if len(found) == 1 else None


def _scale(config: Mapping[str, Any], module: str) -> float:
    rank = pattern_value(dict(config), "rank_pattern", module, config["r"])
    alpha = pattern_value(dict(config), "alpha_pattern", module, config["lora_alpha"])
    return float(alpha) / (sqrt(rank) if config.get("use_rslora") else rank)


def _embedding(base: Folder) -> Tensor | None:
    """The embeddings: what an lm_head that is not in the base was tied to."""
    return next(
        (x for n, x in base.tensors.items() if re.search(r"(^|\.)(embed_tokens|wte)\.weight$", n)), None
    )


def _compare_same(name: str, ours: Tensor, theirs: Tensor, result: Comparison) -> None:
    """The bytes are the base's; rows beyond the base's are added vocabulary, compared with nothing.

    A base that was decoded to float32 is rounded to the dtype of the folder first.
    """
    if ours.dtype != theirs.dtype and {ours.dtype, theirs.dtype} <= _DTYPES.keys():
        _compare_rounded(name, ours, theirs, result)
        return
    length = min(ours.end - ours.start, theirs.end - theirs.start)
    with ours.file.open("rb") as left, theirs.file.open("rb") as right:
        left.seek(ours.start)
        right.seek(theirs.start)
        for offset in range(0, length, _TILE_ELEMENTS):
            size = min(_TILE_ELEMENTS, length - offset)
            if left.read(size) != right.read(size):
                result.problems.append(f"{name} differs from the base, and the adapter does not touch it")
                return
    result.same_tensors += 1


def _compare_rounded(name: str, ours: Tensor, theirs: Tensor, result: Comparison) -> None:
    rows = min(ours.shape[0], theirs.shape[0])
    step = max(1, _TILE_ELEMENTS * rows // max(1, theirs.end - theirs.start))
    for first in range(0, rows, step):
        last = min(rows, first + step)
        if not torch.equal(_read(ours, first, last), _read(theirs, first, last).to(_DTYPES[ours.dtype])):
            result.problems.append(f"{name} differs from the base, and the adapter does not touch it")
            return
    result.same_tensors += 1


def _compare_changed(
    name: str, ours: Tensor, base: Tensor | None, change: Change, result: Comparison
) -> None:
    """Compare one tensor the adapter touches, tile by tile of rows."""
    start = change.replacement or base
    if start is None or (change.a is None) != (change.b is None) or start.shape != ours.shape:
        result.problems.append(f"{name} of shape {list(ours.shape)} cannot be base + adapter")
        return
    a, b = (_read(x, 0, x.shape[0]).float() if x is not None else None for x in (change.a, change.b))
    worst = squares = floor = energy = 0.0
    for first, last in _tiles(ours):
        mine, truth = _read(ours, first, last), _read(start, first, last).float()
        if a is not None and b is not None:
            delta = a[:, first:last].T @ b.T if change.transposed else b[first:last] @ a
            truth = truth + change.scale * delta
        rounded = truth.to(mine.dtype)
        error, least = (mine.float() - truth).double(), (rounded.float() - truth).double()
        bound = _HALF_ULP[ours.dtype] * truth.abs().double() + _FLOAT32_NOISE * truth.abs().max().double()
        worst = max(worst, float((error.abs() / bound.clamp_min(1e-30)).nan_to_num(torch.inf).max()))
        squares, floor = squares + float(error.square().sum()), floor + float(least.square().sum())
        energy += float(truth.double().square().sum())
        result.elements += mine.numel()
        result.exact_elements += int((mine == rounded).sum())
        same = base is not None and (base.shape, base.dtype) == (ours.shape, ours.dtype)
        result.changed_elements += (
            int((mine != _read(base, first, last)).sum()) if base and same else mine.numel()
        )
    allowed = _RMS_RATIO**2 * floor + _FLOAT32_NOISE**2 * energy
    if not (worst <= _MAX_HALF_ULPS and squares <= allowed):
        result.problems.append(
            f"{name} is not base + adapter: up to {worst:.3g} half units in the last place off, "
            f"root mean square {sqrt(squares / max(allowed, 1e-60)):.3g} x what rounding explains"
        )
    result.changed_tensors += 1


def _compare_codes(name: str, one: Coded, base: Tensor | None, change: Change, result: Comparison) -> None:
    """A quantised weight holds the codes nearest to base + adapter."""
    worst = 0.0
    for first, last, truth in _truth(name, one, base, change, result):
        worst = max(worst, farthest(one, first, last, truth))
    if worst > 1.0:
        result.problems.append(
            f"{name} is not base + adapter: its codes are up to {worst:.3g} x as far as rounding explains"
        )
    result.coded_tensors += 1


def _compare_calibrated(
    name: str, one: Coded, base: Tensor | None, change: Change, result: Comparison
) -> None:
    """GPTQ moves codes off the nearest, to make up for the rounding of others, but not far."""
    found = nearest = 0.0
    for first, last, truth in _truth(name, one, base, change, result):
        errors = squared_errors(one, first, last, truth)
        found, nearest = found + errors[0], nearest + errors[1]
    ratio = sqrt(found / max(nearest, 1e-60))
    if not ratio <= _CALIBRATED_RATIO:
        result.problems.append(
            f"{name} is not base + adapter: root mean square {ratio:.3g} x that of the nearest codes"
        )
    result.coded_tensors += 1
    result.farthest_calibrated = max(result.farthest_calibrated, ratio)


def _truth(
    name: str, one: Coded, base: Tensor | None, change: Change, result: Comparison
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Base + adapter in float32, tile by tile: first row, last row, values."""
    start = change.replacement or base
    if start is None or (change.a is None) != (change.b is None) or start.shape != one.shape:
        result.problems.append(f"{name} of shape {list(one.shape)} cannot be base + adapter")
        return
    a, b = (_read(x, 0, x.shape[0]).float() if x is not None else None for x in (change.a, change.b))
    for first, last in _tiles(start):
        truth = _read(start, first, last).float()
        if a is not None and b is not None:
            truth = truth + change.scale * (b[first:last] @ a)
        yield first, last, truth


def _tiles(tensor: Tensor) -> Iterator[tuple[int, int]]:
    rows = tensor.shape[0] if tensor.shape else 1
    width = max((tensor.end - tensor.start) // max(rows, 1), 1)
    step = max(_TILE_ELEMENTS * 2 // width, 1)
    for first in range(0, rows, step):
        yield first, min(first + step, rows)


def _read(tensor: Tensor, first: int, last: int) -> torch.Tensor:
    """Rows ``first`` to ``last`` of a tensor, from its file."""
    rows = tensor.shape[0] if tensor.shape else 1
    width = (tensor.end - tensor.start) // max(rows, 1)
    with tensor.file.open("rb") as file:
        file.seek(tensor.start + first * width)
        data = bytearray(file.read((last - first) * width))
    return torch.frombuffer(data, dtype=_DTYPES[tensor.dtype]).reshape(last - first, *tensor.shape[1:])
