"""``verify --deep --vllm-python``: vLLM agrees about a good folder, and is found out about a broken one."""

from __future__ import annotations

from pathlib import Path

import pytest

from pronghorn.export.verify import verify
from pronghorn.export.verify_engine import VLLM, vllm_promises
from tests.export.verdict_folders import CASES, write_folders
from tests.external.vllm_engine import PYTHON

pytestmark = pytest.mark.external


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    names = {"good llama", "architecture of another family", "names of a wrapper"}
    cases = [case for case in CASES if case.name in names]
    return write_folders(tmp_path_factory.mktemp("deep"), cases, train=True)


def test_vllm_opens_a_good_folder(folders: dict[str, Path]) -> None:
    report = verify(folders["good llama"], deep=True, vllm_python=PYTHON)
    assert report.passed, str(report)
    assert [row.name for row in report.rows][-4:] == [VLLM.opens, VLLM.logprobs, VLLM.greedy, VLLM.chat]


def test_vllm_is_found_out_where_it_computes_something_else(folders: dict[str, Path]) -> None:
    """It builds the class that architectures names; transformers builds the model type."""
    rows = {row.name: row for row in vllm_promises(folders["architecture of another family"], PYTHON)}
    assert rows[VLLM.opens].ok is True
    assert rows[VLLM.logprobs].ok is False


def test_what_cannot_be_opened_is_told_in_vllms_words(folders: dict[str, Path]) -> None:
    (row,) = vllm_promises(folders["names of a wrapper"], PYTHON)
    assert (row.name, row.ok) == (VLLM.opens, False)
    assert "no module or parameter named 'module'" in row.detail
