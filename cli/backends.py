"""`stepfold backends`: which engines can be used here, and how to get the others."""

from __future__ import annotations

from dataclasses import asdict

from .console import console, print_json, table
from .options import Json


def backends(as_json: Json = False) -> None:
    """List the engines: what can build and run here, and how to install what is missing.

    $ stepfold backends
    """
    from ..backends.registry import backends as capabilities

    found = capabilities()
    if as_json:
        print_json({"backends": [asdict(capability) for capability in found]})
        return
    rows = [
        (c.name, c.version or "-", "yes" if c.can_build else "no", "yes" if c.can_run else "no", c.reason, c.install)
        for c in found
    ]
    console().print(table("Backends", ("backend", "version", "builds", "runs", "why not", "install"), rows))
