"""What a name or path turned out to be: local files at a fixed revision, described by their own config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any


class SourceKind(str, Enum):
    """The kinds of folder that can be loaded."""

    BASE = "base"
    ADAPTER = "adapter"


@dataclass(frozen=True)
class Source:
    """Local files of a model or an adapter.

    ``name`` is what the user typed, ``path`` the folder that holds the files, ``revision`` the commit of a
    hub snapshot (None for a local folder), ``config`` the parsed config.json or adapter_config.json.
    """

    kind: SourceKind
    path: Path
    name: str
    revision: str | None
    config: Mapping[str, Any]
