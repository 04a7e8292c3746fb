"""What the values of a program's loop come from: everything that has to be equal for them to be computed again."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from pydantic import JsonValue
from torch import fx

from ..backends.capability import version_of
from ..ir.digest import add_tensor, stage_digest
from ..ir.program import Program, Slot, Stage
from ..loop.recurrence import Recurrence

PACKAGES = ("torch", "diffusers", "transformers", "numpy")
"""Those that decide what a captured model computes and where its sampler calls it."""
OWN = ("calibration", "frontend", "ir", "loop")
"""The folders of this package that do."""

_digests: WeakKeyDictionary[fx.GraphModule, str | None] = WeakKeyDictionary()  # hashing weights takes a while


def origin_of(program: Program) -> dict[str, JsonValue] | None:
    """What the loop of a program computes depends on, as JSON; None where a graph holds something unknown."""
    stages = {stage.name: _digest(stage) for stage in program.stages}
    if None in stages.values():
        return None
    named = {"example": program.example, "unconditional": program.unconditional, "constant": program.constants}
    values = {f"{kind} {name}": value for kind, found in named.items() for name, value in found.items()}
    return {
        "model": program.model.class_name,
        "weights": program.model.weights_sha256,
        "stages": dict(stages),
        "slots": [_filling(slot) for slot in program.slots],
        "loop": program.loop.model_dump(mode="json") if program.loop is not None else None,
        "recurrence": recurrence_digest(program.recurrence),
        "values": _values_digest(values),
        "packages": {name: version_of((name,)) for name in PACKAGES},
        "code": own_code(),
    }


def _filling(slot: Slot) -> dict[str, JsonValue]:
    """What fills a slot, and when."""
    names = list[JsonValue](stage.name for stage in slot.variants)
    return {"name": slot.name, "variants": names, "by_call": None if slot.by_call is None else list(slot.by_call)}


def recurrence_digest(recurrence: Recurrence | None) -> str | None:
    """SHA-256 of the sampler as it was probed: a new version of its library may call at other timesteps."""
    if recurrence is None:
        return None
    digest = hashlib.sha256()
    for name, array in sorted(recurrence.arrays().items()):
        digest.update(f"{name} {array.shape}".encode())
        digest.update(array.astype("<f8").tobytes())
    return digest.hexdigest()


@functools.cache
def own_code() -> str:
    """SHA-256 over the sources that capture a model and run its loop; the version stays the same in a checkout."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for name in OWN:
        for path in sorted((root / name).rglob("*.py")):
            digest.update(f"{path.relative_to(root).as_posix()}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _digest(stage: Stage) -> str | None:
    """The digest of a stage; graphs are never written to, so it is taken once."""
    if stage.graph not in _digests:
        _digests[stage.graph] = stage_digest(stage)
    return _digests[stage.graph]


def _values_digest(values: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(values.items()):
        if isinstance(value, torch.Tensor):
            add_tensor(digest, name, value)
        else:
            digest.update(f"{name} {json.dumps(value, default=repr)}".encode())
    return digest.hexdigest()
