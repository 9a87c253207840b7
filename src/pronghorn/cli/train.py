"""``pronghorn train``: fine-tune as run.yaml says; the same command resumes an unfinished run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def train(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="RUN.YAML", help="The configuration; run.yaml of a run folder resumes it."),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="E.g. training.learning_rate=1e-4.")
    ] = None,
    skip_bad: Annotated[
        int | None, typer.Option("--skip-bad", help="Leave out up to N unusable rows (data.skip_bad).")
    ] = None,
    allow: Annotated[
        list[str] | None, typer.Option("--allow", help="A failed check that shall not stop it (data.allow).")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved configuration and stop.")
    ] = False,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of run.yaml and stop.")
    ] = False,
) -> None:
    """Fine-tune with LoRA into a run folder. Exit code 75: stopped and sealed, run it again to go on."""
    import json

    from pronghorn.errors import ConfigError
    from pronghorn.training.config import RunConfig, load_config, with_lora_defaults

    if schema:
        typer.echo(json.dumps(RunConfig.model_json_schema(), indent=2))
        return
    if config is None:
        raise ConfigError(
            "no run.yaml was given", fix="pronghorn train run.yaml; --schema prints what it may say"
        )
    changes = [*(overrides or []), *([] if skip_bad is None else [f"data.skip_bad={skip_bad}"])]
    changes += [f"data.allow=[{','.join(allow)}]"] if allow else []
    resolved = load_config(config, changes)
    if dry_run:
        typer.echo(with_lora_defaults(resolved).to_yaml(), nl=False)
        return
    from pronghorn.training.ranks import leave
    from pronghorn.training.run import train as run

    run(resolved)
    leave()
