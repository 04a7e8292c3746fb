"""What lies in folders: configurations to change, files to compare."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

WEIGHTS = "diffusion_pytorch_model.safetensors"


def edit_config(folder: Path, **changes: object) -> None:
    """Change keys of config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def empty(folder: Path) -> bool:
    """Whether there is nothing, hidden files included."""
    return list(folder.iterdir()) == []


def hashes(folder: Path, *names: str) -> dict[str, str]:
    """The SHA-256 of each file by relative path; of all, or of those whose path starts with one of these names."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and (not names or path.relative_to(folder).as_posix().startswith(names))
    }
