"""The command line: one module per verb, and the one place where errors become a line and an exit code."""

from __future__ import annotations

import inspect as inspection
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Annotated

import typer

from .backends import backends
from .bench import bench
from .calibrate import calibrate
from .compare import compare
from .console import errors_console, quiet_libraries
from .failures import failure
from .generate import generate
from .inspect import inspect
from .optimize import optimize
from .passes import passes
from .recipes import recipes
from .refit import refit
from .streams import mend_streams, require_utf8_temporary_folder, results_apart, stopped_like_interrupted
from .verify import verify

USAGE = 2  # exit code of wrong use
DEBUG = "--debug"

VERBS = (optimize, calibrate, generate, bench, compare, refit, inspect, verify, passes, recipes, backends)

app = typer.Typer(name="stepfold", add_completion=False, rich_markup_mode="rich")


def _register(verb: Callable[..., None]) -> None:
    """Make a command of a function; the lines of its docstring that begin with `$` are its examples."""
    lines = inspection.cleandoc(verb.__doc__ or "").splitlines()
    examples = [line for line in lines if line.startswith("$ ")]
    text = "\n".join(line for line in lines if line not in examples).strip()
    app.command(help=text, epilog="\n\n".join(("Example:", *examples)))(verb)


for verb in VERBS:
    _register(verb)


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[
        bool, typer.Option(DEBUG, help="Show tracebacks and library messages. Works after a command too.")
    ] = False,
) -> None:
    """Compile a diffusion model together with the loop that calls it."""
    if version:
        from ..bundle.manifest import stepfold_version

        typer.echo(f"stepfold {stepfold_version()}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(USAGE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the words after `stepfold`; None takes those of this process.

    Returns:
        The exit code: 0 done, 1 the work failed, 2 wrong use, 3 a gate failed.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = words[: words.index("--")] if "--" in words else words
    debug = DEBUG in options
    mend_streams()
    with stopped_like_interrupted(), results_apart(), quiet_libraries(debug):
        try:
            require_utf8_temporary_folder()
            code = _run([word for word in options if word != DEBUG] + words[len(options) :])
            sys.stdout.flush()  # so that a closed pipe is noticed here
            return code
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 (the one place where every error ends)
            if debug:
                traceback.print_exc()
            if isinstance(error, BrokenPipeError):
                _discard_output()
            lines, code = failure(error)
            for line in lines:
                errors_console().print(line, markup=False, highlight=False, soft_wrap=True)
            return code


def _discard_output() -> None:
    """Send standard output nowhere: nobody reads it any more, and Python flushes it once more at its end."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(words: list[str]) -> int:
    """Run one command; the result of a command that ends early is the code it asked for."""
    command = typer.main.get_command(app)
    try:
        with command.make_context("stepfold", words) as context:
            command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    return 0


__all__ = ["app", "main"]
