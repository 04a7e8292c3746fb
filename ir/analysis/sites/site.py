"""What a finder returns: sites, and the places that nearly were one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import fx

KINDS = ("linear", "attention", "feed_forward", "modulate", "block")


@dataclass(frozen=True, eq=False)
class Site:
    """A place a pass can act on.

    Attributes:
        kind: one of `KINDS`.
        name: module path, made unique by a counter where one module holds several.
        nodes: every node of the site in graph order.
        parts: its named nodes, such as the linears that make the query.
        stage: the stage it lies in.
    """

    kind: str
    name: str
    nodes: tuple[fx.Node, ...]
    parts: Mapping[str, tuple[fx.Node, ...]] = field(default_factory=dict)
    stage: str = ""


@dataclass(frozen=True, eq=False)
class NearMiss:
    """A place that resembles a site, and what it lacks."""

    kind: str
    name: str
    node: fx.Node
    missing: str
    stage: str = ""


@dataclass(frozen=True)
class Found:
    """What one finder saw."""

    sites: tuple[Site, ...]
    near_misses: tuple[NearMiss, ...] = ()


@dataclass(frozen=True)
class Sites:
    """All sites of a program, by kind, in graph order."""

    linear: tuple[Site, ...]
    attention: tuple[Site, ...]
    feed_forward: tuple[Site, ...]
    modulate: tuple[Site, ...]
    block: tuple[Site, ...]
    near_misses: tuple[NearMiss, ...]

    def counts(self) -> dict[str, int]:
        """How many there are of each kind."""
        return {kind: len(getattr(self, kind)) for kind in KINDS}


def unique_names(sites: Iterable[Site]) -> tuple[Site, ...]:
    """The sites with `#2`, `#3`... after a name that occurs again."""
    seen: dict[str, int] = {}
    renamed = []
    for site in sites:
        seen[site.name] = seen.get(site.name, 0) + 1
        name = site.name if seen[site.name] == 1 else f"{site.name}#{seen[site.name]}"
        renamed.append(Site(site.kind, name, site.nodes, site.parts, site.stage))
    return tuple(renamed)
