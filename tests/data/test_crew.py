"""Rows tokenised by no, one or two processes; runs that are killed, disturbed or told apart."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pronghorn.data import chunks as chunking
from pronghorn.data import crew
from pronghorn.data.options import DataOptions
from pronghorn.data.prepare import Prepared, examine, prepare
from pronghorn.data.progress import Progress
from pronghorn.data.rows import Line, Source
from pronghorn.data.work import Work
from pronghorn.errors import DataError
from tests.data.conftest import Writer
from tests.data.families import family_tokenizer
from tests.data.test_prepare import ask

CHILD = """
import sys, time
import datasets
from pronghorn.data import chunks
from pronghorn.data.options import DataOptions
from pronghorn.data.prepare import prepare
from pronghorn.data.work import Work
from tests.data.families import family_tokenizer
datasets.config.HF_DATASETS_CACHE = sys.argv[2]
chunks.ROWS = 7
do = Work.do
def slow(work, chunk):
    if chunk.number == 3:
        time.sleep(600)
    do(work, chunk)
Work.do = slow
prepare(DataOptions(train=sys.argv[1], isolate=False, skip_bad=9, workers=0), family_tokenizer("chatml"), 60)
"""


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunking, "ROWS", 7)


def mixture(rows: Writer, name: str = "rows.jsonl") -> Path:
    """50 rows: plain, repeated, cut, dropped, spelling special tokens, and two that cannot be used."""
    odd = [ask(1), ask(1, "<|im_end|>"), ask(2, "y" * 80), "{", ask(3, ""), ask(4, " x"), ask(5, "100 % é")]
    return rows(*odd, *[ask(number) for number in range(43)], name=name)


def run(path: Path, **options: Any) -> Prepared:
    chosen = {"isolate": False, "skip_bad": 9, "workers": 0, **options}
    return prepare(DataOptions(train=str(path), **chosen), family_tokenizer("chatml"), 60)


def kept(root: Path) -> dict[str, bytes]:
    (folder,) = (root / "pronghorn").iterdir()
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".tally"}


def test_workers_change_nothing(rows: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    path, held = mixture(rows), rows(ask(7), ask(99), name="held.jsonl")
    files = []
    for workers in (0, 1, 2):
        root = tmp_path / f"cache{workers}"
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", root)
        prepared = run(path, workers=workers, eval=str(held), packing=True)
        assert not prepared.report.cached and prepared.report.bad == 2
        assert [len(prepared.train), len(prepared.eval)] == [48, 2]
        files.append(kept(root))
    assert files[0] == files[1] == files[2]
    assert len(files[0]) == 8 + 1 + 3  # shards of both parts; held_out, bins and report


def test_a_killed_run_goes_on_where_it_was(
    rows: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, root = mixture(rows), tmp_path / "cache"
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path), str(root)], cwd=Path(__file__).parents[2]
    )
    while child.poll() is None and len(list((root / "pronghorn").glob(".part-*/[!.]*.tally"))) < 3:
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    done = worked_on(monkeypatch)
    prepared = run(path)
    assert done == [3, 4, 5, 6, 7] and not prepared.report.cached
    whole = run(path, cache=False)
    assert prepared.train["labels"][:] == whole.train["labels"][:]
    assert prepared.report == whole.report
    assert done[5:] == list(range(8))
    assert run(path).report.cached


def worked_on(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    done: list[int] = []
    do = Work.do
    monkeypatch.setattr(Work, "do", lambda work, chunk: (done.append(chunk.number), do(work, chunk)))
    return done


def test_interrupting_keeps_what_is_done_an_error_does_not(
    rows: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, root = mixture(rows), tmp_path / "cache" / "pronghorn"
    do = Work.do

    def stop(work: Work, chunk: Any, error: type[BaseException]) -> None:
        if chunk.number == 2:
            raise error
        do(work, chunk)

    for error, left in ((KeyboardInterrupt, 2), (RuntimeError, 0)):
        with monkeypatch.context() as patch:
            patch.setattr(Work, "do", lambda work, chunk, error=error: stop(work, chunk, error))
            with pytest.raises(error):
                run(path)
        assert len(list(root.glob(".part-*/*.tally"))) == left


def test_a_json_list_is_read_like_its_lines(rows: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows with the same numbers, cut into the same chunks: an interrupted run goes on."""
    lines = [
        line.replace("{", '{"messages": }') if line == "{" else line
        for line in mixture(rows).read_text().splitlines()
    ]
    by_line, listed = (
        rows(*lines, name="plain.jsonl"),
        rows("[" + " ,\n\n".join(lines) + "]", name="rows.json"),
    )
    do = Work.do

    def stop(work: Work, chunk: Any) -> None:
        if chunk.number == 5:
            raise KeyboardInterrupt
        do(work, chunk)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Work, "do", stop)
        run(listed)
    done = worked_on(monkeypatch)
    resumed, whole = run(listed), run(by_line)
    assert done == [5, 6, 7, *range(8)]
    assert resumed.train["labels"][:] == whole.train["labels"][:]
    one, other = ([(row.number, row.reason) for row in each.report.bad_rows] for each in (resumed, whole))
    assert one == other and len(one) == 2


def test_two_runs_at_once_do_not_share_a_folder(
    rows: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, root = mixture(rows), tmp_path / "cache" / "pronghorn"
    first = run(path)
    (target,) = root.iterdir()
    part = root / f".part-{target.name}"
    target.rename(part)
    done = worked_on(monkeypatch)
    descriptor = os.open(part, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert run(path).report == first.report and len(done) == 8
    os.close(descriptor)
    assert part.is_dir()


def test_the_first_error_in_the_order_of_rows(rows: Writer) -> None:
    """Whoever is faster: the reader's own error lies behind that of a worker."""
    lines = "question,answer\n" + "a,b\n" * 40 + "\xff"
    path = rows(
        *[ask(number) for number in range(10)], {"text": "other"}, *[ask(number) for number in range(30)]
    )
    (path.parent / "late.csv").write_bytes(b"q,q\n" + lines.encode("latin-1"))
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"rows\.jsonl:11 is text"):
            examine(
                DataOptions(train=(str(path), str(path.parent / "late.csv")), isolate=False, workers=workers),
                family_tokenizer("chatml"),
                60,
            )


def test_a_worker_that_ends(rows: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew.pickle, "dumps", lambda *args: b"no pickle")
    with pytest.raises(DataError, match=r"ended \(exit code 1\) in chunk 0, rows of .*rows.jsonl") as caught:
        run(mixture(rows), workers=1)
    assert "data.workers=0" in caught.value.fix


def test_rows_are_read_a_chunk_at_a_time() -> None:
    taken = 0

    def lines() -> Iterator[Line]:
        nonlocal taken
        for number in range(1, 10**9):
            taken += 1
            yield Line(number, json.dumps(ask(number)).encode())

    pieces = chunking.chunks([Source("endless", (), lines)], [])
    assert [len(next(pieces).items) for _ in range(3)] == [7, 7, 7] and taken == 21


def test_a_chunk_has_a_size_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunking, "BYTES", 100)
    source = Source("long", (), lambda: iter([Line(number, b"x" * 60) for number in range(5)]))
    assert [(each.number, len(each.items), each.size) for each in chunking.chunks([source], [source])] == [
        (0, 2, 122),
        (1, 2, 122),
        (2, 1, 61),
        (3, 2, 122),
        (4, 2, 122),
        (5, 1, 61),
    ]


def test_how_many_workers() -> None:
    assert crew.workers_for(3, 1) == 3 and crew.workers_for(0, 1 << 40) == 0
    assert crew.workers_for(None, crew.WORTH - 1) == 0
    assert crew.workers_for(None, crew.WORTH) in (0, *range(2, crew.MOST + 1))


def test_progress_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 6.0, 7.0, 20.0, 0.0])
    monkeypatch.setattr("pronghorn.data.progress.time.monotonic", lambda: next(clock))
    said: list[str] = []
    progress = Progress(4000, 2, said.append)
    for _ in range(4):
        progress.add(3000, 1000)
    assert said == [
        "tokenised 6,000 rows (50%), 1,000 a second, 2 workers",
        "tokenised 12,000 rows (100%), 600 a second, 2 workers",
    ]
    assert Progress(None, 0, None).line(1.0) == "tokenised 0 rows, 0 a second"
