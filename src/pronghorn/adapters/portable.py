"""Can an adapter be served as it is? What vLLM and llama.cpp refuse or ignore, named with the remedy.

Read from adapter_config.json and the header of the weights; vLLM need not be installed. The rules are those
of vLLM 0.32 (lora/peft_helper.py, lora/lora_model.py, config/lora.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pronghorn.errors import NotSupportedError
from pronghorn.sources.resolve import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_json
from pronghorn.weights.shards import read_shard

# the values vLLM allows for max_lora_rank
ALLOWED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

_NO_DORA = "vLLM refuses DoRA, llama.cpp has no place for its magnitudes"
_MERGE = "merge it: --format merged_16bit"
_CONVERT = "convert it with PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)"
_RETRAIN = "train without it, or merge with PEFT"
_PLAIN_INIT = frozenset({"gaussian", "eva", "orthogonal", "true", "false", "none"})
# option of adapter_config.json -> (why it cannot be served, the remedy)
_OPTIONS: tuple[tuple[str, str, str], ...] = (
    ("use_dora", _NO_DORA, _MERGE),
    ("lora_bias", "vLLM refuses LoRA's own bias", _MERGE),
    ("layer_replication", "vLLM refuses it", _RETRAIN),
    ("alora_invocation_tokens", "vLLM refuses activated LoRA", _RETRAIN),
    ("use_bdlora", "vLLM refuses block-diagonal LoRA", _RETRAIN),
    ("use_qalora", "vLLM refuses QALoRA", _RETRAIN),
)
# pattern of a tensor's name -> (what it is, why it cannot be served, the remedy); the first match counts
_TENSORS: tuple[tuple[str, str, str, str], ...] = (
    (r"\.lora_magnitude_vector", "DoRA", _NO_DORA, _MERGE),
    (r"\.lora_B\.bias$", "lora_bias", "vLLM refuses LoRA's own bias", _MERGE),
    (r"\.trainable_tokens_delta$", "trainable_token_indices", "vLLM refuses trained token rows", _MERGE),
    (r"\.experts(\.base_layer)?\.lora_", "target_parameters",
     "vLLM loads stacked experts of some classes only, and its CPU build none", _MERGE),
    (r"(^|\.)(vision|visual|audio|image)[^.]*\..*\.lora_", "LoRA in an image or sound tower",
     "vLLM leaves it out without a word unless told otherwise", _MERGE),
    (r"\.lora_(A|B|embedding_A|embedding_B)(\.weight)?$", "", "", ""),  # an ordinary pair
    (r"\.base_layer\.weight$", "", "", ""),  # a copy of an embedding; the writer compares it with the base
    (r"\.bias$", "bias", "vLLM refuses trained biases", _MERGE),
    (r"", "modules_to_save", "vLLM refuses modules trained in full", _MERGE),
)  # fmt: skip


@dataclass(frozen=True)
class Blocker:
    """One thing that keeps an adapter from being served: ``what`` it is, ``why``, and the ``remedy``."""

    what: str
    why: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what}: {self.why} ({self.remedy})"


def blockers(folder: Path) -> tuple[Blocker, ...]:
    """Everything in an adapter folder that vLLM rejects or ignores; empty when it can be made portable.

    Raises:
        SourceError: a file is missing or broken.
    """
    config = read_json(folder / ADAPTER_CONFIG)
    found = list(_config_blockers(config))
    found += _tensor_blockers(config, read_shard(folder / ADAPTER_WEIGHTS).tensors)
    return tuple({blocker.what: blocker for blocker in found}.values())


def refuse(folder: Path, found: Iterable[Blocker]) -> None:
    """Raise for blockers, all of them named.

    Raises:
        NotSupportedError: there is one.
    """
    listed = list(found)
    if listed:
        reasons = "\n  - ".join(map(str, listed))
        remedies = sorted({blocker.remedy for blocker in listed})
        raise NotSupportedError(
            f"the adapter {folder} cannot be served as an adapter:\n  - {reasons}",
            fix=remedies[0] if len(remedies) == 1 else "apply the remedy behind each line",
        )


def max_lora_rank(rank: int) -> int | None:
    """The smallest value of vLLM's max_lora_rank that holds adapters of ``rank``; None beyond the largest."""
    return next((allowed for allowed in ALLOWED_RANKS if allowed >= rank), None)


def _config_blockers(config: Mapping[str, Any]) -> Iterable[Blocker]:
    kind = config.get("peft_type")
    if kind != "LORA":
        yield Blocker(f"peft_type {kind}", "vLLM and llama.cpp serve LORA only", "merge it with PEFT")
    init = config.get("init_lora_weights", True)
    if str(init).lower() not in _PLAIN_INIT:
        yield Blocker(
            f"init_lora_weights={init!r}", "it changed the base's weights, which are not served", _CONVERT
        )
    for option, why, remedy in _OPTIONS:
        if config.get(option):
            yield Blocker("DoRA" if option == "use_dora" else option, why, remedy)


def _tensor_blockers(config: Mapping[str, Any], tensors: Iterable[str]) -> list[Blocker]:
    found: dict[str, tuple[Blocker, list[str]]] = {}
    for name in tensors:
        what, why, remedy = next(rest for pattern, *rest in _TENSORS if re.search(pattern, name))
        if what:
            found.setdefault(what, (Blocker(what, why, remedy), []))[1].append(name)
    listed = []
    for blocker, names in found.values():
        first = names[0].removeprefix("base_model.model.")
        told = f"{blocker.why}; {len(names)} tensors, first {first}"
        listed.append(Blocker(blocker.what, told, blocker.remedy))
    ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    largest = max((rank for rank in ranks if isinstance(rank, int)), default=1)
    if max_lora_rank(largest) is None:
        listed.append(
            Blocker(f"rank {largest}", f"vLLM's largest max_lora_rank is {ALLOWED_RANKS[-1]}", _MERGE)
        )
    return listed
