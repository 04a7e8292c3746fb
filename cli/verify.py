"""`stepfold verify`: whether a bundle is whole and works here."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from .console import console, print_json, working
from .options import AllowNative, Json


def verify(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder that `stepfold optimize` wrote.")],
    reduce: Annotated[
        bool, typer.Option("--reduce", help="Write the smallest failing part of a stage that fails to this folder.")
    ] = False,
    allow_native: AllowNative = False,
    as_json: Json = False,
) -> None:
    """Check the hashes and versions of a bundle, load every stage that can run here, and replay its recorded probe.

    Ends with exit code 1 when something is wrong.

    $ stepfold verify out/mnist
    """
    from ..bundle.verify import verify as check
    from ..runtime.differences import differences
    from ..runtime.engine import open_stage
    from ..runtime.reduction import reduce_bundle

    with working() as progress:
        progress("verifying", 0, 1)
        problems, not_checked = check(bundle, partial(open_stage, allow_native=allow_native), differences)
        progress("reducing", 0, 1)
        parts = reduce_bundle(bundle, Path.cwd()) if reduce and problems else []
    if as_json:
        document: dict[str, Any] = {"ok": not problems, "problems": problems, "not_checked_here": not_checked}
        listed = [{"stage": p.stage, "file": str(p.file), "nodes": p.nodes, "of": p.of} for p in parts]
        print_json(document | ({"reduced": listed} if reduce else {}))
    else:
        screen = console()
        for line in problems:
            screen.print(f"[red]problem:[/] {escape(line)}", soft_wrap=True)
        for line in not_checked:
            screen.print(f"not checked here: {escape(line)}", soft_wrap=True)
        for part in parts:
            text = f"stage {part.stage}: {part.nodes} of its {part.of} nodes fail alone: {part.file}"
            screen.print(text, markup=False, soft_wrap=True)
        if reduce and problems and not parts:
            screen.print("no part fails alone: every stage computes here what its graph says", soft_wrap=True)
        screen.print(f"{bundle}: {'not usable' if problems else 'ok'}", markup=False, soft_wrap=True)
    if problems:
        raise typer.Exit(1)
