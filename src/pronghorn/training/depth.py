"""The decoder layers of a model: which are alike, and the model cut down to some of them for a while."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from pronghorn.adapters.origin import base_of
from pronghorn.memory.layers import layers_of
from pronghorn.patching.signature import signature

# layers of one make that are rehearsed: the first two differ from each other and from the rest at the ends
LEAST_LAYERS = 2


class Depth:
    """The decoder layers of a model: which are alike, and the model cut down to some of them."""

    def __init__(self, model: Any) -> None:
        base = base_of(model)
        text = base.config.get_text_config()
        self._model = model
        self._lists = [
            m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) and _all_layers(m)
        ]
        self._all = list(self._lists[0]) if len(self._lists) == 1 else []
        self.count = len(layers_of(model))
        self._types = list(getattr(text, "layer_types", None) or [])
        configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
        self._configs = [
            config
            for config in configs.values()
            if getattr(config, "num_hidden_layers", None) == len(self._all)
        ]
        makes = [(signature(layer), self._type(index)) for index, layer in enumerate(self._all)]
        counts, places = (
            Counter(makes),
            {make: [i for i, m in enumerate(makes) if m == make] for make in makes},
        )
        self.few = sorted(i for found in places.values() for i in found[:LEAST_LAYERS])
        self.repeated = [
            (sorted([*self.few, found[LEAST_LAYERS]]), counts[make] - LEAST_LAYERS)
            for make, found in places.items()
            if counts[make] > LEAST_LAYERS
        ]
        if sum(times for _, times in self.repeated) <= len(self.repeated):  # nothing would be left out
            self.few, self.repeated = list(range(len(self._all))), []
        self.rehearsed = sorted({*self.few, *(i for more, _ in self.repeated for i in more)})
        with self.only(self.few):
            trained = [p for p in model.parameters() if p.requires_grad]
            self.shallow_gradients = sum(p.numel() * p.element_size() for p in trained)

    def _type(self, index: int) -> Any:
        return self._types[index] if index < len(self._types) else None

    @contextmanager
    def only(self, layers: Sequence[int]) -> Iterator[None]:
        """Inside the block the model has these of its layers."""
        if not self._all or len(layers) == len(self._all):
            yield
            return
        (place,) = self._lists
        before = dict(place._modules)
        place._modules = {str(i): self._all[index] for i, index in enumerate(layers)}
        self._tell(len(layers), [self._type(index) for index in layers])
        try:
            yield
        finally:
            place._modules = before
            self._tell(len(self._all), self._types)

    def _tell(self, count: int, types: list[Any]) -> None:
        for config in self._configs:
            config.num_hidden_layers = count
            if self._types:
                config.layer_types = types


def _all_layers(modules: nn.ModuleList) -> bool:
    kinds = layers_of(modules)
    return all(any(layer is kind for kind in kinds) for layer in modules)
