"""`stepfold passes`: what a recipe can name, with every option."""

from __future__ import annotations

import inspect
import re
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import typer
from rich.markup import escape

from ..loop.errors import UsageError, nearest
from ..loop.options import Options
from .console import console, print_json, table
from .options import Json

if TYPE_CHECKING:
    from pydantic import BaseModel

    from ..passes.base import Pass

ATTRIBUTE = re.compile(r"^    (\w+): (.*)$")


def passes(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Show one pass with its options.")] = None,
    as_json: Json = False,
) -> None:
    """List the passes a recipe can name, or show the options of one.

    $ stepfold passes schedule
    """
    from ..passes.registry import all_passes

    passes = all_passes()
    names = [known.name for known in passes]
    if name is not None and name not in names:
        raise UsageError(f"pass {name!r}: no such pass; {nearest(name, names)}")
    found = [document(known) for known in passes if name in (None, known.name)]
    if as_json:
        print_json({"passes": found})
        return
    screen = console()
    if name is None:
        rows = [(entry["name"], entry["family"], entry["summary"], ", ".join(entry["options"])) for entry in found]
        screen.print(table("Passes", ("pass", "family", "what it does", "options"), rows))
        return
    (entry,) = found
    screen.print(f"[bold]{escape(entry['name'])}[/] ({escape(entry['family'])}): {escape(entry['summary'])}")
    screen.print(f"Source: {escape(entry['source'])}")
    rows = [(key, o["type"], repr(o["default"]), o["description"]) for key, o in entry["options"].items()]
    screen.print(table("Options", ("option", "type", "default", "meaning"), rows) if rows else "It has no options.")


def document(kind: type[Pass[Any]]) -> dict[str, Any]:
    """A pass as `passes --json` prints it."""
    return {
        "name": kind.name,
        "family": kind.family,
        "summary": kind.summary(),
        "source": kind.source,
        "options": describe_options(kind.options_type),
    }


def describe_options(options: type[BaseModel]) -> dict[str, dict[str, Any]]:
    """Type, default and meaning of every option; the meaning is in the `Attributes` of the docstring of its class."""
    meanings = {
        name: text for kind in reversed(options.__mro__) for name, text in attributes(kind.__doc__ or "").items()
    }
    return {
        name: {
            "type": type_name(field.annotation),
            "default": None if field.is_required() else _plain(field.get_default(call_default_factory=True)),
            "description": meanings.get(name, ""),
        }
        for name, field in options.model_fields.items()
    }


def _plain(default: Any) -> Any:
    """A default as JSON and recipes write it."""
    return default.model_dump(mode="json") if isinstance(default, Options) else default


def attributes(docstring: str) -> dict[str, str]:
    """The `Attributes` section of a docstring: name -> text."""
    _, _, section = inspect.cleandoc(docstring).partition("Attributes:\n")
    found: dict[str, str] = {}
    name = None
    for line in section.splitlines():
        start = ATTRIBUTE.match(line)
        if start:
            name = start[1]
            found[name] = start[2]
        elif name is not None and line.startswith("        "):
            found[name] += f" {line.strip()}"
        elif line.strip():
            break
    return found


def type_name(annotation: Any) -> str:
    """A type as a person writes its values: `int | auto`, `number`, `list of str`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_name(arguments[0])
    if origin is Literal:
        return " | ".join(str(value) for value in arguments)
    if origin in (Union, UnionType):
        return " | ".join(type_name(argument) for argument in arguments)
    if origin in (tuple, list):
        return f"list of {type_name(arguments[0])}"
    if annotation in (None, NoneType):
        return "null"
    if isinstance(annotation, type) and issubclass(annotation, Options):
        return f"{{{', '.join(annotation.model_fields)}}}"
    return {float: "number", bool: "true | false"}.get(annotation, getattr(annotation, "__name__", str(annotation)))
