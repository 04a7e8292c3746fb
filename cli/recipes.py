"""`stepfold recipes`: the recipes that come with stepfold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from ..loop.errors import UsageError, nearest
from .console import console, print_json, table
from .options import Json

if TYPE_CHECKING:
    from ..passes.recipe import Recipe


def recipes(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Show one recipe as YAML.")] = None,
    as_json: Json = False,
) -> None:
    """List the recipes that come with stepfold, or show one, to copy and change.

    $ stepfold recipes default
    """
    from ..passes.recipe import load_recipe, shipped_recipes

    shipped = shipped_recipes()
    if name is not None and name not in shipped:
        raise UsageError(f"recipe {name!r}: no such recipe; {nearest(name, shipped)}")
    found = [load_recipe(known) for known in shipped if name in (None, known)]
    if as_json:
        print_json({"recipes": [document(recipe) for recipe in found]})
    elif name is not None:
        text = yaml.safe_dump({"summary": found[0].summary, **found[0].document()}, sort_keys=False, width=120)
        console().print(text.rstrip(), markup=False, soft_wrap=True)
    else:
        rows = [(recipe.name, ", ".join(document(recipe)["passes"]), recipe.summary) for recipe in found]
        console().print(table("Recipes", ("recipe", "passes", "summary"), rows))


def document(recipe: Recipe) -> dict[str, Any]:
    """A recipe as `recipes --json` prints it."""
    return {"name": recipe.name, "summary": recipe.summary, "passes": [entry.name for entry in recipe.entries]}
