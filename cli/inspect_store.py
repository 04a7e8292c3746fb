"""A calibration store as text: how far it is, what it covers, and how ranges move over time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..calibration.document import STEADY
from .console import console, table


def print_store(document: Mapping[str, Any]) -> None:
    """Print what `inspect --json` says about a store."""
    screen, parts, shards = console(), document["parts"], document["shards"]
    passes = ", ".join(entry["pass"] for entry in parts["passes"]) or "none"
    screen.print(
        f"Calibration of {parts['model']}: {parts['samples']} samples of seed {parts['seed']}, passes before it: "
        f"{passes}, {shards['done']} of {shards['total']} shards.",
        markup=False,
        soft_wrap=True,
    )
    if not document["finished"]:
        screen.print("Not finished: run the same `stepfold calibrate` again.", markup=False)
    screen.print(_coverage(document))
    screen.print(_sites(document))
    drifting = [site for site in document["sites"] if site["drift"] is not None and site["drift"] > STEADY]
    if document["finished"]:
        total = len(document["sites"])
        screen.print(f"{len(drifting)} of {total} sites drift by more than {STEADY:g}: maximum over median range.")


def _coverage(document: Mapping[str, Any]) -> Any:
    """One row a timestep bucket, one column a branch."""
    rows: dict[int, list[str]] = {}
    branches = list(dict.fromkeys(entry["branch"] for entry in document["coverage"]))
    for entry in document["coverage"]:
        first, last = entry["calls"]
        times = "-" if entry["timesteps"] is None else "{:g} to {:g}".format(*entry["timesteps"])
        row = rows.setdefault(entry["bucket"], [str(entry["bucket"]), f"{first} to {last}", times])
        row.append(f"{entry['evaluations']:,}")
    return table("Coverage", ("bucket", "calls", "timesteps", *branches), list(rows.values()), ("bucket", *branches))


def _sites(document: Mapping[str, Any]) -> Any:
    numbers = ("width", "rows", "low", "high", "drift", "Gram rows")
    rows = [
        (
            site["site"],
            str(len(site["layers"])),
            str(site["width"]),
            _count(site["rows"]),
            _value(site["low"]),
            _value(site["high"]),
            _value(site["drift"]),
            _count(site["gram_rows"]),
        )
        for site in document["sites"]
    ]
    return table("Sites", ("site", "layers", *numbers), rows, ("layers", *numbers))


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _value(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
