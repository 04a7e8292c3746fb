"""Bundles drawn here and on an emulated processor without VNNI."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from stepfold.report.emulation import missing, without_vnni

needs_emulator = pytest.mark.skipif(missing() is not None, reason=missing() or "")

DRAW = """
import json, sys
import numpy as np
import stepfold
for path in json.loads(sys.argv[2]):
    engine = stepfold.load(path, threads=1)
    np.save(path + ".npy", engine.sample(**np.load(sys.argv[1])))
"""


def drawn_without_vnni(bundles: Mapping[str, Path], request: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Samples of bundles by name; one process draws them all.

    Args:
        bundles: their folders.
        request: noise and conditions, as `Engine.sample` takes them.
    """
    paths = [str(path) for path in bundles.values()]
    file = f"{paths[0]}.npz"
    np.savez(file, **request)
    without_vnni("-c", DRAW, file, json.dumps(paths))
    return {name: np.load(f"{path}.npy") for name, path in bundles.items()}
