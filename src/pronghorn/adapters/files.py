"""An adapter folder as data: every tensor is classified, what cannot be merged is refused by name."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pronghorn.errors import AdapterError, NotSupportedError
from pronghorn.sources.record import AdapterRecord, read_record
from pronghorn.sources.resolve import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_json
from pronghorn.weights.shards import Shard, TensorEntry, read_shard

DEFAULT_NAME = "default"
_PREFIX = "base_model.model."
_CHECKPOINT = re.compile(r"checkpoint-\d+|checkpoints")

_CHANGES_BASE = (
    "it changed the base's own weights when training began, so it does not belong to the base's files"
)
# values of init_lora_weights that leave the base as it is
_PLAIN_INIT = frozenset({"gaussian", "eva", "orthogonal", "true", "false", "none"})
# option of adapter_config.json -> why an adapter that uses it cannot be merged into files
_REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "use_qalora": "its matrices work on pooled inputs",
        "use_bdlora": "its matrices are block-diagonal",
        "alora_invocation_tokens": "it acts only after certain tokens",
        "arrow_config": "it routes between adapters at run time",
        "kasa_config": "its update is not a plain B*A",
        "monteclora_config": "its update is random",
        "layer_replication": "its model has more layers than the base",
        "megatron_config": "it belongs to Megatron's own layers",
    }
)


@dataclass(frozen=True)
class LoraPair:
    """One low-rank update: A [r, in] and B [out, r] of a module or parameter of the model.

    ``parameter`` is the full name of the weight in the model; ``embedding`` means A is [r, vocabulary] and B
    [width, r]; ``stacked`` that A is [experts*r, in] and B [out, r*experts]. ``magnitude`` is DoRA's vector
    [out], ``bias`` is added (scaled) to the module's bias.
    """

    parameter: str
    a: TensorEntry
    b: TensorEntry
    rank: int
    scaling: float
    embedding: bool = False
    stacked: bool = False
    magnitude: TensorEntry | None = None
    bias: TensorEntry | None = None

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        """The adapter tensors this update uses."""
        return tuple(entry for entry in (self.a, self.b, self.magnitude, self.bias) if entry is not None)


@dataclass(frozen=True)
class TokenRows:
    """Trained rows of an embedding: row ``indices[i]`` of ``parameter`` becomes row i of ``entry``."""

    parameter: str
    indices: tuple[int, ...]
    entry: TensorEntry


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter's files, classified. ``saved`` are whole tensors by their names in the model."""

    path: Path
    config: Mapping[str, Any]
    record: AdapterRecord | None
    shard: Shard
    pairs: tuple[LoraPair, ...]
    saved: Mapping[str, TensorEntry]
    tokens: tuple[TokenRows, ...]


def choose_adapter(folder: Path, name: str | None = None) -> Path:
    """The folder of one adapter: ``folder`` itself, or the subfolder where PEFT puts one with another name.

    Raises:
        AdapterError: there is none, there are several and no name was given, or none has that name.
    """
    root = (folder / ADAPTER_CONFIG).is_file()
    found = {DEFAULT_NAME: folder} if root else {}
    for path in sorted(folder.glob(f"*/{ADAPTER_CONFIG}")):
        if not (root and _CHECKPOINT.fullmatch(path.parent.name)):
            found.setdefault(path.parent.name, path.parent)
    if not found:
        raise AdapterError(
            f"{folder} holds no adapter ({ADAPTER_CONFIG})", fix="give the folder the adapter was saved to"
        )
    if name is not None and name not in found:
        raise AdapterError(
            f"{folder} has no adapter {name!r}, only {', '.join(found)}", fix="choose one of these"
        )
    if name is None and len(found) > 1:
        raise AdapterError(
            f"{folder} holds {len(found)} adapters: {', '.join(found)}",
            fix="choose one with adapter_name= (--adapter-name)",
        )
    return found[name] if name is not None else next(iter(found.values()))


def read_adapter(path: Path) -> AdapterFolder:
    """Read and classify the adapter in a folder; no tensor is read.

    Raises:
        AdapterError: a tensor is missing, malformed or of a kind that is not known.
        NotSupportedError: the adapter uses an option that cannot be merged into the base's files.
        SourceError: a file is missing or broken.
    """
    config = read_json(path / ADAPTER_CONFIG)
    _refuse_options(path, config)
    shard = read_shard(path / ADAPTER_WEIGHTS)
    sorted_out = _Sorted(path)
    for key, entry in shard.tensors.items():
        sorted_out.add(key, entry)
    pairs = tuple(_pair(path, config, module, parts) for module, parts in sorted(sorted_out.lora.items()))
    pairs = _name_parameters(path, config, pairs)
    tokens = tuple(
        _token_rows(path, config, name, entry) for name, entry in sorted(sorted_out.tokens.items())
    )
    if not pairs and not tokens and not sorted_out.saved:
        raise AdapterError(f"{path / ADAPTER_WEIGHTS} holds no tensors", fix="save the adapter again")
    saved = MappingProxyType(sorted_out.saved)
    return AdapterFolder(path, config, read_record(path), shard, pairs, saved, tokens)


def no_adapter(folder: Path) -> AdapterFolder:
    """An adapter that changes nothing: what is merged into a model that is whole."""
    shard = Shard(folder, b"", MappingProxyType({}), 0, MappingProxyType({}))
    return AdapterFolder(folder, {}, None, shard, (), {}, ())


def _refuse_options(path: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise NotSupportedError(
            f"{path} is a {config.get('peft_type')} adapter, and only LORA adapters can be merged",
            fix="merge it with PEFT",
        )
    init = str(config.get("init_lora_weights", True)).lower()
    if init not in _PLAIN_INIT:
        raise NotSupportedError(
            f"{path} says init_lora_weights={init!r}: {_CHANGES_BASE}",
            fix="convert it with PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )
    for option, reason in _REFUSED.items():
        if config.get(option):
            raise NotSupportedError(
                f"{path} uses {option}: {reason}, it cannot be merged", fix=f"train without {option}"
            )


@dataclass
class _Sorted:
    """The keys of an adapter file, sorted by what they are."""

    path: Path
    lora: dict[str, dict[str, TensorEntry]] = field(default_factory=dict)
    saved: dict[str, TensorEntry] = field(default_factory=dict)
    tokens: dict[str, TensorEntry] = field(default_factory=dict)

    _LORA = re.compile(
        r"(?P<module>.+)\.(?P<kind>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B"
        r"|lora_magnitude_vector)(\.weight)?"
    )
    _TOKENS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta")

    def add(self, key: str, entry: TensorEntry) -> None:
        if not key.startswith(_PREFIX):
            raise self._unknown(key)
        name = key.removeprefix(_PREFIX)
        if match := self._LORA.fullmatch(name):
            self.lora.setdefault(match["module"], {})[match["kind"]] = entry
        elif match := self._TOKENS.fullmatch(name):
            self.tokens[f"{match['module']}.weight"] = entry
        elif "lora_" in name or ".original_module." in name or ".modules_to_save." in name:
            raise self._unknown(key)
        else:
            plain = name.replace(".token_adapter.", ".").replace(".base_layer.", ".")
            if plain in self.saved:
                raise AdapterError(
                    f"{self.path / ADAPTER_WEIGHTS} holds {plain} twice", fix="save the adapter again"
                )
            self.saved[plain] = entry

    def _unknown(self, key: str) -> AdapterError:
        return AdapterError(
            f"{self.path / ADAPTER_WEIGHTS} holds {key}, which is no tensor of a PEFT LoRA adapter",
            fix="save the adapter again with PEFT (save_pretrained)",
        )


def _pair(path: Path, config: Mapping[str, Any], module: str, parts: Mapping[str, TensorEntry]) -> LoraPair:
    embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    keys = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    missing = [key for key in keys if key not in parts]
    if missing or (embedding and len(parts) > 2):
        what = f"lacks {missing[0]}" if missing else "mixes embedding and linear updates"
        raise AdapterError(f"{path / ADAPTER_WEIGHTS}: {module} {what}", fix="save or copy the adapter again")
    a, b = (parts[key] for key in keys)
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        raise AdapterError(
            f"{path / ADAPTER_WEIGHTS}: A {list(a.shape)} and B {list(b.shape)} of {module} do not multiply",
            fix="only linear layers, embeddings and expert parameters can be merged; merge others with PEFT",
        )
    magnitude, bias = parts.get("lora_magnitude_vector"), parts.get("lora_B.bias")
    return LoraPair(module, a, b, a.shape[0], 0.0, embedding=embedding, magnitude=magnitude, bias=bias)


def _name_parameters(
    path: Path, config: Mapping[str, Any], pairs: tuple[LoraPair, ...]
) -> tuple[LoraPair, ...]:
    """Give each pair (still under its module's key) the parameter it belongs to, its rank and its scaling.

    PEFT wraps parameters targeted by name one inside the other, in their order in the module: in
    ``experts.base_layer.lora_A`` the innermost, first one (gate_up_proj), in ``experts.lora_A`` the next.
    """
    targets = tuple(config.get("target_parameters") or ())
    by_module: dict[str, list[LoraPair]] = {}
    for pair in pairs:
        by_module.setdefault(pair.parameter.replace(".base_layer", ""), []).append(pair)
    named: list[LoraPair] = []
    for module, members in by_module.items():
        members.sort(key=lambda pair: len(pair.parameter), reverse=True)
        leaves = [
            leaf for leaf in _EXPERT_PARAMETERS if any(_targets(f"{module}.{leaf}", name) for name in targets)
        ]
        if module.endswith(".experts") and len(leaves) == len(members):
            names, stacked = [f"{module}.{leaf}" for leaf in leaves], True
        elif len(members) == 1 and members[0].parameter == module:
            names, stacked = [f"{module}.weight"], False
        else:
            raise AdapterError(
                f"{path / ADAPTER_WEIGHTS} has {len(members)} updates of {module}, and target_parameters "
                f"{sorted(targets)} does not say of which parameters",
                fix="train the adapter on module names, or merge it with PEFT",
            )
        for pair, name in zip(members, names, strict=True):
            by_name = stacked or any(_targets(name, target) for target in targets)
            rank, scaling = _rank_and_scaling(path, config, name if by_name else module)
            named.append(replace(pair, parameter=name, rank=rank, scaling=scaling, stacked=stacked))
    for pair in named:
        if pair.a.shape[0] != pair.rank and not (pair.stacked and pair.a.shape[0] % pair.rank == 0):
            raise AdapterError(
                f"{path / ADAPTER_CONFIG} gives {pair.parameter} the rank {pair.rank}, "
                f"its tensors have {pair.a.shape[0]}",
                fix="restore the adapter_config.json that was saved with these weights",
            )
    return tuple(sorted(named, key=lambda pair: pair.parameter))


# the stacked expert parameters, in the order in which modules define them
_EXPERT_PARAMETERS = ("gate_up_proj", "down_proj")


def _targets(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _rank_and_scaling(path: Path, config: Mapping[str, Any], key: str) -> tuple[int, float]:
    rank = _by_pattern(config.get("rank_pattern"), key, config.get("r"))
    alpha = _by_pattern(config.get("alpha_pattern"), key, config.get("lora_alpha"))
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)):
        raise AdapterError(
            f"{path / ADAPTER_CONFIG} gives {key} the rank {rank!r} and alpha {alpha!r}",
            fix="restore the adapter_config.json that was saved with these weights",
        )
    return rank, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _by_pattern(patterns: Mapping[str, Any] | None, key: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the key, from a dot on."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", key):
            return value
    return default


def _token_rows(path: Path, config: Mapping[str, Any], parameter: str, entry: TensorEntry) -> TokenRows:
    listed = config.get("trainable_token_indices")
    module = parameter.removesuffix(".weight")
    if isinstance(listed, Mapping):
        listed = next((value for name, value in listed.items() if _targets(module, name)), None)
    if (
        not isinstance(listed, list)
        or len(set(listed)) != len(listed)
        or len(entry.shape) != 2
        or len(listed) != entry.shape[0]
        or not all(isinstance(index, int) and index >= 0 for index in listed)
    ):
        raise AdapterError(
            f"{path / ADAPTER_CONFIG} does not give a token index for each trained row of {module}",
            fix="restore the adapter_config.json that was saved with these weights",
        )
    return TokenRows(parameter, tuple(listed), entry)
