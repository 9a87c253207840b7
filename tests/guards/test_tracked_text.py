"""Nothing in the repository depends on, or tells about, the machine it was written on."""

from __future__ import annotations

import re
from pathlib import Path

from tests.guards.source import ROOT, tracked_files

PATTERNS = (
    re.compile(r"(?<![\w.])/(?:work|root|home|Users|opt/pypi|opt/wheels)/"),
    re.compile(r"pypi\.org|pythonhosted\.org|download\.pytorch|artifactory"),
    re.compile(r"\b(?:10|192\.168|172\.1[6-9])\.\d+\.\d+\.\d+\b"),
)
LARGEST_BYTES = 10_000_000


def test_no_machine_path_or_registry_host_in_any_file() -> None:
    others = [path for path in tracked_files() if path != Path(__file__).resolve()]
    assert [broken for path in others for broken in places(path)] == []


def test_no_large_file() -> None:
    assert [path for path in tracked_files() if path.stat().st_size > LARGEST_BYTES] == []


def test_the_check_finds_what_it_looks_for() -> None:
    for text in ("see /work/main", "'/root/x'", "https://pypi.org/simple", "host 10.1.2.3"):
        assert matches(text), text
    for text in ("a/work/b", "torch==2.13.0", "https://www.apache.org/licenses/"):
        assert not matches(text), text


def matches(line: str) -> bool:
    """Whether a line names a machine path or a registry host."""
    return any(pattern.search(line) for pattern in PATTERNS)


def places(path: Path) -> list[str]:
    """The lines of a text file that ``matches``."""
    data = path.read_bytes()
    if b"\0" in data[:4096]:
        return []
    lines = data.decode("utf-8", errors="replace").splitlines()
    name = path.relative_to(ROOT)
    return [f"{name}:{number}: {line.strip()}" for number, line in enumerate(lines, start=1) if matches(line)]
