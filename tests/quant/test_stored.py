"""Folders in 4-bit, read from their files: what they say, and everything that can be wrong with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pronghorn.errors import NotSupportedError, SourceError
from pronghorn.ops.packed import Packed, Scales, decode
from pronghorn.quant import nf4
from pronghorn.quant.stored import EncodedNF4, stored_4bit
from pronghorn.sources.bounds import quantization_of
from pronghorn.sources.resolve import resolve
from pronghorn.weights.folder import open_weights
from tests import four_bit, tiny

NAME = "model.layers.0.mlp.up_proj.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return four_bit.write_base(tmp_path_factory.mktemp("stored") / "base")


def copy(folder: Path, target: Path, change: Callable[[Tensors], object] | None = None) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    if change is not None:
        tensors = load_file(target / "model.safetensors")
        change(tensors)
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def read(folder: Path) -> object:
    config = json.loads((folder / "config.json").read_text())
    return stored_4bit(config, open_weights(folder))


def test_rows_are_those_of_the_whole(folder: Path) -> None:
    found = stored_4bit(resolve(folder).config, open_weights(folder))
    assert len(found) == 14
    one = found[NAME]
    assert (one.shape, one.dtype, one.block) == ((128, 64), "BF16", 64)
    tensors = load_file(folder / "model.safetensors")
    state = nf4.parse_state(tensors[NAME + nf4.STATE].numpy().tobytes())
    scales = Scales(
        tensors[NAME + nf4.ABSMAX], tensors[NAME + nf4.NESTED_ABSMAX], float(str(state["nested_offset"]))
    )
    whole = decode(Packed(tensors[NAME], scales, (128, 64), torch.bfloat16))
    assert torch.equal(torch.cat([one.rows(0, 3), one.rows(3, 100), one.rows(100, 128)]), whole)


def test_a_16_bit_weight_as_it_would_be_trained(tmp_path: Path) -> None:
    weights = open_weights(tiny.write_base(tmp_path / "base", dtype=torch.bfloat16))
    shard, entry = weights.tensors[NAME]
    values = load_file(shard.path)[NAME]
    found = EncodedNF4(shard, entry, torch.bfloat16)
    whole = decode(nf4.encode(values))
    assert torch.equal(torch.cat([found.rows(0, 5), found.rows(5, 96)]), whole)
    in_float32 = EncodedNF4(shard, entry, torch.float32)
    assert torch.equal(in_float32.rows(2, 9), decode(nf4.encode(values.float()))[2:9])


def test_a_16_bit_weight_as_it_would_be_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = open_weights(tiny.write_base(tmp_path / "base", dtype=torch.bfloat16))
    shard, entry = weights.tensors[NAME]
    whole = nf4.stored_tensors(nf4.encode(load_file(shard.path)[NAME]), NAME)
    blank = nf4.blank_tensors(NAME, entry.shape)
    monkeypatch.setattr(nf4, "TILE_ELEMENTS", 512)
    *codes, absmax, code, nested, nested_code, state = EncodedNF4(shard, entry, torch.bfloat16).pieces()
    assert {one.numel() for one in codes[:-1]} == {256}
    pieces = (torch.cat(codes).view(-1, 1), absmax, code, nested, nested_code, state)
    for name, piece in zip(blank, pieces, strict=True):
        assert torch.equal(piece, whole[name])


def test_recognised_by_content_and_nested(folder: Path, tmp_path: Path) -> None:
    assert quantization_of({"text_config": {"quantization_config": {"a": 1}}}) == {"a": 1}
    assert quantization_of({"quantization_config": None, "text_config": {}}) is None
    nested = copy(folder, tmp_path / "plain-name")
    config = json.loads((nested / "config.json").read_text())
    config["text_config"] = {"quantization_config": config.pop("quantization_config")}
    (nested / "config.json").write_text(json.dumps(config))
    assert len(read(nested)) == 14  # type: ignore[arg-type]


@pytest.mark.parametrize("part", [nf4.ABSMAX, nf4.CODE, nf4.STATE, nf4.NESTED_ABSMAX, nf4.NESTED_CODE, ""])
def test_a_missing_part_is_named(folder: Path, tmp_path: Path, part: str) -> None:
    broken = copy(folder, tmp_path / "broken", lambda tensors: tensors.pop(NAME + part))
    with pytest.raises(SourceError, match=r"missing") as caught:
        read(broken)
    assert NAME + part in str(caught.value)


def state_with(**changes: object) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        state = {**nf4.parse_state(tensors[NAME + nf4.STATE].numpy().tobytes()), **changes}
        tensors[NAME + nf4.STATE] = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)

    return change


def put(part: str, tensor: torch.Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__setitem__(NAME + part, tensor)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (state_with(blocksize=128), "blocks of 128 needs 64: its block size or shape is another one"),
        (state_with(blocksize=48), "does not describe an NF4 weight"),
        (state_with(nested_blocksize=128), "does not describe an NF4 weight"),
        (state_with(shape=[128, 128]), "its block size or shape is another one"),
        (state_with(shape="x"), "does not describe an NF4 weight"),
        (state_with(quant_type="fp4"), "does not describe an NF4 weight"),
        (state_with(dtype="int3"), "does not describe an NF4 weight"),
        (put(nf4.STATE, torch.zeros(3, dtype=torch.uint8)), "does not describe an NF4 weight"),
        (put(nf4.ABSMAX, torch.zeros(128, dtype=torch.int32)), "is I32, not U8 or F32"),
        (put(nf4.NESTED_ABSMAX, torch.zeros(2)), "holds 2 values"),
    ],
)
def test_parts_that_do_not_fit(
    folder: Path, tmp_path: Path, change: Callable[[Tensors], None], said: str
) -> None:
    broken = copy(folder, tmp_path / "broken", change)
    with pytest.raises(SourceError, match=NAME) as caught:
        read(broken)
    assert said in str(caught.value)


def test_config_and_files_contradict_each_other(folder: Path, tmp_path: Path) -> None:
    silent = copy(folder, tmp_path / "silent")
    config = json.loads((silent / "config.json").read_text())
    claimed = config.pop("quantization_config")
    (silent / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=r"stored in 4-bit, but config.json has no quantization_config"):
        read(silent)
    full = tiny.write_base(tmp_path / "full")
    config = json.loads((full / "config.json").read_text())
    (full / "config.json").write_text(json.dumps({**config, "quantization_config": claimed}))
    with pytest.raises(SourceError, match="says the weights are quantised, but no tensor"):
        read(full)


@pytest.mark.parametrize(
    ("claimed", "named"),
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes, 8-bit"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes, fp4"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
    ],
)
def test_other_formats_are_refused_by_name(folder: Path, tmp_path: Path, claimed: object, named: str) -> None:
    other = copy(folder, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "quantization_config": claimed}))
    with pytest.raises(NotSupportedError, match="NF4 and 16-bit weights can") as caught:
        resolve(other)
    assert f"({named})" in str(caught.value)
