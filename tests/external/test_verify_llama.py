"""``verify --deep --llama-python``: llama.cpp agrees about a good folder, and is found out about another."""

from __future__ import annotations

from pathlib import Path

import pytest

from pronghorn.errors import VerificationError
from pronghorn.export import verify_llama
from pronghorn.export.verify import verify
from pronghorn.export.verify_engine import engine_promises
from pronghorn.export.verify_folder import Folder
from pronghorn.export.verify_llama import LLAMA, llama_promises
from tests.export.verdict_folders import CASES, write_folders
from tests.external import llama_engine

pytestmark = pytest.mark.external


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    names = {"good llama", "good gemma2", "good mixtral", "float32"}
    cases = [case for case in CASES if case.name in names]
    return write_folders(tmp_path_factory.mktemp("deep"), cases, train=True)


@pytest.mark.parametrize("name", ["good llama", "good gemma2", "float32"])
def test_llama_opens_a_good_folder(folders: dict[str, Path], name: str) -> None:
    report = verify(folders[name], deep=True, llama_python=llama_engine.require())
    assert report.passed, str(report)
    assert [row.name for row in report.rows][-4:] == [LLAMA.opens, LLAMA.logprobs, LLAMA.greedy, LLAMA.chat]


def test_llama_is_found_out_where_it_computes_something_else(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """Weights of 8 bit held against those they were rounded from."""
    other = tmp_path / "gguf"
    verify_llama.write_gguf(folders["float32"], other, "gguf-q8_0")
    rows = {
        row.name: row.ok
        for row in engine_promises(Folder(folders["float32"]), LLAMA, llama_engine.require(), other)
    }
    assert (rows[LLAMA.opens], rows[LLAMA.logprobs], rows[LLAMA.chat]) == (True, False, True)


def test_what_has_no_gguf_is_told_in_the_exporters_words(folders: dict[str, Path]) -> None:
    (row,) = llama_promises(folders["good mixtral"], llama_engine.require())
    assert (row.name, row.ok) == (LLAMA.opens, False)
    assert "GGUF of 'mixtral' is not proven here" in row.detail
    with pytest.raises(VerificationError, match=r"in llama.cpp: does not load: GGUF of 'mixtral'") as error:
        verify(folders["good mixtral"]).raise_unless_served("llama.cpp")
    assert "convert_hf_to_gguf.py" in error.value.fix
