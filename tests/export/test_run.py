"""The promises around a merge: nothing half written or overwritten, the same bytes again, clear refusals."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pronghorn.errors import AdapterError, ExportError, NotSupportedError, VerificationError
from pronghorn.export import files, merged
from pronghorn.export.run import export
from tests import tiny


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("made")
    base = tiny.write_base(folder / "base")
    return base, tiny.write_adapter(folder / "adapter", base)


def digest(folder: Path) -> dict[str, str]:
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def test_merging_again_gives_the_same_bytes_and_needs_overwrite(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = made
    before = digest(base), digest(adapter)
    target = tmp_path / "merged"
    export(adapter, target, verify=False)
    first = digest(target)
    with pytest.raises(ExportError, match="exists and is not empty") as caught:
        export(adapter, target, verify=False)
    assert "--overwrite" in caught.value.fix
    assert digest(target) == first
    (target / "stale.safetensors").write_text("old")
    export(adapter, target, overwrite=True, verify=False)
    assert digest(target) == first
    export(adapter, tmp_path / "other", verify=False)
    assert digest(tmp_path / "other") == first
    assert (digest(base), digest(adapter)) == before
    assert {path.name for path in tmp_path.iterdir()} == {"merged", "other"}


def test_files_get_the_umask_s_modes(made: tuple[Path, Path], tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        export(made[1], tmp_path / "merged", verify=False)
    finally:
        os.umask(old)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "merged").iterdir()} == {0o644}


@pytest.mark.parametrize("overwrite", [False, True])
def test_base_and_adapter_are_never_the_target(
    made: tuple[Path, Path], tmp_path: Path, overwrite: bool
) -> None:
    base = Path(shutil.copytree(made[0], tmp_path / "models" / "base"))
    adapter = Path(shutil.copytree(made[1], tmp_path / "adapter"))
    (tmp_path / "link").symlink_to(base)
    cases = {base: "is the base", adapter: "is the adapter", tmp_path / "link": "is the base",
             base / "merged": "lies within the base", tmp_path / "models": "holds the base"}  # fmt: skip
    before = digest(tmp_path)
    for target, relation in cases.items():
        with pytest.raises(ExportError, match=relation):
            export(adapter, target, base=base, overwrite=overwrite, verify=False)
    assert digest(tmp_path) == before


@pytest.mark.parametrize(
    ("number", "said"), [(errno.ENOSPC, "became full"), (errno.EIO, "cannot be written")]
)
def test_a_disk_that_fails_late_leaves_nothing(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, said: str
) -> None:
    real, calls = merged.write_all, []

    def failing(*arguments: Any) -> int:
        calls.append(1)
        if len(calls) > 10:
            raise OSError(number, os.strerror(number))
        return real(*arguments)

    target = tmp_path / "merged"
    monkeypatch.setattr(merged, "write_all", failing)
    with pytest.raises(ExportError, match=said):
        export(made[1], target, verify=False)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(merged, "write_all", real)
    export(made[1], target, verify=False)
    before, calls[:] = digest(target), []
    monkeypatch.setattr(merged, "write_all", failing)
    with pytest.raises(ExportError, match=said):
        export(made[1], target, overwrite=True, verify=False)
    assert digest(target) == before and list(tmp_path.iterdir()) == [target]


def test_space_is_checked_before_anything_is_written(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage._replace(free=10**5))
    with pytest.raises(ExportError, match=r"needs 16\.\d MiB, but its disk has 0\.1 MiB free"):
        export(made[1], tmp_path / "not" / "yet" / "there", verify=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_where_one_may_not_write(made: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(ExportError, match="cannot be written: Permission denied"):
        export(made[1], tmp_path / "locked" / "merged", verify=False)


def test_a_file_in_the_way_of_the_target(made: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ExportError, match=r"cannot be written: (File exists|Not a directory)"):
        export(made[1], tmp_path / "file" / "merged", verify=False)


def test_formats_are_checked_first() -> None:
    with pytest.raises(NotSupportedError, match="'16bit' is not known") as caught:
        export("nowhere", "nowhere", format="16bit")
    assert (
        caught.value.fix
        == "choose one of merged_16bit, merged_4bit, merged_4bit_forced, w4a16, w8a8, fp8, nvfp4, adapter, "
        "lora, gguf-f16, gguf-bf16, gguf-q8_0, gguf-q4_k_m, gguf-lora"
    )


def test_adapters_of_any_name(made: tuple[Path, Path], tmp_path: Path) -> None:
    base = made[0]
    tiny.write_adapter(tmp_path / "a", base, adapter_name="poet", seed=1)
    export(tmp_path / "a", tmp_path / "poet", verify=False)
    tiny.write_adapter(tmp_path / "a", base, adapter_name="clerk", seed=2)
    with pytest.raises(AdapterError, match="holds 2 adapters: clerk, poet"):
        export(tmp_path / "a", tmp_path / "both", verify=False)
    export(tmp_path / "a", tmp_path / "clerk", adapter_name="clerk", verify=False)
    export(tmp_path / "a", tmp_path / "poet2", adapter_name="poet", verify=False)
    assert digest(tmp_path / "poet") == digest(tmp_path / "poet2") != digest(tmp_path / "clerk")
    with pytest.raises(AdapterError, match="is a whole model, not an adapter"):
        export(base, tmp_path / "x", verify=False)


def test_a_wrong_base_is_named(made: tuple[Path, Path], tmp_path: Path) -> None:
    from pronghorn.weights.folder import fingerprint, open_weights

    base, adapter = made[0], Path(shutil.copytree(made[1], tmp_path / "adapter"))
    record = {"format": 1, "base_name": "tiny-llama", "base_path": str(base)}
    record["base_fingerprint"] = fingerprint(open_weights(base))
    (adapter / "pronghorn.json").write_text(json.dumps(record))
    other = tiny.write_base(tmp_path / "other", seed=5)
    with pytest.raises(AdapterError, match=r"other is not the base the adapter .* was trained on"):
        export(adapter, tmp_path / "merged", base=other, verify=False)
    assert export(adapter, tmp_path / "merged", verify=False).base == base


def test_progress_counts_every_byte(made: tuple[Path, Path], tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    export(
        made[1], tmp_path / "merged", verify=False, progress=lambda done, total: seen.append((done, total))
    )
    size = sum(len(path.read_bytes()) for path in (tmp_path / "merged").glob("*.safetensors"))
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert {total for _, total in seen} == {size} and seen[-1] == (size, size)


def test_the_lora_format_is_the_adapter_and_a_tokenizer(made: tuple[Path, Path], tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, adapter = made
    report = export(adapter, tmp_path / "lora", format="lora")
    assert report.verified and report.changed_share is None
    assert (tmp_path / "lora" / "adapter_model.safetensors").read_bytes() == (
        adapter / "adapter_model.safetensors"
    ).read_bytes()
    assert report.changes == ("tokenizer: the base's, the adapter has none",)
    assert AutoTokenizer.from_pretrained(tmp_path / "lora").chat_template == tiny.CHATML
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora")


def test_a_verified_export_lists_its_checks(made: tuple[Path, Path], tmp_path: Path) -> None:
    report = export(made[1], tmp_path / "merged")
    assert report.verified is True and len(report.checks) > 10
    assert not any(".staging-" in row.detail for row in report.checks)


def test_an_export_that_breaks_a_promise_does_not_appear(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The merge is made wrong on purpose; the check in its own process has to find it."""
    from pronghorn.adapters.merge import Update

    right = Update.delta
    monkeypatch.setattr(Update, "delta", lambda *arguments: right(*arguments) * 0.5)
    with pytest.raises(
        VerificationError, match=f"{tmp_path / 'merged'} was not written, it would break a promise"
    ):
        export(made[1], tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_deleting_one_tensor_of_a_pair_stops_the_export(made: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(made[1], tmp_path / "adapter"))
    tensors = load_file(adapter / "adapter_model.safetensors")
    for key in list(tensors)[:4]:
        save_file(
            {name: one for name, one in tensors.items() if name != key}, adapter / "adapter_model.safetensors"
        )
        with pytest.raises(AdapterError, match="lacks lora_"):
            export(adapter, tmp_path / "merged", verify=False)
    extra = {"base_model.model.model.layers.9.mlp.up_proj.weight": torch.ones(96, 64)}
    save_file({**tensors, **extra}, adapter / "adapter_model.safetensors")
    with pytest.raises(ExportError, match=r"layers\.9\.mlp\.up_proj\.weight, which the base .* lacks"):
        export(adapter, tmp_path / "merged", verify=False)
