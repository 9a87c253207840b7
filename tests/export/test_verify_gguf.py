"""Broken GGUF files are found by their header, in a second and without the library that wrote them."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from pronghorn.errors import SourceError, VerificationError
from pronghorn.export.run import export
from pronghorn.export.verify import verify
from pronghorn.export.verify_gguf import read_gguf
from tests import tiny

MODEL = "model-F16.gguf"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("made")
    base = tiny.write_base(home / "base")
    adapter = tiny.write_adapter(home / "adapter", base)
    export(base, home / "out", format="gguf-f16", verify=False)
    export(adapter, home / "lora", format="gguf-lora", verify=False)
    return {"base": base, "out": home / "out", "lora": home / "lora"}


def rewritten(source: Path, target: Path, edit: Callable[[dict[str, Any], dict[str, Any]], None]) -> Path:
    """The file again through the library's writer, with other settings or tensors."""
    read = GGUFReader(source)
    values = {name: one.contents() for name, one in read.fields.items() if not name.startswith("GGUF.")}
    tensors = {one.name: (np.array(one.data), one.tensor_type) for one in read.tensors}
    edit(values, tensors)
    writer = GGUFWriter(target, values.pop("general.architecture", "llama"))
    for name, value in values.items():
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_array(name, value)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_the_header_is_read_as_the_library_reads_it(made: dict[str, Path]) -> None:
    ours, theirs = read_gguf(made["out"] / MODEL), GGUFReader(made["out"] / MODEL)
    assert dict(ours.values) == {
        name: one.contents() for name, one in theirs.fields.items() if not name.startswith("GGUF.")
    }
    assert {name: (one.kind, one.shape, one.start) for name, one in ours.tensors.items()} == {
        one.name: (one.tensor_type.name, tuple(map(int, one.shape[::-1])), one.data_offset)
        for one in theirs.tensors
    }


def test_what_export_writes_is_kept(made: dict[str, Path]) -> None:
    for path in (made["out"], made["out"] / MODEL):
        report = verify(path, base=made["base"])
        assert report.passed
        assert (report.kind, len(report.rows)) == ("gguf", 7)
    lora = verify(made["lora"])
    assert lora.passed
    assert [row.name for row in lora.rows] == ["the file is whole", "A and B are complete"]


def tokens(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda values, tensors: (change(values), None)[1]


BROKEN: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], object], str]] = {
    "no end": (
        lambda v, t: v.pop("tokenizer.ggml.eos_token_id"), "nothing would end an answer"),
    "end beyond": (
        lambda v, t: v.update({"tokenizer.ggml.eos_token_id": 9999}), "eos is token 9999 of 512"),
    "end is text": (
        lambda v, t: v["tokenizer.ggml.token_type"].__setitem__(3, 1), "is marked as text"),
    "tokens short": (
        lambda v, t: v["tokenizer.ggml.tokens"].pop(), "511 tokens for 512 rows"),
    "twice": (
        lambda v, t: v["tokenizer.ggml.tokens"].__setitem__(9, "<s>"), "1 texts stand for two tokens"),
    "types short": (
        lambda v, t: v.update({"tokenizer.ggml.token_type": [1, 2]}), "2 token types for 512 tokens"),
    "no tokens": (
        lambda v, t: v.pop("tokenizer.ggml.tokens"), "there is no tokenizer.ggml.tokens"),
    "no merges": (
        lambda v, t: v.pop("tokenizer.ggml.merges"), "there are no merges"),
    "no pre": (
        lambda v, t: v.pop("tokenizer.ggml.pre"), "tokenizer.ggml.pre is missing"),
    "no scores": (
        lambda v, t: v.update({"tokenizer.ggml.model": "llama"}), "fewer scores than tokens"),
    "template": (
        lambda v, t: v.update({"tokenizer.chat_template": "{% if %}"}), "line 1"),
    "setting": (
        lambda v, t: v.pop("llama.attention.head_count"), "llama.attention.head_count is missing"),
    "architecture": (
        lambda v, t: v.update({"general.architecture": "other"}), "other.block_count is missing"),
    "tensor": (
        lambda v, t: t.pop("blk.1.ffn_up.weight"), "block 1 differs from block 0 in ffn_up.weight"),
    "block": (
        lambda v, t: [t.pop(name) for name in list(t) if name.startswith("blk.1.")], "block 1 differs"),
    "blocks": (
        lambda v, t: v.update({"llama.block_count": 1}), "numbered up to 1, block_count is 1"),
    "embedding": (
        lambda v, t: t.pop("token_embd.weight"), "token_embd.weight is missing"),
    "width": (
        lambda v, t: v.update({"llama.embedding_length": 32}), "embedding_length is 32"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named(made: dict[str, Path], name: str, tmp_path: Path) -> None:
    edit, said = BROKEN[name]
    path = rewritten(made["out"] / MODEL, tmp_path / "bad.gguf", lambda v, t: (edit(v, t), None)[1])
    report = verify(path)
    failure = report.first_failure
    assert failure is not None
    assert failure.ok is False
    assert said in " ".join(row.detail for row in report.rows if row.ok is False)
    with pytest.raises(VerificationError, match="breaks a promise"):
        report.raise_if_broken()


def test_another_base(made: dict[str, Path], tmp_path: Path) -> None:
    other = tiny.write_base(tmp_path / "other", hidden_size=128)
    failure = verify(made["out"], base=other).first_failure
    assert failure is not None
    assert "llama.embedding_length is 64, hidden_size of the base is 128" in failure.detail


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data[:-100], "truncated"),
        (lambda data: data + bytes(4096), "longer than its header says"),
        (lambda data: data[:200], "the header ends too early"),
        (lambda data: b"GGML" + data[4:], "is not a GGUF file"),
        (lambda data: data[:4] + struct.pack("<I", 9) + data[8:], "GGUF version 9"),
        (lambda data: data[:8] + struct.pack("<Q", 2**60) + data[16:], "claims 1152921504606846976 entries"),
        (lambda data: data[:24] + struct.pack("<Q", 2**62) + data[32:], "the header ends too early"),
        (lambda data: b"", "the header ends too early"),
    ],
)
def test_damaged_bytes(
    made: dict[str, Path], change: Callable[[bytes], bytes], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(change((made["out"] / MODEL).read_bytes()))
    report = verify(path)
    (row,) = [row for row in report.rows if row.ok is False]
    assert row.name == "the file is whole"
    assert said in row.detail


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda v, t: v.pop("adapter.lora.alpha"), "alpha is missing"),
        (lambda v, t: v.update({"adapter.type": "other"}), "adapter.type is not lora"),
        (lambda v, t: t.pop("blk.0.attn_q.weight.lora_b"), "blk.0.attn_q.weight has lora_a only"),
        (
            lambda v, t: t.update({"blk.0.attn_q.weight.lora_b": t["blk.0.attn_q.weight.lora_a"]}),
            "do not multiply",
        ),
    ],
)
def test_broken_adapters(
    made: dict[str, Path], edit: Callable[[dict[str, Any], dict[str, Any]], object], said: str, tmp_path: Path
) -> None:
    source = made["lora"] / "adapter.gguf"
    path = rewritten(source, tmp_path / "bad.gguf", lambda v, t: (edit(v, t), None)[1])
    failure = verify(path).first_failure
    assert failure is not None
    assert said in failure.detail


def test_several_files_are_told_apart(made: dict[str, Path], tmp_path: Path) -> None:
    shutil.copy(made["out"] / MODEL, tmp_path / "good.gguf")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    report = verify(tmp_path)
    assert [row.name for row in report.rows if not row.ok] == ["bad.gguf: the file is whole"]
    assert "good.gguf: the file is whole" in {row.name for row in report.rows}


def test_what_is_not_done_with_gguf_is_refused(made: dict[str, Path]) -> None:
    with pytest.raises(SourceError, match="are checked by their header, they are not loaded") as caught:
        verify(made["out"], deep=True)
    assert "--deep" in caught.value.fix
