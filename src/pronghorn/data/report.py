"""What was read, left out, cut and trained: the account of a run's data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from pronghorn.data.packing import Packing
from pronghorn.data.rows import BadRow

SHOWN = 20  # rows named one by one; the rest is a count


@dataclass(frozen=True)
class Places:
    """How many rows, and the first 20 of them as ``file:number``."""

    count: int
    first: tuple[str, ...]

    def __str__(self) -> str:
        more = self.count - min(5, len(self.first))
        shown = ", ".join(self.first[:5])
        return f"{self.count} ({shown}{f' and {more} more' if more else ''})" if shown else str(self.count)


@dataclass(frozen=True)
class Check:
    """One check: ``meaning`` says what it is about when it fails, ``stops`` whether it then stops a run."""

    name: str
    passed: bool
    stops: bool
    meaning: str
    rows: Places

    def __str__(self) -> str:
        return f"{self.name}: {self.meaning}{f': {self.rows}' if self.rows.count else ''}"


@dataclass(frozen=True)
class Answers:
    """Preference rows: mean tokens of the answers, and the share of rows that choose the longer one."""

    chosen: float
    rejected: float
    longer: float

    def __str__(self) -> str:
        return (
            f"chosen have {self.chosen:.0f} tokens on average, rejected {self.rejected:.0f}; "
            f"the longer one is chosen in {self.longer:.0%} of rows"
        )


@dataclass(frozen=True)
class DataReport:
    """The account of the rows of one run, training and evaluation together unless a name says otherwise."""

    format: str
    sources: tuple[str, ...]
    rows_read: int
    train_rows: int
    eval_rows: int
    bad: int
    bad_rows: tuple[BadRow, ...]
    dropped: Places
    truncated: Places
    truncated_tokens: int
    rewritten: Places
    max_length: int
    longest: int
    histogram: tuple[tuple[int, int], ...]
    tokens: int
    trained_tokens: int
    checks: tuple[Check, ...]
    data_hash: str
    template: str | None
    template_hash: str | None
    packing: Packing | None = None
    answers: Answers | None = None
    cached: bool = False

    @property
    def trained_share(self) -> float:
        """Trained tokens over all tokens."""
        return self.trained_tokens / self.tokens if self.tokens else 0.0

    def failed(self, *, stops: bool) -> tuple[Check, ...]:
        """Failed checks that stop a run, or those that only warn."""
        return tuple(check for check in self.checks if not check.passed and check.stops == stops)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "trained_share": self.trained_share}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DataReport:
        """The report ``as_dict`` was made of."""
        known = {name: values[name] for name in cls.__dataclass_fields__}
        for name in ("dropped", "truncated", "rewritten"):
            known[name] = _places(known[name])
        known["packing"] = Packing(**known["packing"]) if known["packing"] else None
        known["answers"] = Answers(**known["answers"]) if known["answers"] else None
        known["sources"] = tuple(known["sources"])
        known["histogram"] = tuple((low, count) for low, count in known["histogram"])
        known["bad_rows"] = tuple(BadRow(**row) for row in known["bad_rows"])
        known["checks"] = tuple(
            Check(**{**check, "rows": _places(check["rows"])}) for check in known["checks"]
        )
        return cls(**known)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(title="Data", title_justify="left", show_header=False)
        for name, value in self._lines():
            table.add_row(name, Text(value))
        yield table
        for check in self.failed(stops=True):
            yield Text(f"✗ {check}", style="bold red")
        for check in self.failed(stops=False):
            yield Text(f"! {check}", style="yellow")

    def _trained(self) -> str:
        if self.format == "prompt_only":
            return "all of prompts: what trains is written during the training"
        return f"of which {self.trained_tokens} train ({self.trained_share:.1%})"

    def _lines(self) -> list[tuple[str, str]]:
        cached = ", tokenised before" if self.cached else ""
        lines = [
            ("rows", f"{self.rows_read} read from {', '.join(self.sources)} ({self.format}{cached})"),
            ("used", f"{self.train_rows} to train, {self.eval_rows} to evaluate"),
            ("tokens", f"{self.tokens}, {self._trained()}"),
            ("longest row", f"{self.longest} tokens (limit {self.max_length})"),
        ]
        if self.answers:
            lines.append(("answers", str(self.answers)))
        if self.packing:
            lines.append(("packed", str(self.packing)))
        if self.template:
            lines.append(("chat template", f"{self.template} ({(self.template_hash or '')[:12]})"))
        if self.bad:
            lines.append(("bad", f"{self.bad}: {'; '.join(map(str, self.bad_rows[:3]))}"))
        if self.truncated.count:
            lines.append(("cut to the limit", f"{self.truncated}, losing {self.truncated_tokens} tokens"))
        if self.dropped.count:
            lines.append(("dropped as too long", str(self.dropped)))
        if self.rewritten.count:
            lines.append(("template rewrites", f"{self.rewritten}, each trained on its last answer only"))
        passed = sum(check.passed for check in self.checks)
        lines.append(("checks", f"{passed} of {len(self.checks)} passed"))
        return lines


def _places(values: dict[str, Any]) -> Places:
    return Places(values["count"], tuple(values["first"]))
