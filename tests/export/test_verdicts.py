"""The shallow verdict is what the real engines did; ``make verdicts`` proves their part again."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from pronghorn.export.gguf_check import refusals
from pronghorn.export.verify import check_files
from pronghorn.export.verify_engines import (
    CONSEQUENCES,
    ENGINES,
    LLAMA,
    MEANING,
    Refusal,
    engines_named,
    judge_llama,
)
from pronghorn.export.verify_folder import Folder
from tests.export.verdict_folders import CASES, Case, write_folders

STORED = json.loads(Path(__file__).with_name("verdicts.json").read_text())
# what only the base can tell
UNCLEAR = {
    "rope settings lost, nothing to compare with",
    "stray head although tied, nothing to compare with",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_folders(tmp_path_factory.mktemp("verdicts"), CASES, train=False)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_verdict_is_what_the_engines_did(folders: dict[str, Path], case: Case) -> None:
    folder = folders[case.name]
    base = folder.parent / "good" / case.family if case.base else None
    report = check_files(folder, base)
    view = Folder(folder, base=Folder(base) if base else None)
    # what ``report.asking`` has from a process of its own
    refused = [Refusal(error.message, error.fix) for error in refusals(folder, base)]
    verdicts = (*report.engines, judge_llama(view, report.rows, refused))
    told = {verdict.engine: verdict.outcome for verdict in verdicts}
    if case.name in UNCLEAR:
        assert {told[engine] for engine in ENGINES if engine != LLAMA} == {"unclear"}
        assert told[LLAMA] in ("unclear", STORED[LLAMA]["outcomes"][case.name])
        return
    assert told == {engine: STORED[engine]["outcomes"][case.name] for engine in ENGINES}, str(report)
    for verdict in verdicts:
        assert verdict.outcome == "right" or (verdict.reasons and verdict.fixes)


def test_the_table_is_wide_enough() -> None:
    """At least 40 folders, at least 15 of which each engine opens without an error and computes wrongly."""
    assert len(CASES) >= 40
    for engine in ENGINES:
        counted = Counter(STORED[engine]["outcomes"].values())
        assert counted["right"] >= 10, engine
        wrong = sum(number for word, number in counted.items() if word.startswith("wrong"))
        # the GGUF formats refuse what transformers and vLLM load and get wrong
        assert wrong >= 15 if engine != LLAMA else wrong + counted["refused"] >= 40, engine


def test_the_table_knows_the_words_and_the_engines() -> None:
    assert {engine: STORED[engine]["version"] for engine in ENGINES} == dict(ENGINES)
    assert {word for one in CONSEQUENCES.values() for word in one.outcomes} <= set(MEANING)
    assert engines_named("llama.cpp") == (LLAMA,)
    assert engines_named("vllm, transformers") == ("vllm", "transformers 5", "transformers 4")
    with pytest.raises(ValueError, match=r"tgi is no engine; known are transformers"):
        engines_named("vllm,tgi")
