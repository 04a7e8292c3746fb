"""Files of a bundle: paths that stay inside it, streamed hashes, and what is wrong with a file."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from ..loop.errors import BundleError
from ..loop.held import HeldFile

MANIFEST = "manifest.json"
LONGEST_PATH = 1024
LONGEST_PART_BYTES = 255
AGAIN = "Copy the bundle again or build it again with `stepfold optimize`."


def sha256_of(path: Path) -> str:
    """SHA-256 of a file as hexadecimal text, read in chunks."""
    return HeldFile(path).sha256()


def inside(folder: Path, name: str) -> Path:
    """The file of a bundle that `name` stands for.

    Args:
        folder: folder of the bundle.
        name: a relative POSIX path from the manifest.

    Raises:
        BundleError: the path is absolute, has `..` or a drive letter, or leaves the folder through a link.
    """
    reason = _refusal(name)
    path = folder / name if reason is None else folder
    if reason is None and not path.resolve().is_relative_to(folder.resolve()):
        reason = "leads out of the bundle through a link"
    if reason is not None:
        raise BundleError(
            f"{folder}: the path {name!r} {reason}; expected a relative POSIX path inside the bundle. "
            "Do not use this bundle: its manifest is damaged or hostile."
        )
    return path


def _refusal(name: str) -> str | None:
    """Why a path is not a plain relative POSIX path, on any operating system."""
    if not name or len(name) > LONGEST_PATH:
        return "is empty or too long"
    if name.startswith("/"):
        return "is absolute"
    if "\\" in name or ":" in name:
        return "has a backslash or a drive letter"
    if any(ord(letter) < 32 or 0xD800 <= ord(letter) <= 0xDFFF for letter in name):
        return "has a control character"
    parts = name.split("/")
    if any(part.rstrip(". ") == "" for part in parts):  # "..", "." and "", and what Windows reads as them
        return "has an empty, '.' or '..' part"
    if any(len(part.encode()) > LONGEST_PART_BYTES for part in parts):
        return "is empty or too long"
    return None


def listing(folder: Path) -> list[str]:
    """Relative POSIX paths of everything in a bundle but its folders and its manifest, sorted; links not followed."""
    found = []
    for parent, folders, files in os.walk(folder):
        linked = [name for name in folders if (Path(parent) / name).is_symlink()]
        found += [(Path(parent) / name).relative_to(folder).as_posix() for name in [*files, *linked]]
    return sorted(name for name in found if name != MANIFEST)


def problem(folder: Path, name: str, sha256: str, size: int) -> str | None:
    """What is wrong with one file of a bundle, or None; see `checked`."""
    found = checked(folder, name, sha256, size)
    return found if isinstance(found, str) else None


def checked(folder: Path, name: str, sha256: str, size: int) -> HeldFile | str:
    """One file of a bundle, held open so that what is read later is what was checked; or what is wrong with it.

    Args:
        folder: folder of the bundle.
        name: relative path.
        sha256: expected digest.
        size: expected bytes.
    """
    path = inside(folder, name)
    try:
        if not path.is_file():
            return f"{name}: expected a file of {size} bytes; it is missing. {AGAIN}"
        held = HeldFile(path)
        if held.size != size:
            return f"{name}: expected {size} bytes; received {held.size}. {AGAIN}"
        digest = held.sha256()
    except OSError as error:
        return f"{name}: expected a readable file; received: {error}. {AGAIN}"
    if digest != sha256:
        return f"{name}: expected sha256 {sha256[:12]}...; received {digest[:12]}... The file was changed. {AGAIN}"
    return held


def unlisted(folder: Path, listed: Collection[str]) -> list[str]:
    """One line for every file of a bundle that its manifest does not name."""
    return [
        f"{name}: not part of the bundle: the manifest does not name it. Remove it, or build the bundle again."
        for name in listing(folder)
        if name not in listed
    ]
