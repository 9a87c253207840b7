"""``pronghorn inspect``: what would be trained, seen before a step is run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def inspect(
    data: Annotated[
        str, typer.Argument(metavar="RUN.YAML|DATA", help="A run.yaml; or a file, folder or hub id of rows.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="E.g. data.loss_on=all, data.template=chatml."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="With DATA: the model whose tokenizer and template are used.")
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens kept of each row.", min=2)] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option("--allow", help="A failed check that shall not stop a run (data.allow)."),
    ] = None,
    examples: Annotated[int, typer.Option(help="Rows shown token by token.", min=0)] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    html: Annotated[Path | None, typer.Option(help="Also write a page to this file.")] = None,
) -> None:
    """Show rows, lengths, checks and examples; exit non-zero if training on them would be refused."""
    import json

    from pronghorn.data.inspect import inspect_data
    from pronghorn.data.prepare import refuse

    allowed = [f"data.allow=[{','.join(allow)}]"] if allow else []
    config = _config(data, [*(overrides or []), *allowed], model)
    tokenizer, limit = _tokenizer(config)
    shown = inspect_data(config.data, tokenizer, max_length=max_length or limit, examples=examples)
    if html is not None:
        html.write_text(shown.html(), encoding="utf-8")
    if as_json:
        typer.echo(json.dumps(shown.as_dict(), ensure_ascii=False, indent=1))
    else:
        shown.show()
    refuse(shown.report, config.data)


def _config(data: str, overrides: list[str], model: str | None) -> Any:
    from pronghorn.errors import ConfigError
    from pronghorn.training.config import apply_override, load_config, parse_config

    if Path(data).suffix in (".yaml", ".yml"):
        extra = [f"model.name={model}"] if model else []
        return load_config(data, [*extra, *overrides])
    if model is None:
        raise ConfigError(f"which model shall read {data}?", fix=f"pronghorn inspect {data} --model MODEL")
    values: Any = {"model": {"name": model}, "data": {"train": data}, "output": {"folder": "unused"}}
    for each in overrides:
        values = apply_override(values, each)
    return parse_config(values, origin="command line")


def _tokenizer(config: Any) -> tuple[Any, int]:
    """The tokenizer of the model, and the length its run would have."""
    from pronghorn.adapters.record import read_record
    from pronghorn.loading.options import DEFAULT_MAX_SEQ_LENGTH
    from pronghorn.loading.tokenizer import has_tokenizer, load_tokenizer
    from pronghorn.sources.resolve import resolve, resolve_base
    from pronghorn.sources.source import SourceKind

    wanted = config.model
    source = resolve(wanted.name, revision=wanted.revision, trust_remote_code=wanted.trust_remote_code)
    base, recorded = source, None
    if source.kind is SourceKind.ADAPTER:
        base = resolve_base(source, base=wanted.base, trust_remote_code=wanted.trust_remote_code)
        record = read_record(source.path)
        recorded = record.max_seq_length if record else None
    folder = source.path if has_tokenizer(source.path) else base.path
    tokenizer = load_tokenizer(folder, trust_remote_code=wanted.trust_remote_code)
    tokenizer.add_tokens(list(wanted.new_tokens or ()))
    text_config = base.config.get("text_config", base.config)
    limit = text_config.get("max_position_embeddings", DEFAULT_MAX_SEQ_LENGTH)
    return tokenizer, wanted.max_seq_length or recorded or min(DEFAULT_MAX_SEQ_LENGTH, limit)
