"""Where the weights of 4-bit layers are decoded: a place for each in a buffer of one decoder layer."""

from __future__ import annotations

from typing import Any

from torch import nn

from pronghorn.memory.counter import storage_key
from pronghorn.memory.layers import layers_of
from pronghorn.ops import select
from pronghorn.ops.buffer import DecodeBuffer, PackedWeight
from pronghorn.ops.packed import Packed
from pronghorn.patching.forwards import Declined
from pronghorn.quant.library import linears_4bit, packed_of

# the attribute of a 4-bit layer that holds its place; a copy of the model has places in a buffer of its own
SLOT = "decode_place"


class Place:
    """The place of one layer's weight, and the weight as last read from the layer."""

    def __init__(self, buffer: DecodeBuffer, offset: int) -> None:
        self.buffer = buffer
        self.offset = offset
        self.read: tuple[Any, Any, int] = (None, None, 0)
        self.packed: Packed | str = ""

    def weight(self, module: Any) -> PackedWeight | Declined:
        """The layer's present weight; it is read again only when it is another."""
        parameter, state, storage = self.read
        weight = module.weight
        if weight is not parameter or weight.quant_state is not state or storage_key(weight) != storage:
            self.read, self.packed = (weight, weight.quant_state, storage_key(weight)), packed_of(module)
        if isinstance(self.packed, str):
            return Declined(self.packed)
        return PackedWeight(self.packed, self.buffer, self.offset, module.compute_dtype)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles read their own layer."""
        return {"buffer": self.buffer, "offset": self.offset, "read": (None, None, 0), "packed": ""}


class PlacesSwitch:
    """Gives every 4-bit layer of a model its place, and takes the places back."""

    kind = "decode"

    def __init__(self, model: nn.Module) -> None:
        self.layers = [module for _, module in linears_4bit(model)]
        members: dict[int, list[Any]] = {}
        inside = {id(part): index for index, layer in enumerate(layers_of(model)) for part in layer.modules()}
        for index, module in enumerate(self.layers):
            # a weight outside the decoder layers is alone in the buffer
            members.setdefault(inside.get(id(module), -1 - index), []).append(module)
        self.offsets: list[tuple[nn.Module, int]] = []
        elements = 0
        for group in members.values():
            offset = 0
            for module in group:
                self.offsets.append((module, offset))
                offset += module.in_features * module.out_features
            elements = max(elements, offset)
        self.buffer = DecodeBuffer(elements, select.nf4_decode)

    def __str__(self) -> str:
        values = f"{self.buffer.elements:,} values"
        return f"{len(self.offsets)} weights, decoded into one buffer of {values}, the largest decoder layer"

    def on(self) -> None:
        """Set the places."""
        for module, offset in self.offsets:
            object.__setattr__(module, SLOT, Place(self.buffer, offset))

    def off(self) -> None:
        """Remove them, and the buffer's memory."""
        for module, _ in self.offsets:
            module.__dict__.pop(SLOT, None)
        self.buffer.rooms.clear()


def packed_weight(module: nn.Module) -> PackedWeight | Declined:
    """The weight of a 4-bit layer, for a product."""
    place: Place | None = module.__dict__.get(SLOT)
    return Declined("its model was not accelerated as a whole") if place is None else place.weight(module)
