"""Headers, folders and reads of safetensors files, and the ways in which they can be broken."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pronghorn.errors import SourceError
from pronghorn.weights.folder import INDEX_NAME, fingerprint, open_weights
from pronghorn.weights.reader import read_rows, read_tensor
from pronghorn.weights.shards import read_shard
from tests import tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_base(tmp_path_factory.mktemp("base") / "llama")


def copy(base: Path, to: Path) -> Path:
    return Path(shutil.copytree(base, to))


def write_raw(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def test_every_tensor_reads_as_the_library_reads_it(base: Path) -> None:
    weights = open_weights(base)
    assert len(weights.shards) > 1 and weights.index == base / INDEX_NAME
    assert weights.nbytes == sum(path.stat().st_size for path in base.glob("*.safetensors"))
    for shard in weights.shards:
        expected = load_file(shard.path)
        assert set(expected) == set(shard.tensors)
        for name, entry in shard.tensors.items():
            assert torch.equal(read_tensor(shard, entry), expected[name])
            assert torch.equal(read_rows(shard, entry, 3, 17), expected[name][3:17])


def test_all_common_dtypes_read(tmp_path: Path) -> None:
    dtypes = [
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int8,
        torch.bool,
    ]
    stored = {str(dtype): (torch.arange(12).reshape(3, 4) % 2).to(dtype) for dtype in dtypes}
    stored["scalar"] = torch.tensor(3.5)
    stored["empty"] = torch.empty(0, 4)
    save_file(stored, tmp_path / "x.safetensors")
    shard = read_shard(tmp_path / "x.safetensors")
    for name, expected in stored.items():
        assert torch.equal(read_tensor(shard, shard.tensors[name]), expected)


def test_prefix_and_tensors_make_up_the_file(base: Path) -> None:
    shard = open_weights(base).shards[0]
    content = shard.path.read_bytes()
    assert content.startswith(shard.prefix)
    assert (
        sum(entry.nbytes for entry in shard.tensors.values()) + len(shard.prefix)
        == len(content)
        == shard.size
    )


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BROKEN: dict[str, tuple[Any, bytes, int | None, str]] = {
    "not json": (b"{nope", b"", None, "not JSON"),
    "not utf-8": (b"\xff\xfe", b"", None, "not JSON"),
    "a list": ([1], b"", None, "not a JSON object"),
    "a name twice": (b'{"a": 1, "a": 2}', b"", None, "twice"),
    "too deep": (b"[" * 100_000, b"", None, "not JSON"),
    "header beyond the file": ({}, b"", 1000, "the file ends after"),
    "huge header": ({}, b"", 2**60, "more than the cap"),
    "data missing": ({"a": ENTRY}, b"1234", None, "describes"),
    "data left over": ({"a": ENTRY}, b"123456789", None, "describes"),
    "hole": ({"a": {**ENTRY, "data_offsets": [4, 12]}}, b"1" * 12, None, "leaves a hole"),
    "overlap": ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [4, 12]}}, b"1" * 12, None, "overlaps"),
    "unknown dtype": ({"a": {**ENTRY, "dtype": "F99"}}, b"1" * 8, None, "unknown dtype 'F99'"),
    "negative shape": ({"a": {**ENTRY, "shape": [-2]}}, b"1" * 8, None, "the shape"),
    "boolean shape": ({"a": {**ENTRY, "shape": [True, 2]}}, b"1" * 8, None, "the shape"),
    "wrong size": ({"a": {**ENTRY, "shape": [3]}}, b"1" * 8, None, "but takes 8 bytes"),
    "one offset": ({"a": {**ENTRY, "data_offsets": [0]}}, b"1" * 8, None, "the offsets"),
    "extra key": ({"a": {**ENTRY, "more": 1}}, b"1" * 8, None, "exactly dtype"),
    "metadata no map": ({"__metadata__": {"a": 1}}, b"", None, "__metadata__"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_headers_are_refused_by_file_name(case: str, tmp_path: Path) -> None:
    header, data, length, reason = BROKEN[case]
    path = write_raw(tmp_path / "broken.safetensors", header, data, length)
    with pytest.raises(SourceError, match=r"broken\.safetensors") as caught:
        read_shard(path)
    assert reason in str(caught.value)


def test_the_valid_twin_of_the_broken_headers_is_accepted(tmp_path: Path) -> None:
    shard = read_shard(
        write_raw(tmp_path / "a.safetensors", {"a": ENTRY, "__metadata__": {"k": "v"}}, b"1" * 8)
    )
    assert shard.metadata == {"k": "v"} and shard.tensors["a"].shape == (2,)


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, -1])
def test_truncated_shard(base: Path, tmp_path: Path, keep: float) -> None:
    folder = copy(base, tmp_path / "m")
    shard = sorted(folder.glob("model-*"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[: int(len(content) * keep) if keep == 0.5 else int(keep)])
    with pytest.raises(SourceError, match=shard.name):
        open_weights(folder)


def edit_index(folder: Path, change: Any) -> None:
    index = folder / INDEX_NAME
    parsed = json.loads(index.read_text())
    change(parsed)
    index.write_text(json.dumps(parsed))


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..\\x.safetensors", "..", "", "model.bin",
     ".hidden.safetensors", "x\0.safetensors", "./model.safetensors"],
)  # fmt: skip
def test_index_that_points_elsewhere(base: Path, tmp_path: Path, name: str) -> None:
    folder = copy(base, tmp_path / "m")
    edit_index(folder, lambda parsed: parsed["weight_map"].update({"model.norm.weight": name}))
    with pytest.raises(SourceError, match=r"plain \.safetensors file name"):
        open_weights(folder)


def test_link_out_of_the_folder_is_refused_but_the_hub_cache_is_not(base: Path, tmp_path: Path) -> None:
    folder = copy(base, tmp_path / "m")
    shard = sorted(folder.glob("model-*.safetensors"))[0]
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SourceError, match="outside the folder"):
        open_weights(folder)
    (tmp_path / "hub" / "blobs").mkdir(parents=True)
    (tmp_path / "hub" / "snapshots").mkdir()
    snapshot = folder.rename(tmp_path / "hub" / "snapshots" / "abc")
    (tmp_path / "elsewhere").rename(tmp_path / "hub" / "blobs" / "123")
    (snapshot / shard.name).unlink()
    (snapshot / shard.name).symlink_to("../../blobs/123")
    assert fingerprint(open_weights(snapshot)) == fingerprint(open_weights(base))


def test_missing_shard_is_named(base: Path, tmp_path: Path) -> None:
    folder = copy(base, tmp_path / "m")
    gone = sorted(folder.glob("model-*.safetensors"))[-1]
    gone.unlink()
    with pytest.raises(SourceError, match=f"lacks the weight file {gone.name}"):
        open_weights(folder)


def test_index_that_forgets_or_invents_a_tensor(base: Path, tmp_path: Path) -> None:
    folder = copy(base, tmp_path / "m")
    edit_index(folder, lambda parsed: parsed["weight_map"].pop("model.norm.weight"))
    with pytest.raises(SourceError, match=r"disagree on 1 tensors.*model\.norm\.weight"):
        open_weights(folder)
    shard = sorted(folder.glob("model-*.safetensors"))[0].name
    edit_index(
        folder, lambda parsed: parsed["weight_map"].update({"model.norm.weight": shard, "ghost": shard})
    )
    with pytest.raises(SourceError, match=r"disagree on .* ghost"):
        open_weights(folder)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}']
)
def test_broken_index(base: Path, tmp_path: Path, text: str) -> None:
    folder = copy(base, tmp_path / "m")
    (folder / INDEX_NAME).write_text(text)
    with pytest.raises(SourceError, match="not a weight index"):
        open_weights(folder)


def test_stale_files_beside_the_weights(base: Path, tmp_path: Path) -> None:
    folder = copy(base, tmp_path / "m")
    (folder / "model-00009-of-00009.safetensors").write_bytes(b"x")
    with pytest.raises(SourceError, match="belong to no index: model-00009"):
        open_weights(folder)
    (folder / "model-00009-of-00009.safetensors").rename(folder / "model.safetensors")
    with pytest.raises(SourceError, match="holds both"):
        open_weights(folder)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    for number in (1, 2):
        save_file({"a": torch.ones(2)}, tmp_path / f"model-0000{number}-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": names}))
    with pytest.raises(SourceError, match="the tensor a is in both"):
        open_weights(tmp_path)


def test_folders_without_usable_weights(base: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="has no weights"):
        open_weights(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(SourceError, match="only pickled weights"):
        open_weights(tmp_path)
    folder = copy(base, tmp_path / "m")
    (folder / INDEX_NAME).unlink()
    with pytest.raises(SourceError, match=f"no {INDEX_NAME}"):
        open_weights(folder)


def test_fingerprint_follows_content_and_not_place(base: Path, tmp_path: Path) -> None:
    first = fingerprint(open_weights(base))
    assert first.startswith("ph1:") and len(first) == 4 + 64
    assert fingerprint(open_weights(copy(base, tmp_path / "same"))) == first
    assert fingerprint(open_weights(tiny.write_base(tmp_path / "other", seed=1))) != first
    changed = open_weights(copy(base, tmp_path / "changed"))
    shard, entry = changed.tensors["model.layers.1.mlp.down_proj.weight"]
    with shard.path.open("r+b") as file:
        file.seek((entry.start + entry.end) // 2)
        file.write(b"\0\0\0\0")
    assert fingerprint(open_weights(changed.path)) != first
