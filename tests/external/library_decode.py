"""Run where compressed-tensors is installed: the weights of quantised folders as that library decodes them.

``python library_decode.py OUT FOLDER...`` writes ``OUT/NAME.safetensors`` for each folder called NAME. It
reads config.json and the tensors, and takes the format's own compressor of the library. Shares no code with
what it checks.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file

PARTS = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_global_scale")


def decode(folder: Path) -> dict[str, torch.Tensor]:
    """Every quantised weight by its name, in the dtype that the library decodes it to."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(config).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(config["format"])
    modules: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for file in folder.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            module, _, part = name.rpartition(".")
            if part in PARTS:
                modules[module][part] = tensor
    return {
        f"{module}.weight": compressor.decompress(parts, scheme)["weight"].contiguous()
        for module, parts in modules.items()
        if "weight_scale" in parts
    }


if __name__ == "__main__":
    out, *folders = map(Path, sys.argv[1:])
    for folder in folders:
        save_file(decode(folder), out / f"{folder.name}.safetensors")
