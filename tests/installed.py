"""Packages as an installer leaves them, for tests of entry points."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def declare(folder: Path, name: str, version: str, groups: Mapping[str, Mapping[str, str]]) -> None:
    """Write the metadata of an installed package that declares entry points, by group, into a folder of `sys.path`."""
    metadata = folder / f"{name}-{version}.dist-info"
    metadata.mkdir(exist_ok=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = [
        line
        for group, entries in groups.items()
        for line in (f"[{group}]", *(f"{entry} = {value}" for entry, value in entries.items()), "")
    ]
    (metadata / "entry_points.txt").write_text("\n".join(lines))
