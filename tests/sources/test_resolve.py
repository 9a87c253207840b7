"""Bad folders of every kind are refused in well under a second, by name, before anything is built from
them."""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pronghorn.errors import AdapterError, NotSupportedError, SourceError
from pronghorn.sources.resolve import resolve, resolve_base
from pronghorn.sources.source import SourceKind
from tests import tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_base(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_adapter(tmp_path_factory.mktemp("adapter") / "lora", base)


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "copy"))


@pytest.fixture
def adapter_copy(adapter: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapter, tmp_path / "adapter"))


def edit(path: Path, **changes: object) -> None:
    parsed = json.loads(path.read_text())
    for key, value in changes.items():
        parsed[key] = value
    path.write_text(json.dumps(parsed))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def remap(folder: Path, to: str) -> None:
    index = folder / "model.safetensors.index.json"
    parsed = json.loads(index.read_text())
    parsed["weight_map"][next(iter(parsed["weight_map"]))] = to
    index.write_text(json.dumps(parsed))


def only_pickles(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def link_outside(folder: Path) -> None:
    first = shards(folder)[0]
    moved = folder.parent / "elsewhere.safetensors"
    first.rename(moved)
    first.symlink_to(moved)


def huge_header(folder: Path) -> None:
    shards(folder)[0].write_bytes(struct.pack("<Q", 10**9) + b" " * 64)


def config(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "config.json", **changes)


BROKEN_BASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "neither config.json nor adapter_config.json"),
    "config is not JSON": (lambda f: (f / "config.json").write_text("{,}"), "config.json is not valid JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[1]"), "not a JSON object"),
    "config is binary": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "not valid JSON"),
    "config nests deeply": (lambda f: (f / "config.json").write_text("[" * 10**6), "not valid JSON"),
    "config is huge": (lambda f: (f / "config.json").write_text(" " * 9 * 2**20), "more than"),
    "no model_type": (config(model_type=None), "names no model_type"),
    "missing shard": (lambda f: shards(f)[1].unlink(), "model-00002-of-00003.safetensors"),
    "truncated shard": (lambda f: os.truncate(shards(f)[0], shards(f)[0].stat().st_size - 5), "model-00001"),
    "empty shard": (lambda f: os.truncate(shards(f)[0], 0), "model-00001"),
    "huge header": (huge_header, "model-00001"),
    "index climbs out": (
        lambda f: remap(f, "../model-00001-of-00003.safetensors"),
        "not a plain .safetensors",
    ),
    "index is absolute": (lambda f: remap(f, "/etc/passwd.safetensors"), "not a plain .safetensors"),
    "shard links outside": (link_outside, "outside the folder"),
    "pickles only": (only_pickles, "pickled weights"),
    "10^9 layers": (config(num_hidden_layers=10**9), "the weight files hold 2 layers"),
    "negative layers": (config(num_hidden_layers=-1), "num_hidden_layers = -1"),
    "layers as text": (config(num_hidden_layers="2"), "num_hidden_layers = '2'"),
    "layers as truth": (config(num_hidden_layers=True), "num_hidden_layers = True"),
    "absurd vocabulary": (config(vocab_size=10**12), "vocab_size = 1000000000000"),
    "absurd width": (config(hidden_size=10**9), "hidden_size = 1000000000"),
    "absurd heads": (config(num_attention_heads=10**9), "num_attention_heads"),
    "absurd experts": (config(num_local_experts=10**9), "num_local_experts"),
    "absurd positions": (config(max_position_embeddings=10**12), "max_position_embeddings"),
    "absurd inside": (config(text_config={"num_hidden_layers": 10**9}), "the weight files hold 2 layers"),
    "kernel from a repository": (config(_attn_implementation="org/kernel"), "a kernel to be fetched"),
    "kernel inside": (config(text_config={"attn_implementation": "org/kernel"}), "a kernel to be fetched"),
    "own code": (config(auto_map={"AutoModelForCausalLM": "m.M"}), "trust_remote_code=True"),
    "both kinds": (lambda f: (f / "adapter_config.json").write_text("{}"), "holds a model and an adapter"),
}


@pytest.mark.parametrize("name", BROKEN_BASES)
def test_broken_base_is_refused_quickly(name: str, copy: Path) -> None:
    spoil, said = BROKEN_BASES[name]
    assert resolve(copy).kind is SourceKind.BASE
    spoil(copy)
    start = time.perf_counter()
    with pytest.raises(SourceError) as caught:
        resolve(copy)
    assert time.perf_counter() - start < 1
    assert said in str(caught.value)
    assert caught.value.fix


def test_quantised_base_is_not_supported(copy: Path) -> None:
    edit(copy / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(NotSupportedError, match="bitsandbytes"):
        resolve(copy)


BROKEN_ADAPTERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "lacks adapter_model.safetensors"),
    "truncated": (lambda f: os.truncate(f / "adapter_model.safetensors", 3000), "adapter_model.safetensors"),
    "not JSON": (lambda f: (f / "adapter_config.json").write_text("x"), "not valid JSON"),
    "absurd rank": (lambda f: edit(f / "adapter_config.json", r=10**9), "the rank is 1000000000"),
    "absurd pattern": (lambda f: edit(f / "adapter_config.json", rank_pattern={"q": 10**9}), "1000000000"),
    "other method": (lambda f: edit(f / "adapter_config.json", peft_type="IA3"), "'IA3'"),
}


@pytest.mark.parametrize("name", BROKEN_ADAPTERS)
def test_broken_adapter_is_refused(name: str, adapter_copy: Path) -> None:
    spoil, said = BROKEN_ADAPTERS[name]
    assert resolve(adapter_copy).kind is SourceKind.ADAPTER
    spoil(adapter_copy)
    with pytest.raises((SourceError, NotSupportedError)) as caught:
        resolve(adapter_copy)
    assert said in str(caught.value)


def test_pickled_adapter_is_refused(adapter_copy: Path) -> None:
    (adapter_copy / "adapter_model.safetensors").rename(adapter_copy / "adapter_model.bin")
    with pytest.raises(SourceError, match="pickled"):
        resolve(adapter_copy)


def test_adapter_weights_outside_the_folder_are_refused(adapter_copy: Path, tmp_path: Path) -> None:
    weights = adapter_copy / "adapter_model.safetensors"
    weights.rename(tmp_path / "away.safetensors")
    weights.symlink_to(tmp_path / "away.safetensors")
    with pytest.raises(SourceError, match="outside the folder"):
        resolve(adapter_copy)


def test_an_unfinished_run_names_its_checkpoint(adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "run/checkpoints/step-100")
    with pytest.raises(SourceError, match=r"no adapter yet\n.*run/checkpoints/step-100"):
        resolve(tmp_path / "run")


def test_several_adapters_need_a_choice(adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "many" / "first")
    with pytest.raises(SourceError, match="there is an adapter in it"):
        resolve(tmp_path / "many")
    shutil.copytree(adapter, tmp_path / "many" / "second")
    with pytest.raises(SourceError, match="several adapters: first, second"):
        resolve(tmp_path / "many")
    assert resolve(tmp_path / "many" / "second").kind is SourceKind.ADAPTER


@pytest.mark.parametrize("missing", ["./nothing", "/no/such/place", "a/b/c", "~/no-such-folder-here", ""])
def test_a_path_is_never_looked_up_on_the_hub(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pronghorn.sources.hub.download", _unreachable)
    with pytest.raises(SourceError, match="there is no folder"):
        resolve(missing)
    with pytest.raises(SourceError, match="there is no folder"):
        resolve(Path(missing or "gone"))


def _unreachable(*_: object, **__: object) -> None:
    raise AssertionError("the hub was asked")


def test_local_folder_named_like_a_hub_id_is_used(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pronghorn.sources.hub.download", _unreachable)
    shutil.copytree(base, tmp_path / "owner" / "model")
    monkeypatch.chdir(tmp_path)
    found = resolve("owner/model")
    assert (found.path, found.name, found.revision) == (tmp_path / "owner" / "model", "owner/model", None)
    with pytest.raises(SourceError, match="local folder, which has no revision 'main'"):
        resolve("owner/model", revision="main")


def test_a_file_is_no_model(base: Path) -> None:
    with pytest.raises(SourceError, match="is a file"):
        resolve(base / "config.json")


def test_nonsense_names_are_no_hub_ids() -> None:
    with pytest.raises(SourceError, match="neither a local folder nor a hub id"):
        resolve("no spaces/allowed here")


def test_base_from_adapter_config(base: Path, adapter: Path) -> None:
    assert resolve_base(resolve(adapter)).path == base


@pytest.mark.parametrize(
    ("named", "said"),
    [
        (None, "names no base"),
        ("", "names no base"),
        ("../../secret", "climbs out"),
        ("/no/such", "there is no folder"),
    ],
)
def test_base_that_cannot_be_found(named: str | None, said: str, adapter_copy: Path, base: Path) -> None:
    edit(adapter_copy / "adapter_config.json", base_model_name_or_path=named)
    with pytest.raises((AdapterError, SourceError), match=said) as caught:
        resolve_base(resolve(adapter_copy))
    assert "base=" in caught.value.fix
    assert resolve_base(resolve(adapter_copy), base=base).path == base


def test_an_adapter_is_no_base(adapter: Path) -> None:
    with pytest.raises(AdapterError, match="is itself an adapter"):
        resolve_base(resolve(adapter), base=adapter)
