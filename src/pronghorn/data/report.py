"""What was read, left out, cut and trained: the account of a run's data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from pronghorn.data.rows import BadRow

SHOWN = 20  # rows named one by one; the rest is a count


@dataclass(frozen=True)
class DataReport:
    """The account of the rows of one run, training and evaluation together unless a name says otherwise.

    ``places`` name rows as ``file:number``; of each kind the first 20.
    """

    format: str
    sources: tuple[str, ...]
    rows_read: int
    train_rows: int
    eval_rows: int
    bad: int
    bad_rows: tuple[BadRow, ...]
    dropped: int
    dropped_places: tuple[str, ...]
    truncated: int
    truncated_places: tuple[str, ...]
    truncated_tokens: int
    rewritten: int
    max_length: int
    longest: int
    tokens: int
    trained_tokens: int
    data_hash: str
    template: str | None
    template_hash: str | None
    cached: bool = False

    @property
    def trained_share(self) -> float:
        """Trained tokens over all tokens."""
        return self.trained_tokens / self.tokens if self.tokens else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "trained_share": self.trained_share}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DataReport:
        """The report ``as_dict`` was made of."""
        known = {name: values[name] for name in cls.__dataclass_fields__}
        tuples = {name: tuple(value) for name, value in known.items() if isinstance(value, list)}
        return cls(**{**known, **tuples, "bad_rows": tuple(BadRow(**row) for row in known["bad_rows"])})

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(title="Data", title_justify="left", show_header=False)
        for name, value in self._lines():
            table.add_row(name, value)
        yield table

    def _lines(self) -> list[tuple[str, str]]:
        lines = [
            ("rows", f"{self.rows_read} read from {', '.join(self.sources)} ({self.format})"),
            ("used", f"{self.train_rows} to train, {self.eval_rows} to evaluate"),
            ("tokens", f"{self.tokens}, of which {self.trained_tokens} train ({self.trained_share:.1%})"),
            ("longest row", f"{self.longest} tokens (limit {self.max_length})"),
        ]
        if self.template:
            lines.append(("chat template", f"{self.template} ({(self.template_hash or '')[:12]})"))
        if self.bad:
            lines.append(("skipped as bad", f"{self.bad}: {'; '.join(map(str, self.bad_rows[:3]))} ..."))
        if self.truncated:
            places = _some(self.truncated_places, self.truncated)
            lines.append(
                ("cut to the limit", f"{self.truncated}, losing {self.truncated_tokens} tokens: {places}")
            )
        if self.dropped:
            places = _some(self.dropped_places, self.dropped)
            lines.append(("dropped, nothing left to train", f"{self.dropped}: {places}"))
        if self.rewritten:
            lines.append(
                ("rewritten by the template", f"{self.rewritten} rows, each trained on its last answer only")
            )
        return lines


def _some(places: tuple[str, ...], count: int) -> str:
    shown = ", ".join(places[:5])
    return shown if count <= 5 else f"{shown} and {count - 5} more"
