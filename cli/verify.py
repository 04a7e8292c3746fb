"""`stepfold verify`: whether a bundle is whole and works here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from .console import console, print_json, working
from .options import Json


def verify(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder that `stepfold optimize` wrote.")],
    as_json: Json = False,
) -> None:
    """Check the hashes and versions of a bundle, load every stage that can run here, and replay its recorded probe.

    Ends with exit code 1 when something is wrong.

    $ stepfold verify out/mnist
    """
    from ..bundle.verify import verify as check
    from ..runtime.engine import open_stage

    with working() as progress:
        progress("verifying", 0, 1)
        problems, not_checked = check(bundle, open_stage)
    if as_json:
        print_json({"ok": not problems, "problems": problems, "not_checked_here": not_checked})
    else:
        screen = console()
        for line in problems:
            screen.print(f"[red]problem:[/] {escape(line)}", soft_wrap=True)
        for line in not_checked:
            screen.print(f"not checked here: {escape(line)}", soft_wrap=True)
        screen.print(f"{bundle}: {'not usable' if problems else 'ok'}", markup=False, soft_wrap=True)
    if problems:
        raise typer.Exit(1)
