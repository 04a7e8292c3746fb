"""Recipes: a YAML list of passes with their options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ..loop.errors import UsageError, nearest
from .manager import Step
from .registry import pass_named

KEYS = ("name", "summary", "extends", "target", "passes")


@dataclass(frozen=True)
class Entry:
    """One pass of a recipe, as written.

    Attributes:
        name: of the pass.
        options: as written.
        optional: whether it may find nothing to do.
        place: file and line, for errors.
    """

    name: str
    options: Mapping[str, Any]
    optional: bool
    place: str


@dataclass(frozen=True)
class Recipe:
    """A named list of passes for a target."""

    name: str
    summary: str
    target: Mapping[str, Any]
    entries: tuple[Entry, ...]

    @property
    def backend(self) -> str | None:
        """The backend the recipe was written for."""
        return self.target.get("backend")

    def steps(self) -> list[Step]:
        """The passes with checked options.

        Raises:
            UsageError: an unknown pass, option or value.
        """
        return [_step(entry) for entry in self.entries]

    def document(self) -> dict[str, Any]:
        """The recipe as it was run, for the manifest."""
        passes = [{e.name: dict(e.options)} | ({"optional": True} if e.optional else {}) for e in self.entries]
        return {"name": self.name, "target": dict(self.target), "passes": passes}


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with stepfold."""
    return sorted(path.name.removesuffix(".yaml") for path in _folder().iterdir() if path.name.endswith(".yaml"))


def load_recipe(source: str | Path | Mapping[str, Any]) -> Recipe:
    """A recipe by name, file or content.

    Raises:
        UsageError: there is no such recipe, or it is not well-formed.
    """
    if isinstance(source, Mapping):
        return _build(dict(source), "recipe", {})
    path = Path(source)
    if path.suffix in (".yaml", ".yml") or path.exists():
        if not path.is_file():
            raise UsageError(f"recipe {source}: no such file.")
        return _parse(path.read_text(), str(path))
    name = str(source)
    if name not in shipped_recipes():
        raise UsageError(f"recipe {name!r}: no such recipe or file; {nearest(name, shipped_recipes())}")
    return _parse((_folder() / f"{name}.yaml").read_text(), f"{name}.yaml")


def override(recipe: Recipe, settings: Sequence[tuple[str, str, Any]]) -> Recipe:
    """The recipe with single options replaced: (pass, option, value).

    Raises:
        UsageError: the recipe has no such pass.
    """
    entries = list(recipe.entries)
    for name, option, value in settings:
        places = [i for i, entry in enumerate(entries) if entry.name == name]
        if not places:
            names = [entry.name for entry in entries]
            raise UsageError(f"--set {name}.{option}: recipe {recipe.name!r} has no pass {name!r}; "
                             f"{nearest(name, names)}")
        for i in places:
            entries[i] = replace(
                entries[i], options={**entries[i].options, option: value}, place=f"--set {name}.{option}"
            )
    return replace(recipe, entries=tuple(entries))


def _folder() -> Any:
    return files(__package__) / "recipes"


def _parse(text: str, place: str) -> Recipe:
    try:
        data, node = yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise UsageError(f"{place}: not a YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise UsageError(f"{place}: expected a mapping with `passes`; received {type(data).__name__}.")
    return _build(data, place, _pass_lines(node))


def _pass_lines(node: Any) -> dict[int, int]:
    """The line of each entry of `passes`, counted from 1."""
    for key, value in node.value:
        if key.value == "passes" and isinstance(value, yaml.SequenceNode):
            return {i: item.start_mark.line + 1 for i, item in enumerate(value.value)}
    return {}


def _build(data: dict[str, Any], place: str, lines: Mapping[int, int]) -> Recipe:
    for key in data:
        if key not in KEYS:
            raise UsageError(f"{place}: unknown key {key!r}; {nearest(str(key), KEYS)}")
    base = load_recipe(data["extends"]) if data.get("extends") else None
    listed = data.get("passes") or []
    if not isinstance(listed, list):
        raise UsageError(f"{place}: expected `passes` to be a list; received {type(listed).__name__}.")
    own = [_entry(item, f"{place}, line {lines[i]}" if i in lines else place) for i, item in enumerate(listed)]
    entries = _extended(base.entries, own) if base else own
    if not entries:
        raise UsageError(f"{place}: a recipe needs at least one pass; received none.")
    return Recipe(
        name=str(data.get("name") or Path(place).stem),
        summary=str(data.get("summary") or ""),
        target=data.get("target") or (base.target if base else {}),
        entries=tuple(entries),
    )


def _extended(base: Sequence[Entry], own: Sequence[Entry]) -> list[Entry]:
    """The base with passes of the same name given new options, others put before its `schedule`."""
    named = {entry.name: entry for entry in own}
    merged = [
        replace(named[e.name], options={**e.options, **named[e.name].options}) if e.name in named else e for e in base
    ]
    added = [entry for entry in own if all(entry.name != e.name for e in base)]
    at = next((i for i, entry in enumerate(merged) if entry.name == "schedule"), len(merged))
    return [*merged[:at], *added, *merged[at:]]


def _entry(item: Any, place: str) -> Entry:
    if isinstance(item, str):
        return Entry(item, {}, False, place)
    if not isinstance(item, dict):
        raise UsageError(f"{place}: expected a pass name with its options; received {item!r}.")
    names = [key for key in item if key != "optional"]
    optional = item.get("optional", False)
    if len(names) != 1 or not isinstance(optional, bool):
        raise UsageError(f"{place}: expected one pass and maybe `optional: true`; received {item!r}.")
    options = item[names[0]] or {}
    if not isinstance(options, dict):
        raise UsageError(f"{place}: expected the options of {names[0]!r} as a mapping; received {options!r}.")
    return Entry(str(names[0]), options, optional, place)


def _step(entry: Entry) -> Step:
    try:
        kind = pass_named(entry.name)
        return Step(kind(kind.options_type.model_validate(dict(entry.options))), entry.optional)
    except UsageError as error:
        raise UsageError(f"{entry.place}: {error}") from None
    except ValidationError as error:
        raise UsageError(f"{entry.place}: pass {entry.name}: {_problem(entry, error)}") from None


def _problem(entry: Entry, error: ValidationError) -> str:
    first = error.errors()[0]
    option = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        valid = list(pass_named(entry.name).options_type.model_fields)
        return f"unknown option {option!r}; {nearest(option, valid) if valid else 'this pass has no options.'}"
    return f"option {option!r}: {first['msg']}; received {first['input']!r}."
