"""The ``pronghorn`` command: one function per verb, and errors become messages and exit codes."""

from __future__ import annotations

import logging
import sys
from importlib import import_module
from typing import Annotated

import typer

from pronghorn import __version__
from pronghorn.errors import PronghornError

# Each verb is the function of that name in pronghorn.cli.<verb>; those files load nothing heavy at their top.
VERBS = ("train", "plan", "inspect", "export", "verify", "push", "chat", "compare", "serve", "doctor")

app = typer.Typer(
    name="pronghorn",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pronghorn {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop."),
    ] = False,
) -> None:
    """Fine-tune open language models with LoRA, and prove that what was trained is what is served."""


for _verb in VERBS:
    app.command(_verb)(getattr(import_module(f"pronghorn.cli.{_verb}"), _verb))


def main() -> None:
    """Run the command line. The one place where an error becomes a message on stderr and an exit code."""
    # PEFT imports bitsandbytes wherever it is installed, which then tells of an optional kernel it lacks
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        app()
    except PronghornError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        # a disk or a permission, which no room can mend; anything else keeps its traceback
        print(f"error: {error.strerror or error}: {error.filename or 'a file'}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
