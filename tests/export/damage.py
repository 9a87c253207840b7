"""Ways to change a good folder: edits of its JSON files, its weights and its index, and single files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"
DROP = "DROP"

Damage = Callable[[Path], object]


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; ``DROP`` removes one."""
    content = json.loads(path.read_text()) if path.exists() else {}
    content.update(changes)
    path.write_text(json.dumps({key: value for key, value in content.items() if value != DROP}))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Rewrite the folder's weights as one file, after ``edit`` changed the dictionary of tensors."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        tensors.update(load_file(file))
        file.unlink()
    (folder / INDEX).unlink(missing_ok=True)
    edit(tensors)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )


def edit_index(folder: Path, edit: Callable[[dict[str, str]], object]) -> None:
    """Change the weight_map of the index."""
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def drop(*names: str) -> Damage:
    """Remove tensors."""
    return lambda folder: edit_weights(folder, lambda tensors: [tensors.pop(name) for name in names])


def put(**tensors: torch.Tensor) -> Damage:
    """Add tensors; two underscores stand for a dot."""
    return lambda folder: edit_weights(
        folder, lambda t: t.update({k.replace("__", "."): v for k, v in tensors.items()})
    )


def rename(new: Callable[[str], str]) -> Damage:
    """Give every tensor another name."""
    return lambda folder: edit_weights(
        folder, lambda t: t.update({new(name): t.pop(name) for name in list(t)})
    )


def config(**changes: Any) -> Damage:
    """Change config.json."""
    return lambda folder: edit_json(folder / "config.json", **changes)


def generation(**changes: Any) -> Damage:
    """Change generation_config.json."""
    return lambda folder: edit_json(folder / "generation_config.json", **changes)


def tokenizer_config(**changes: Any) -> Damage:
    """Change tokenizer_config.json."""
    return lambda folder: edit_json(folder / "tokenizer_config.json", **changes)


def write(name: str, content: str | bytes) -> Damage:
    """Write a file."""
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(data)


def remove(*names: str) -> Damage:
    """Delete files."""
    return lambda folder: [(folder / name).unlink() for name in names]


def both(*damages: Damage) -> Damage:
    """One after the other."""
    return lambda folder: [damage(folder) for damage in damages]
