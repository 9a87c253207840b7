"""Models for the deep check where not even one float32 model fits: read from their files, module by module.

accelerate leaves every weight on the disk (transformers' own loader does the renaming and fusing); here the
parameters of a module are read, made float32, and let go again, at each call of the module that owns them.
Between calls a parameter is one NaN seen as a matrix: code that reads a weight past its module's call gives
logits that are not finite, never wrong ones.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pronghorn.export import verify_model
from pronghorn.export.verify_decode import DecodedWeights
from pronghorn.export.verify_folder import ADAPTER_WEIGHTS, Folder, read_header
from pronghorn.export.verify_model import Answer

# Every token of an answer reads all weights again.
NEW_TOKENS = 6
_GIB = 1 << 30
_EMPTY = torch.tensor(torch.nan)
# PEFT stores an embedding that it adapts with the adapter, whole
_PLACE = re.compile(r"^base_model\.model\.|\.base_layer(?=\.)")


def streamed_bytes(folder: Folder, adapter: Path | None) -> int:
    """Peak of a model read module by module: the largest one twice in float32, the adapter twice, 1 GiB.

    The experts of a layer count as one module, however the file stores them.
    """
    sizes: Counter[str] = Counter()
    for name, tensor in folder.tensors.items():
        sizes[name.partition(".experts.")[0]] += prod(tensor.shape) * 4
    added = (adapter / ADAPTER_WEIGHTS).stat().st_size if adapter is not None else 0
    return max(sizes.values()) * 2 + added * 2 + _GIB


@dataclass(frozen=True)
class Change:
    """What an adapter does to one parameter: PEFT's layer adds to it, or another takes its place."""

    layer: Any = None
    replacement: torch.Tensor | None = None

    def applied(self, values: torch.Tensor) -> torch.Tensor:
        """The parameter with the adapter in it, float32."""
        if self.replacement is not None:
            return self.replacement
        for adapter in self.layer.active_adapters:
            values = values + self.layer.get_delta_weight(adapter)
        return values


class Streamed:
    """How the deep check loads and runs models that do not fit; see ``Whole`` for those that do.

    ``scratch``: where transformers writes those weights whose layout in the file is not the model's.
    ``largest``: bytes of the parameters that were in memory at one time, at most.
    """

    new_tokens = NEW_TOKENS

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.largest = self._held = 0
        self._weights: Mapping[str, torch.Tensor] = {}
        self._names: dict[nn.Parameter, str] = {}
        self._loaded: dict[nn.Parameter, torch.Tensor] = {}
        self._changes: dict[nn.Parameter, Change] = {}
        self._rounding: verify_model.Rounding | None = None

    @property
    def told(self) -> str:
        """What the report says of it."""
        return "; weights read module by module"

    def plain(self, folder: Path) -> Any:
        """A model folder."""
        model = self._open(folder)
        self._read_at_calls(model)
        return model

    def decoded(self, folder: Folder, base: Path) -> Any:
        """A model of the base's class with the folder's weights, each read and decoded as it is needed.

        Raises:
            ValueError: the vocabulary is not the base's.
        """
        model = self._open(base)
        weights = DecodedWeights(folder, self._weights)
        table = next(name for p, name in self._names.items() if p is model.get_input_embeddings().weight)
        if weights[table].shape != model.get_input_embeddings().weight.shape:
            raise ValueError("the adapter grows the vocabulary, which needs the whole model in memory")
        self._weights = weights
        self._read_at_calls(model)
        return model

    def with_adapter(self, base: Path, adapter: Path) -> Any:
        """Base + adapter by plain PEFT.

        Raises:
            ValueError: the adapter has rows beyond the base's vocabulary.
        """
        from peft import PeftModel

        model = self._open(base)
        if verify_model.vocabulary_rows(adapter) > model.get_input_embeddings().weight.shape[0]:
            raise ValueError("the adapter grows the vocabulary, which needs the whole model in memory")
        stored = {_PLACE.sub("", name) for name in read_header(adapter / ADAPTER_WEIGHTS)}
        own = [parameter for parameter, name in self._names.items() if name in stored]
        for parameter in own:
            parameter.data = torch.full(parameter.shape, torch.nan)
        wrapped = PeftModel.from_pretrained(model, adapter).eval()
        for parameter in own:
            if not parameter.isnan().all():  # else it was for a copy of the module, which is trained whole
                self._loaded[parameter] = parameter.data
            parameter.data = _EMPTY.expand(parameter.shape)
        self._read_at_calls(wrapped)
        return wrapped

    @contextmanager
    def reference(self, wrapped: Any, folder: Folder) -> Iterator[Any]:
        """PEFT's own delta added in float32 to each weight as it is read, rounded once to the stored dtype.

        Raises:
            ValueError: an adapter whose effect is not a sum (DoRA, a bias, trained tokens).
        """
        self._changes = _changes(wrapped)
        self._rounding = verify_model.Rounding(folder)
        try:
            with wrapped.disable_adapter():
                yield wrapped
        finally:
            self._rounding = None

    def answers(
        self, _model: Any, truth: tuple[Answer, ...], found: tuple[torch.Tensor, ...], ends: list[int]
    ) -> list[Answer]:
        """Greedy answers read off the logits: one pass over the weights instead of one per token."""
        return [verify_model.forced_answer(*each, ends) for each in zip(truth, found, strict=True)]

    def _open(self, folder: Path) -> Any:
        """The model with all weights on the disk, and one NaN in the shape of each parameter in its place."""
        from accelerate.hooks import remove_hook_from_module

        placing = {"device_map": {"": "disk"}, "offload_folder": self.scratch / folder.name}
        model = verify_model.load_model(folder, **placing)
        hooks: list[Any] = [getattr(module, "_hf_hook", None) for module in model.modules()]
        self._weights = next(
            h.weights_map.dataset for h in hooks if getattr(h, "weights_map", None) is not None
        )
        remove_hook_from_module(model, recurse=True)
        del model.hf_device_map  # PEFT and generate take the model for one on the CPU, which it is
        self._names, self._loaded = {}, {}
        places: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            places.setdefault(id(parameter), []).append(name)
        for names in places.values():
            shape = model.get_parameter(names[0]).shape
            empty = nn.Parameter(_EMPTY.expand(shape), requires_grad=False)
            self._names[empty] = next(name for name in names if name in self._weights)
            for name in names:
                module, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(module), leaf, empty)
        return model

    def _read_at_calls(self, model: Any) -> None:
        """Hooks on every module that owns parameters; of one that PEFT wraps by name, the wrapper."""
        wrappers = [n for n, module in model.named_modules() if hasattr(module, "parameter_name")]
        for name, module in model.named_modules():
            outer = next((w for w in wrappers if name.startswith(w + ".")), None)
            owned = [p for p in module.parameters(recurse=False) if p in self._names]
            if owned:
                owner = model.get_submodule(outer) if outer is not None else module
                owner.register_forward_pre_hook(lambda *_, owned=owned: self._fetch(owned))
                owner.register_forward_hook(lambda *_, owned=owned: self._drop(owned), always_call=True)

    def _fetch(self, owned: list[nn.Parameter]) -> None:
        for parameter in owned:
            parameter.data = self._value(parameter)
        self._held += sum(p.nbytes for p in owned)
        self.largest = max(self.largest, self._held)

    def _drop(self, owned: list[nn.Parameter]) -> None:
        self._held -= sum(p.nbytes for p in owned)
        for parameter in owned:
            parameter.data = _EMPTY.expand(parameter.shape)

    def _value(self, parameter: nn.Parameter) -> torch.Tensor:
        name = self._names[parameter]
        values = self._loaded[parameter] if parameter in self._loaded else self._weights[name].float()
        if self._rounding is None:
            return values
        change = self._changes.get(parameter)
        return self._rounding.rounded(name, values if change is None else change.applied(values))


def _changes(wrapped: Any) -> dict[nn.Parameter, Change]:
    """What the adapter makes of each base parameter that it changes."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    found: dict[nn.Parameter, Change] = {}
    for name, module in wrapped.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            saved = dict(module.modules_to_save[module.active_adapter].named_parameters())
            for leaf, parameter in module.original_module.named_parameters():
                found[parameter] = Change(replacement=saved[leaf].detach())
        elif isinstance(module, BaseTunerLayer) and hasattr(module, "get_delta_weight"):
            if module.lora_variant or any(module.lora_bias.values()):
                raise ValueError(f"{name}: DoRA and the like, or a bias: needs the whole model in memory")
            parameter = getattr(module.get_base_layer(), getattr(module, "parameter_name", "weight"))
            found[parameter] = Change(module)
        elif isinstance(module, AuxiliaryTrainingWrapper):
            raise ValueError(f"{name}: {type(module).__name__} needs the whole model in memory")
    return found
