from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

import pytest
import transformers

from tests.families.table import FAMILIES, MLP_OR_EXPERTS, Row, examine

# one of each make: biased, 1 + w and soft caps, fused, LayerNorm, ungated, sinks, latent, hybrid
QUICK = (
    "qwen2",
    "gemma2",
    "gemma3n_text",
    "phi3",
    "cohere2",
    "starcoder2",
    "gpt_oss",
    "mixtral",
    "deepseek_v3",
    "qwen3_next",
)
# what the whole list must reach, of the 61 families that transformers 5.23 builds
REACH = {("norm",): 55, ("attention",): 60, ("loss",): 61, MLP_OR_EXPERTS: 55}
DOCUMENT = Path(__file__).parents[2] / "docs" / "families.md"


@lru_cache
def row(family: str) -> Row:
    return examine(family)


@pytest.mark.parametrize(
    "family", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]
)
def test_every_part_is_replaced_or_left_with_a_reason(family: str) -> None:
    """The check of the whole model ran and passed; nothing is left in silence."""
    report = row(family).report
    if report is None:
        pytest.fail(row(family).problem)
    assert report.model_check.startswith("equal"), report.model_check
    assert all(len(part.reason) > 10 for part in report.parts)
    for kind in ("norm", "attention", "loss"):
        assert report.count(kind)[0], f"no {kind} found"
    assert report.count("mlp")[0] + report.count("experts")[0], "no MLP and no experts found"


@pytest.mark.parametrize("family", QUICK)
def test_the_documented_row_is_what_happens(family: str) -> None:
    text = DOCUMENT.read_text()
    if f"transformers {transformers.__version__}," not in text:
        pytest.skip(f"the table is of another transformers than {transformers.__version__}")
    assert str(row(family)) in text.splitlines()


def test_the_documented_sums_are_those_of_the_goal() -> None:
    text = DOCUMENT.read_text()
    for kinds, count in REACH.items():
        found = re.search(rf"^{' and '.join(kinds)}: .* in (\d+) of 61$", text, re.MULTILINE)
        assert found is not None and int(found[1]) >= count, kinds


@pytest.mark.slow
def test_reach() -> None:
    rows = [row(family) for family in FAMILIES]
    assert {
        kinds: sum(r.replaced(*kinds) for r in rows) >= count for kinds, count in REACH.items()
    } == dict.fromkeys(REACH, True)
