"""``pronghorn plan``: memory, the longest sequence, disk and time of a run, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pronghorn.training.plan import Plan

DOES_NOT_FIT = 1


def plan(
    config: Annotated[Path, typer.Argument(metavar="RUN.YAML", help="The configuration of the run.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="E.g. training.batch_size=1.")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="Memory of the card: 24GB, 24GiB, or a name such as A100-80GB; else what is free."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a run will need; exit code 1 if it does not fit. Nothing is loaded but headers."""
    from pronghorn.training.config import load_config
    from pronghorn.training.plan import plan as make

    made = make(load_config(config, overrides or []), memory=memory)
    if as_json:
        typer.echo(made.as_json())
    else:
        _show(made)
    if not made.fits:
        raise typer.Exit(DOES_NOT_FIT)


def _show(made: Plan) -> None:
    from pronghorn.cli.tables import print_table

    card, shape = made.card, made.shape
    room = card.name if card.basis == "as given" else f"{card.name}, {_size(card.memory_bytes)} {card.basis}"
    kind = "bins" if shape.packed else "rows"
    columns = ("recompute", "saved", "step's peak", "in all", "fits", "longest " + kind[:-1])
    title = f"{made.model} on {room}: {shape.rows} {kind} of {shape.tokens} tokens"
    print_table(title, columns, _settings(made))
    print_table("this run", ("what", "value"), _facts(made))


def _settings(made: Plan) -> Iterator[tuple[object, ...]]:
    for one in made.settings:
        mark = " (this run)" if one.recompute == made.chosen.recompute else ""
        yield (
            f"{str(one.recompute).lower()}{mark}",
            _size(one.need.step.saved - one.need.on_host),
            _size(one.need.step.peak - one.need.on_host),
            _size(one.total_bytes),
            "yes" if one.fits else "NO",
            f"{one.longest:,}" if one.longest else "none",
        )


def _facts(made: Plan) -> Iterator[tuple[str, object]]:
    yield "fits", "yes" if made.fits else "NO"
    yield from (("would fit with", change) for change in made.changes)
    if made.recommended is not None:
        yield "recommended", f"training.recompute={str(made.recommended).lower()}"
    need, disk = made.chosen.need, made.disk
    yield "weights", _size(need.weights)
    yield "adapter / optimizer", f"{_size(need.adapters)} / {_size(need.optimizer)}"
    yield "disk for the run", f"{_size(disk.checkpoints + disk.adapter)} of {_size(disk.free)} free"
    yield "disk for a merged export", _size(disk.merged_export)
    if made.time is not None:
        whole = "" if made.time.all_seconds is None else f", {made.time.all_seconds:,.0f} s for all steps"
        yield "time", f"{made.time.step_seconds:.3g} s an optimizer step of full rows{whole}"
        yield "time is based on", made.time.basis
    else:
        yield "time", "not known: give the name of a card, or plan on the machine itself"
    yield "memory is based on", made.basis
    yield from (("note", note) for note in made.notes)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
