"""`stepfold backends`: which engines can be used here, and how to get the others."""

from __future__ import annotations

from dataclasses import asdict

from .console import console, print_json, table
from .options import Json


def backends(as_json: Json = False) -> None:
    """List the engines: what can build and run here, how to install what is missing, and their options.

    $ stepfold backends
    """
    from ..backends.registry import all_backends
    from ..backends.registry import backends as capabilities
    from .passes import describe_options

    options = {backend.name: describe_options(type(backend.options)) for backend in all_backends()}
    found = capabilities()
    if as_json:
        print_json({"backends": [{**asdict(capability), "options": options[capability.name]} for capability in found]})
        return
    rows = [
        (c.name, c.version or "-", "yes" if c.can_build else "no", "yes" if c.can_run else "no", c.reason, c.install)
        for c in found
    ]
    screen = console()
    screen.print(table("Backends", ("backend", "version", "builds", "runs", "why not", "install"), rows))
    listed = [
        (f"{name}.{option}", entry["type"], repr(entry["default"]), entry["description"])
        for name, entries in options.items()
        for option, entry in entries.items()
    ]
    if listed:
        screen.print(table("Options", ("option", "type", "default", "meaning"), listed))
