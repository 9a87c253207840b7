"""``import pronghorn``: what it offers, what it costs, and that it is silent."""

from __future__ import annotations

import os
import subprocess
import sys
from statistics import median

import pytest

import pronghorn

PUBLIC_NAMES = [
    "FastLanguageModel",
    "LoadOptions",
    "LoraOptions",
    "PronghornError",
    "RunConfig",
    "accelerate",
    "add_new_tokens",
    "attach_lora",
    "export",
    "get_chat_template",
    "inspect_data",
    "load",
    "plan",
    "rows_for_trl",
    "standardize_data_formats",
    "standardize_sharegpt",
    "to_sharegpt",
    "train",
    "train_on_responses_only",
    "verify",
]
HEAVY = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "typer", "pydantic", "rich")


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)


def cpu_seconds(program: str) -> float:
    """User and system time of a fresh interpreter that runs ``program``."""
    before = os.times()
    run(program)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def test_public_names_are_exactly_these() -> None:
    assert pronghorn.__all__ == PUBLIC_NAMES
    assert dir(pronghorn) == sorted([*PUBLIC_NAMES, "__version__"])


@pytest.mark.parametrize("name", PUBLIC_NAMES)
def test_public_names_resolve_and_are_documented(name: str) -> None:
    found = getattr(pronghorn, name)
    assert callable(found)
    assert found.__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = pronghorn.lode


def test_the_import_prints_nothing_and_loads_no_library() -> None:
    finished = run(
        f"import sys, pronghorn; loaded = [n for n in {HEAVY} if n in sys.modules]; assert not loaded, loaded"
    )
    assert finished.stdout == ""
    assert finished.stderr == ""


def test_the_import_costs_at_most_a_fifth_more_than_torch_and_transformers() -> None:
    libraries = "import torch, transformers"
    pairs = [(cpu_seconds(libraries), cpu_seconds(f"import pronghorn; {libraries}")) for _ in range(3)]
    without, with_pronghorn = map(median, zip(*pairs, strict=True))
    assert with_pronghorn <= 1.2 * without


def test_the_import_alone_takes_milliseconds() -> None:
    program = "import time; t = time.process_time(); import pronghorn; print(time.process_time() - t)"
    assert min(float(run(program).stdout) for _ in range(3)) < 0.1
