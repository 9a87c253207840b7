"""The plan of a merge: which file tensor gets which update, worked out from headers before a byte is written.

Fails closed: every tensor of the adapter is used exactly once, or there is no plan.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from pronghorn.adapters.files import AdapterFolder, LoraPair, TokenRows
from pronghorn.adapters.merge import Update
from pronghorn.errors import ExportError
from pronghorn.export.tied import TiedPair, share
from pronghorn.quant.stored import EncodedNF4, StoredNF4
from pronghorn.weights import keymap
from pronghorn.weights.folder import WeightFolder
from pronghorn.weights.shards import TensorEntry

# dtypes that W + s*B*A can be rounded to; anything else is a quantised weight
MERGEABLE = frozenset({"F16", "BF16", "F32"})
# first PEFT release whose stacked updates follow [experts, out, in]; before, A had the second dimension
_PEFT_SWAPS_EXPERTS = (0, 19)
_CONV1D_LEAVES = ("c_attn.weight", "c_proj.weight", "c_fc.weight", "q_attn.weight")
_OTHER_BASE = "give the base the adapter was trained on (base=PATH)"


@dataclass(frozen=True)
class Change:
    """What happens to a tensor of the base: ``source`` replaces it, ``update`` is added, ``tokens`` set rows.

    ``bias`` is LoRA's own bias, added after scaling. ``shape`` is the shape that is written.
    ``quantised`` gives the rows to start from, where the base is merged onto as it was in 4-bit.
    """

    shape: tuple[int, ...]
    source: TensorEntry | None = None
    update: Update | None = None
    tokens: TokenRows | None = None
    bias: LoraPair | None = None
    quantised: StoredNF4 | EncodedNF4 | None = None

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        """The adapter tensors used (a stacked pair is used by several changes)."""
        found = [self.source, self.tokens.entry if self.tokens else None]
        if self.update:
            pair = self.update.pair
            found += [pair.a, pair.b, pair.magnitude]
        if self.bias:
            found.append(self.bias.bias)
        return tuple(entry for entry in found if entry is not None)


@dataclass(frozen=True)
class MergePlan:
    """Changes by file tensor; ``untied`` is the head's new name where tied embeddings are written apart.

    ``vocabulary`` is the number of rows of a resized embedding.
    """

    weights: WeightFolder
    adapter: AdapterFolder
    changes: Mapping[str, Change]
    untied: TiedPair | None = None
    vocabulary: int | None = None

    @property
    def same_layout(self) -> bool:
        """Whether every tensor keeps its name, shape and dtype in the files."""
        as_filed = all(shard.prefix for shard in self.weights.shards)
        return self.untied is None and self.vocabulary is None and as_filed


def plan_merge(
    weights: WeightFolder,
    config: Mapping[str, Any],
    adapter: AdapterFolder,
    quantised: Mapping[str, StoredNF4 | EncodedNF4] = MappingProxyType({}),
) -> MergePlan:
    """Assign every adapter tensor to a tensor of the base.

    Args:
        weights: the base's weights.
        config: the base's config.json.
        adapter: the adapter to merge.
        quantised: tensors that are written as they decode from 4-bit, adapted or not.

    Raises:
        ExportError: an adapter tensor fits no tensor of the base, or not by its shape; the message names it.
    """
    tied = share(weights, config, adapter)
    builder = _Builder(weights, config, adapter, tied)
    skipped: set[str] = set(tied.duplicates) if tied else set()
    for name, entry in adapter.saved.items():
        if entry.name not in skipped:
            builder.save(name, entry)
    for pair in adapter.pairs:
        if pair.a.name not in skipped:
            builder.update(pair)
    for tokens in adapter.tokens:
        if tokens.entry.name not in skipped:
            builder.set_rows(tokens)
    changes = dict(builder.finish())
    for name, rows in quantised.items():
        change = changes.get(name, Change(weights.tensors[name][1].shape))
        if change.source is None:
            changes[name] = replace(change, quantised=rows)
    _check_all_used(adapter, changes, skipped)
    vocabulary = _vocabulary(weights, changes, tied)
    return MergePlan(weights, adapter, changes, tied if tied and tied.untie else None, vocabulary)


def _check_all_used(adapter: AdapterFolder, changes: Mapping[str, Change], skipped: set[str]) -> None:
    used = {entry.name for change in changes.values() for entry in change.entries}
    unused = sorted(set(adapter.shard.tensors) - used - skipped)
    if unused:
        raise ExportError(f"{len(unused)} adapter tensors were not used, the first is {unused[0]}")


def _vocabulary(weights: WeightFolder, changes: Mapping[str, Change], tied: TiedPair | None) -> int | None:
    """Rows of a resized embedding; the head must have been resized with it."""
    for embedding, head in keymap.TIED:
        names = [keymap.find(embedding, weights.tensors), keymap.find(head, weights.tensors)]
        if tied and tied.untie:
            names[1] = tied.head_file
        rows = {
            name: changes[name].shape[0] if name in changes else weights.tensors[name][1].shape[0]
            for name in names
            if name is not None
        }
        if names[0] is None:
            continue
        if len(set(rows.values())) > 1:
            listed = ", ".join(f"{name} has {count} rows" for name, count in rows.items())
            raise ExportError(
                f"embedding and head would not fit together: {listed}",
                fix="save both with the adapter (save_embedding_layers=True)",
            )
        new = rows[names[0]]
        return new if new != weights.tensors[names[0]][1].shape[0] else None
    return None


@dataclass
class _Builder:
    """Collects the changes, one adapter tensor after the other."""

    weights: WeightFolder
    config: Mapping[str, Any]
    adapter: AdapterFolder
    tied: TiedPair | None
    changes: dict[str, Change] = field(default_factory=dict)

    def save(self, name: str, entry: TensorEntry) -> None:
        """A tensor of the adapter takes the place of the base's; only an embedding may change its rows."""
        target, shape = self._locate(name, entry.name)
        same_width = len(shape) == 2 and len(entry.shape) == 2 and shape[1] == entry.shape[1]
        vocabulary = any(name in pair for pair in keymap.TIED)
        if entry.shape != shape and not (vocabulary and same_width):
            raise self._misfit(entry.name, entry.shape, target, shape)
        self._put(target, Change(entry.shape, source=entry))

    def update(self, pair: LoraPair) -> None:
        """A LoRA pair updates one tensor, or the tensors of all experts."""
        if pair.stacked:
            self._update_experts(pair)
            return
        target, shape = self._locate(pair.parameter, pair.a.name)
        existing = self.changes.get(target)
        if existing:  # an embedding saved along with its LoRA pair: the pair goes on top
            shape = existing.shape
        update = Update(pair, transposed=self._transposed(pair, target, shape))
        if existing and (existing.update or existing.tokens):
            raise ExportError(f"{target} of the base would be updated twice, by {pair.a.name}")
        self.changes[target] = replace(existing or Change(shape), update=update)
        if pair.bias is not None:
            self._add_bias(pair)

    def set_rows(self, rows: TokenRows) -> None:
        """Trained token rows replace rows of an embedding."""
        target, shape = self._locate(rows.parameter, rows.entry.name)
        existing = self.changes.get(target, Change(shape))
        if len(existing.shape) != 2 or existing.shape[1] != rows.entry.shape[1]:
            raise self._misfit(rows.entry.name, rows.entry.shape, target, existing.shape)
        before, after = existing.shape[0], max(rows.indices) + 1
        if after > before and {*range(before, after)} <= {*rows.indices}:
            existing = replace(existing, shape=(after, existing.shape[1]))  # new tokens, each with its row
        elif after > before:
            raise ExportError(
                f"{rows.entry.name} trains row {max(rows.indices)}, but {target} has {existing.shape[0]}",
                fix="save the resized embedding with the adapter (save_embedding_layers=True)",
            )
        if existing.update or existing.tokens:
            raise ExportError(f"{target} of the base would be updated twice, by {rows.entry.name}")
        self.changes[target] = replace(existing, tokens=rows)

    def finish(self) -> Mapping[str, Change]:
        """The changes; a kept tied head is written like the embedding, an untied head at least copied."""
        tied = self.tied
        if tied and tied.untie and tied.head_file not in self.changes:
            shape = self._shape(tied.embedding_file)
            source = self.changes.get(tied.embedding_file, Change(shape)).source
            with_pair = self.changes.get(tied.embedding_file, Change(shape)).update is not None
            self.changes[tied.head_file] = (
                Change(source.shape, source) if source and with_pair else Change(shape)
            )
        stored_twice = tied and not tied.untie and tied.head_file in self.weights.tensors
        if tied and stored_twice and tied.embedding_file in self.changes:
            self.changes[tied.head_file] = self.changes[tied.embedding_file]
        return self.changes

    def _shape(self, target: str) -> tuple[int, ...]:
        return self.weights.tensors[target][1].shape

    def _locate(self, name: str, key: str) -> tuple[str, tuple[int, ...]]:
        """The file tensor for a tensor of the model, and its shape."""
        if self.tied and name == self.tied.head:
            self._check_dtype(self.tied.embedding_file)
            return self.tied.head_file, self._shape(self.tied.embedding_file)
        target = keymap.find(name, self.weights.tensors)
        if target is None:
            raise ExportError(
                f"the adapter tensor {key} belongs to {name}, which the base {self.weights.path} lacks",
                fix=_OTHER_BASE,
            )
        self._check_dtype(target)
        return target, self._shape(target)

    def _check_dtype(self, target: str) -> None:
        dtype = self.weights.tensors[target][1].dtype
        if dtype not in MERGEABLE:
            raise ExportError(
                f"{target} of the base is {dtype}; only {', '.join(sorted(MERGEABLE))} can be changed",
                fix="use the 16-bit base",
            )

    def _put(self, target: str, change: Change) -> None:
        if target in self.changes:
            raise ExportError(f"{target} of the base would be updated twice, by {change.entries[0].name}")
        self.changes[target] = change

    def _misfit(self, key: str, found: tuple[int, ...], target: str, shape: tuple[int, ...]) -> ExportError:
        return ExportError(
            f"adapter tensor {key} {list(found)} does not fit {target} {list(shape)} of {self.weights.path}",
            fix=_OTHER_BASE,
        )

    def _transposed(self, pair: LoraPair, target: str, shape: tuple[int, ...]) -> bool:
        outputs, inputs = pair.b.shape[0], pair.a.shape[1]
        conv1d = self.config.get("model_type") in keymap.CONV1D and target.endswith(_CONV1D_LEAVES)
        if pair.magnitude is not None and (pair.embedding or conv1d or pair.magnitude.shape != (outputs,)):
            raise ExportError(
                f"{pair.magnitude.name}: DoRA merges into linear layers only", fix="merge with PEFT"
            )
        transposed = pair.embedding or conv1d
        if shape != ((inputs, outputs) if transposed else (outputs, inputs)):
            raise self._misfit(pair.b.name, (outputs, inputs), target, shape)
        return transposed

    def _add_bias(self, pair: LoraPair) -> None:
        assert pair.bias is not None
        target, shape = self._locate(pair.parameter.removesuffix("weight") + "bias", pair.bias.name)
        existing = self.changes.get(target, Change(shape))
        if pair.bias.shape != shape:
            raise self._misfit(pair.bias.name, pair.bias.shape, target, shape)
        self.changes[target] = replace(existing, bias=pair)

    def _update_experts(self, pair: LoraPair) -> None:
        stored = keymap.find(pair.parameter, self.weights.tensors)
        if stored is not None and len(self._shape(stored)) == 3:
            self._check_dtype(stored)
            experts, *matrix = self._shape(stored)
            self._check_stack(pair, experts, stored)
            transposed = self._expert_order(pair, stored, (matrix[0], matrix[1]))
            self._put(stored, Change(self._shape(stored), update=Update(pair, transposed, experts)))
            return
        parts = keymap.expert_parts(pair.parameter, self.weights.tensors)
        if not parts:
            raise ExportError(
                f"the adapter tensor {pair.a.name} belongs to {pair.parameter}, "
                f"and the base {self.weights.path} holds no such experts",
                fix=_OTHER_BASE,
            )
        experts, per_expert = parts[-1].expert + 1, parts[-1].parts
        self._check_stack(pair, experts, parts[0].name)
        rows, columns = self._shape(parts[0].name)
        transposed = self._expert_order(pair, parts[0].name, (rows * per_expert, columns))
        for part in parts:
            self._check_dtype(part.name)
            if self._shape(part.name) != (rows, columns):
                raise self._misfit(pair.b.name, pair.b.shape, part.name, self._shape(part.name))
            update = Update(pair, transposed, experts, part.expert, part.part * rows)
            self._put(part.name, Change((rows, columns), update=update))

    def _check_stack(self, pair: LoraPair, experts: int, target: str) -> None:
        if pair.a.shape[0] != pair.rank * experts or pair.b.shape[1] != pair.rank * experts:
            raise ExportError(
                f"{pair.a.name} has {pair.a.shape[0]} rows, but {experts} experts of rank {pair.rank} "
                f"({target}) need {experts * pair.rank}",
                fix=_OTHER_BASE,
            )

    def _expert_order(self, pair: LoraPair, target: str, matrix: tuple[int, int]) -> bool:
        """Whether B*A of one expert has to be transposed to become its matrix [first, second]."""
        outputs, inputs = pair.b.shape[0], pair.a.shape[1]
        if sorted((outputs, inputs)) != sorted(matrix):
            raise self._misfit(pair.b.name, (outputs, inputs), target, matrix)
        if outputs != inputs:
            return (outputs, inputs) != matrix
        stored_in_out = self.config.get("model_type") in keymap.EXPERTS_IN_OUT
        return stored_in_out or not self._peft_swaps()

    def _peft_swaps(self) -> bool:
        version = re.match(r"(\d+)\.(\d+)", str(self.adapter.config.get("peft_version", "")))
        return version is not None and (int(version[1]), int(version[2])) >= _PEFT_SWAPS_EXPERTS
