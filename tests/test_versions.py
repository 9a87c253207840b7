"""The tested range is that of the pinned stacks, and a library outside of it is named."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from pronghorn.loading.load import load
from pronghorn.serving.doctor import Environment, examine
from pronghorn.versions import TESTED, numbers, satisfies, untested
from tests import tiny

ROOT = Path(__file__).parents[1]
STACKS = ("constraints-oldest.txt", "constraints-middle.txt", "constraints.txt")

# what torch's builds for CUDA require; with a pin of another version nothing can be installed beside them
TRITON = {"2.8.0": "3.4.0", "2.13.0": "3.7.1"}


def pinned(name: str) -> list[str]:
    """The versions of a library in the stacks, from the oldest to the newest."""
    text = [(ROOT / stack).read_text(encoding="utf-8") for stack in STACKS]
    found = [re.search(rf"^{name}==([^;\s]+)", one, re.MULTILINE) for one in text]
    return sorted((one[1] for one in found if one), key=numbers)


@pytest.mark.parametrize("name", TESTED)
def test_the_range_goes_from_the_oldest_stack_to_the_newest(name: str) -> None:
    versions = pinned(name)
    assert len(versions) == len(STACKS)
    assert all(satisfies(version, TESTED[name]) for version in versions)
    low, high = re.fullmatch(r">=([\d.]+),<([\d.]+)", TESTED[name]).groups()  # type: ignore[union-attr]
    assert numbers(versions[0])[: len(numbers(low))] == numbers(low)
    major, minor = numbers(versions[-1])[:2]
    assert numbers(high) == (major, minor + 1)


@pytest.mark.parametrize("stack", STACKS)
def test_triton_is_pinned_to_what_torch_requires_on_a_gpu(stack: str) -> None:
    pins = dict(re.findall(r"^(torch|triton)==([^;\s]+)", (ROOT / stack).read_text(), re.MULTILINE))
    assert pins.get("triton") in (None, TRITON[pins["torch"]])


def test_what_is_outside_is_named() -> None:
    assert untested({"torch": "2.13.0+cpu", "transformers": "4.56.2", "numpy": "9.0"}) == []
    found = untested({"torch": "2.7.1", "peft": "0.21.2", "trl": "2.0.0"})
    assert found == ["torch 2.7.1 (tested: >=2.8,<2.14)", "trl 2.0.0 (tested: >=0.23,<1.17)"]


def test_the_doctor_names_it_where_pronghorn_is_installed() -> None:
    versions = {"pronghorn": "0.1.0", "peft": "0.99.0", "compressed-tensors": "0.17"}
    (found,) = examine(Environment("3.11", versions))
    assert not found.bad and "pronghorn has not been tested with peft 0.99.0" in found.what
    del versions["pronghorn"]
    assert list(examine(Environment("3.11", versions))) == []


def test_this_stack_loads_without_a_warning(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="pronghorn has not been tested")
        load(base, say=None)


def test_loading_warns_once(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base")
    # metadata of another version, found before the real one
    (tmp_path / "first" / "peft-0.99.0.dist-info").mkdir(parents=True)
    metadata = "Metadata-Version: 2.1\nName: peft\nVersion: 0.99.0\n"
    (tmp_path / "first" / "peft-0.99.0.dist-info" / "METADATA").write_text(metadata)
    program = (
        f"import sys\nsys.path.insert(0, {str(tmp_path / 'first')!r})\n"
        "from pronghorn.loading.load import load\n"
        f"model, _ = load({str(base)!r}, say=None)\n"
        "from pronghorn.patching.accelerate import accelerate\naccelerate(model)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    said = "pronghorn has not been tested with peft 0.99.0 (tested: >=0.17.1,<0.22): install a version"
    assert done.stderr.count(said) == 1
    assert done.stderr.count("has not been tested") == 1
