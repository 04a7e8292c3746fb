"""Bundles of native code, which an engine loads into this process: opened when they were built here, or on request."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path

from ..backends.registry import get
from ..bundle.manifest import Manifest
from ..bundle.reader import Bundle
from ..loop.errors import UsageError

logger = logging.getLogger(__name__)

FOLDER = "native"  # below the cache: a file for each bundle, called after its stages
OTHERS_MAY_WRITE = 0o022


def require_allowed(bundle: Bundle, allow_native: bool) -> None:
    """Refuse native code that this user neither built here nor asked for.

    Raises:
        UsageError: the bundle holds such code.
    """
    name = bundle.manifest.backend.name
    if allow_native or not get(name).native or _is_remembered(bundle.manifest):
        return
    raise UsageError(
        f"{bundle.path}: expected a bundle that you built on this machine; its stages are native code for {name!r}, which "
        "runs with all your rights as soon as it is opened. If you trust where it came from: --allow-native, or "
        "stepfold.load(path, allow_native=True)."
    )


def remember(manifest: Manifest) -> None:
    """Note that this user built the native code of a bundle here; a cache that cannot be written is warned of."""
    if not get(manifest.backend.name).native:
        return
    path = _note(manifest)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.write_text(path.name)
        path.chmod(0o600)
    except OSError as error:
        logger.warning("%s: the bundle cannot be remembered and needs --allow-native: %s", path.parent, str(error))


def _is_remembered(manifest: Manifest) -> bool:
    """Whether the note of a bundle is there, and this user's own: a folder of caches may be open to others."""
    path = _note(manifest)
    try:
        status = path.lstat()
        own = not hasattr(os, "getuid") or (status.st_uid == os.getuid() and not status.st_mode & OTHERS_MAY_WRITE)
        return own and path.is_file() and path.read_text() == path.name
    except (OSError, ValueError):
        return False


def _note(manifest: Manifest) -> Path:
    """The file that remembers a bundle: by its engine and by the digests of all that lies beside its stages."""
    from ..bundle.cache import cache_folder

    folders = {stage.file.rpartition("/")[0] for stage in manifest.stages}
    beside = {name: entry.sha256 for name, entry in manifest.files.items() if name.rpartition("/")[0] in folders}
    parts = [manifest.backend.name, sorted(stage.file for stage in manifest.stages), sorted(beside.items())]
    return cache_folder() / FOLDER / hashlib.sha256(json.dumps(parts).encode()).hexdigest()
