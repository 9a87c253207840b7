"""Write GGUF files through the ``gguf`` package: the header at once, tensors some rows at a time.

Memory holds the tokens and one run of rows, whatever the size of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pronghorn.errors import ExportError, MissingDependencyError
from pronghorn.export.gguf_models import PlannedTensor
from pronghorn.weights.reader import read_rows, read_tensor

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

# rows at hand: 32 MiB in float32, and as much again coded
_RUN_ELEMENTS = 8 * 2**20
_ALIGNMENT = 32
_Q8_BLOCK = 32
# what Python writes: format -> (ggml's type, llama.cpp's file type)
WRITTEN: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "f32": ("F32", "ALL_F32"),
        "f16": ("F16", "MOSTLY_F16"),
        "bf16": ("BF16", "MOSTLY_BF16"),
        "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
    }
)
_BLOCK_BYTES = {"F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q8_0": (_Q8_BLOCK, 34)}


@dataclass(frozen=True)
class Output:
    """A tensor to write: its type, and its values, some rows after the other, as they lie in the file."""

    name: str
    shape: tuple[int, ...]
    kind: str
    runs: Callable[[], Iterator[bytes]]

    @property
    def nbytes(self) -> int:
        """Bytes in the file, padding not counted."""
        elements, size = _BLOCK_BYTES[self.kind]
        return prod(self.shape) // elements * size


def require_gguf() -> None:
    """Say what to install where the library is missing.

    Raises:
        MissingDependencyError: with the command.
    """
    if find_spec("gguf") is None:
        raise MissingDependencyError("GGUF needs the gguf package", fix="pip install 'pronghorn[gguf]'")


def type_of(shape: tuple[int, ...], wanted: str) -> str:
    """The type a tensor is written in: vectors in float32, rows that no block divides in 16 bit."""
    if len(shape) < 2:
        return "F32"
    return "F16" if wanted == "Q8_0" and shape[-1] % _Q8_BLOCK else wanted


def stored(tensor: PlannedTensor, wanted: str) -> Output:
    """A tensor of the model's files, in ``wanted`` where that is possible."""
    shape = tensor.base[1].shape
    kind = type_of(shape, wanted)
    return Output(tensor.name, shape, kind, lambda: _runs(tensor, kind))


def computed(name: str, values: list[float]) -> Output:
    """A float32 vector that no file holds."""
    return Output(name, (len(values),), "F32", lambda: iter([np.asarray(values, np.float32).tobytes()]))


def lazy(name: str, shape: tuple[int, ...], values: Callable[[], torch.Tensor]) -> Output:
    """A float32 tensor that is read when it is its turn."""
    return Output(name, shape, "F32", lambda: iter([values().contiguous().numpy().tobytes()]))


def total_bytes(outputs: list[Output]) -> int:
    """Bytes of all tensors in the file, padding included."""
    return sum(-(-output.nbytes // _ALIGNMENT) * _ALIGNMENT for output in outputs)


def _runs(tensor: PlannedTensor, kind: str) -> Iterator[bytes]:
    shard, entry = tensor.base
    if len(entry.shape) < 2:
        values = interleave(read_tensor(shard, entry).float() + tensor.offset, tensor.heads)
        yield _encode(values, kind, tensor.name)
        return
    rows, columns = entry.shape[0], prod(entry.shape[1:])
    unit = rows // tensor.heads if tensor.heads else 1
    count = max(1, _RUN_ELEMENTS // (columns * unit)) * unit
    for first in range(0, rows, count):
        values = read_rows(shard, entry, first, min(first + count, rows))
        heads = len(values) // unit if tensor.heads else 0
        yield _encode(interleave(values, heads) + tensor.offset, kind, tensor.name)


def interleave(values: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from halves (i, i + width/2) to pairs (2i, 2i + 1), as llama.cpp rotates them.

    Args:
        values: ``[heads * width, ...]``.
        heads: 0 to leave them as they are.
    """
    if not heads:
        return values
    width = values.shape[0] // heads
    pairs = values.reshape(heads, 2, width // 2, *values.shape[1:]).swapaxes(1, 2)
    return pairs.reshape(values.shape)


def _encode(values: torch.Tensor, kind: str, name: str) -> bytes:
    """The bytes of some rows; every type but Q8_0 is a cast of torch's, rounded to nearest even."""
    if kind == "Q8_0":
        from gguf import GGMLQuantizationType, quants

        if not bool(torch.isfinite(values).all()):
            raise ExportError(
                f"{name} holds NaN or infinity; nothing was kept", fix="use another copy of the base"
            )
        coded: np.ndarray[Any, Any] = quants.quantize(values.float().numpy(), GGMLQuantizationType.Q8_0)
        return coded.tobytes()
    wanted = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    cast = values.to(wanted).contiguous()
    if wanted is torch.float16 and values.dtype is not torch.float16 and not bool(torch.isfinite(cast).all()):
        raise ExportError(
            f"{name} holds values beyond float16, or NaN; nothing was kept", fix="export gguf-bf16 instead"
        )
    return cast.view(torch.uint8).numpy().tobytes()


def write_file(
    path: Path,
    architecture: str,
    metadata: Mapping[str, Any],
    outputs: list[Output],
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write one GGUF file; returns its size in bytes.

    Raises:
        ExportError: a value does not fit its type.
        OSError: the disk is full or fails.
    """
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, architecture)
    for key, value in metadata.items():
        _add(writer, key, value)
    for output in outputs:
        kind: GGMLQuantizationType = GGMLQuantizationType[output.kind]
        writer.add_tensor_info(output.name, output.shape, np.dtype(np.float32), output.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    total, done = total_bytes(outputs), 0
    with path.open("ab") as file:
        file.write(bytes(-file.tell() % _ALIGNMENT))
        for output in outputs:
            size = 0
            for run in output.runs():
                size += file.write(run)
            assert size == output.nbytes, f"{output.name}: {size} bytes, not {output.nbytes}"
            done += size + file.write(bytes(-size % _ALIGNMENT))
            if progress:
                progress(done, total)
        return file.tell()


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
