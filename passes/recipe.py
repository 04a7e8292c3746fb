"""Recipes: a YAML list of passes with their options."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ..loop.errors import UsageError, nearest
from ..loop.options import option_problem
from ..loop.reading import Expected
from ..loop.yaml_files import parse_yaml, read_yaml
from . import registry
from .base import Phase
from .manager import Step, out_of_order
from .registry import pass_named

KEYS = ("name", "summary", "extends", "target", "passes")
TARGET_KEYS = ("backend",)
RECIPE = Expected("a recipe, YAML")


@dataclass(frozen=True)
class Entry:
    """One pass of a recipe, as written.

    Attributes:
        name: name of the pass.
        options: options as they are written.
        optional: whether it may find nothing to do; None when the recipe does not say.
        place: file and line, for errors.
    """

    name: str
    options: Mapping[str, Any]
    optional: bool | None
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
            UsageError: an unknown pass, option or value, a pass that stands after one of a later phase, or one that
            stands twice and could do nothing the second time.
        """
        steps = [_step(entry) for entry in self.entries]
        misplaced = out_of_order(steps)
        if misplaced is not None:
            raise UsageError(f"{self.entries[misplaced.index].place}: {misplaced.problem}")
        for i, (entry, step) in enumerate(zip(self.entries, steps, strict=True)):
            _refuse_again(entry, step, steps[:i])
        return steps

    def document(self) -> dict[str, Any]:
        """The recipe as it was run, for the manifest."""
        passes = [{e.name: dict(e.options)} | ({"optional": True} if e.optional else {}) for e in self.entries]
        return {"name": self.name, "target": dict(self.target), "passes": passes}


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with stepfold."""
    return sorted(path.name.removesuffix(".yaml") for path in _folder().iterdir() if path.name.endswith(".yaml"))


def load_recipe(source: str | Path | Mapping[str, Any]) -> Recipe:
    """A recipe by name, file or content.

    A recipe that extends a file names it relative to its own folder.

    Raises:
        UsageError: there is no such recipe, or it is not well-formed.
    """
    return _load(source, Path(), ())


def _load(source: object, folder: Path, extending: tuple[str, ...]) -> Recipe:
    """A recipe; `extending` are the places of those that extend it."""
    if isinstance(source, Mapping):
        return _build(_Written(dict(source), "recipe", {}, {}), folder, extending)
    if not isinstance(source, (str, Path)):
        raise UsageError(f"recipe: expected a name or a file; received {source!r}.")
    name, path = str(source), folder / source
    if name in shipped_recipes():  # a file or folder of that name is written as ./NAME
        place = f"{name}.yaml"
        content = parse_yaml((_folder() / place).read_text(), place, RECIPE)
    elif path.suffix in (".yaml", ".yml") or os.path.isfile(path):
        place, content = str(path), read_yaml(path, RECIPE)
    else:
        raise UsageError(f"recipe {name!r}: no such recipe or file; {nearest(name, shipped_recipes())}")
    if place in extending:
        raise UsageError(f"{place}: extends itself through {' and '.join(extending)}.")
    return _build(_written(place, *content), path.parent, (*extending, place))


def override(recipe: Recipe, settings: Sequence[tuple[str, str, Any]]) -> Recipe:
    """The recipe with single options replaced: (pass, option, value).

    `quantize` addresses every pass of that name, `quantize:2` the second one.

    Raises:
        UsageError: the recipe has no such pass.
    """
    entries = list(recipe.entries)
    for name, option, value in settings:
        for i in _addressed(recipe, name, option):
            entries[i] = replace(
                entries[i], options={**entries[i].options, option: value}, place=f"--set {name}.{option}"
            )
    return replace(recipe, entries=tuple(entries))


def _addressed(recipe: Recipe, address: str, option: str) -> list[int]:
    """The places of the passes that `NAME` or `NAME:NUMBER` addresses."""
    name, colon, number = address.partition(":")
    names = [entry.name for entry in recipe.entries]
    places = [i for i, found in enumerate(names) if found == name]
    if not places:
        raise UsageError(
            f"--set {address}.{option}: recipe {recipe.name!r} has no pass {name!r}; {nearest(name, names)}"
        )
    if not colon:
        return places
    if not (number.isdecimal() and len(number) < 4 and 1 <= int(number) <= len(places)):
        raise UsageError(
            f"--set {address}.{option}: expected {name}:1 to {name}:{len(places)}, the passes of that name in recipe "
            f"{recipe.name!r}; received {address!r:.60}."
        )
    return [places[int(number) - 1]]


def _refuse_again(entry: Entry, step: Step, before: Sequence[Step]) -> None:
    """Refuse a pass after an equal one, and a second schedule: neither leaves both of them a purpose."""
    operation = step.operation
    for earlier in (other.operation for other in before if other.operation.name == operation.name):
        if operation.phase is Phase.SCHEDULE:
            reason = "and the second throws away what the first has fitted"
        elif operation.idempotent and earlier.options == operation.options:
            reason = "and the second has nothing left to do"
        else:
            continue
        raise UsageError(
            f"{entry.place}: pass {entry.name}: expected it once; received it twice, {reason}. Remove one of them."
        )


def _folder() -> Any:
    return files(__name__.rpartition(".")[0]) / "recipes"


@dataclass(frozen=True)
class _Written:
    """The content of a recipe with the lines of its keys and of its passes, for errors."""

    data: dict[Any, Any]
    file: str
    keys: Mapping[str, int]
    passes: Mapping[int, int]

    def at(self, line: int | None) -> str:
        return self.file if line is None else f"{self.file}, line {line}"


def _written(place: str, data: Any, node: yaml.Node | None) -> _Written:
    if not isinstance(data, dict) or node is None:
        raise UsageError(f"{place}: expected a mapping with `passes`; received {type(data).__name__}.")
    keys = {str(key.value): key.start_mark.line + 1 for key, _ in node.value}
    lists = [value.value for key, value in node.value if key.value == "passes" and isinstance(value, yaml.SequenceNode)]
    return _Written(
        data, place, keys, {i: item.start_mark.line + 1 for i, item in enumerate(lists[0] if lists else [])}
    )


def _build(written: _Written, folder: Path, extending: tuple[str, ...]) -> Recipe:
    data = written.data
    for key in data:
        if key not in KEYS:
            place = written.at(written.keys.get(str(key)))
            raise UsageError(f"{place}: unknown key {key!r}; {nearest(str(key), KEYS)}")
    base = _load(data["extends"], folder, extending) if data.get("extends") else None
    listed = data.get("passes") or []
    if not isinstance(listed, list):
        place = written.at(written.keys.get("passes"))
        raise UsageError(f"{place}: expected `passes` to be a list; received {type(listed).__name__}.")
    own = [_entry(item, written.at(written.passes.get(i))) for i, item in enumerate(listed)]
    entries = _extended(base.entries, own) if base else own
    if not entries:
        raise UsageError(f"{written.file}: a recipe needs at least one pass; received none.")
    for key in ("name", "summary"):
        if not isinstance(data.get(key), str | None):
            raise UsageError(
                f"{written.at(written.keys.get(key))}: expected `{key}` to be text; received {data[key]!r:.60}."
            )
    return Recipe(
        name=str(data.get("name") or Path(written.file).stem),
        summary=str(data.get("summary") or ""),
        target=_target(written) or (base.target if base else {}),
        entries=tuple(entries),
    )


def _target(written: _Written) -> dict[str, str]:
    target, place = written.data.get("target") or {}, written.at(written.keys.get("target"))
    if not isinstance(target, dict):
        raise UsageError(
            f"{place}: expected `target` as a mapping such as {{backend: onnxruntime}}; received {target!r}."
        )
    for key, value in target.items():
        if key not in TARGET_KEYS:
            raise UsageError(f"{place}: unknown key {key!r} of `target`; {nearest(str(key), TARGET_KEYS)}")
        if not isinstance(value, str):
            raise UsageError(f"{place}: expected the name of a backend; received {value!r}.")
    return target


def _extended(base: Sequence[Entry], own: Sequence[Entry]) -> list[Entry]:
    """The base with passes of the same name given new options, others put after those of their phase."""
    named: dict[str, Entry] = {}
    for entry in own:
        if entry.name in named and any(entry.name == e.name for e in base):
            raise UsageError(
                f"{entry.place}: pass {entry.name!r} stands twice and would replace one of the recipe it extends; "
                "expected it once."
            )
        named[entry.name] = entry
    merged = [_merged(e, named[e.name]) if e.name in named else e for e in base]
    for entry in own:
        if all(entry.name != e.name for e in base):
            phase = _phase(entry)
            later = (i for i, other in enumerate(merged) if _phase(other) > phase)
            merged.insert(next(later, len(merged)), entry)
    return merged


def _phase(entry: Entry) -> Phase:
    """When a pass runs; one that does not say, or that nobody knows, comes last before the schedule."""
    try:
        found = registry.pass_named(entry.name).phase
    except UsageError:  # reported with its place in the recipe when the passes are made
        found = None
    return Phase.FUSE if found is None else found


def _merged(base: Entry, own: Entry) -> Entry:
    optional = base.optional if own.optional is None else own.optional
    return replace(own, options={**base.options, **own.options}, optional=optional)


def _entry(item: Any, place: str) -> Entry:
    if isinstance(item, str):
        return Entry(item, {}, None, place)
    if not isinstance(item, dict):
        raise UsageError(f"{place}: expected a pass name with its options; received {item!r}.")
    names = [key for key in item if key != "optional"]
    optional = item.get("optional")
    if len(names) != 1 or not isinstance(optional, bool | None):
        raise UsageError(f"{place}: expected one pass and maybe `optional: true`; received {item!r}.")
    options = item[names[0]] or {}
    if not isinstance(options, dict):
        raise UsageError(f"{place}: expected the options of {names[0]!r} as a mapping; received {options!r}.")
    return Entry(str(names[0]), options, optional, place)


def _step(entry: Entry) -> Step:
    try:
        kind = pass_named(entry.name)
        return Step(kind(kind.options_type.model_validate(dict(entry.options))), bool(entry.optional))
    except UsageError as error:
        raise UsageError(f"{entry.place}: {error}") from None
    except ValidationError as error:
        problem = option_problem(pass_named(entry.name).options_type, "pass", error)
        raise UsageError(f"{entry.place}: pass {entry.name}: {problem}") from None
