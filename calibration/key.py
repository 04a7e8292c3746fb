"""What the statistics of a run depend on, its hash, and the difference between two runs in words."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..ir.program import PassRecord, Program
from ..loop.classes import class_input
from .origin import recurrence_digest
from .plan import SHARD_SAMPLES, CalibrationPlan
from .sampling import ROWS, TOKENS
from .statistics import ACCUMULATORS

SHORT = 12  # letters of a hash that are shown


def run_parts(plan: CalibrationPlan) -> dict[str, Any]:
    """Everything a run depends on, as JSON."""
    return program_parts(plan.program) | {
        "seed": plan.seed,
        "samples": plan.samples,
        "buckets": plan.buckets,
        "shard_samples": SHARD_SAMPLES,
        "tokens": TOKENS,
        "rows": ROWS,
        "statistics": ", ".join(ACCUMULATORS),
        "gram_width": plan.gram_width,
        "sites": _sha256(json.dumps([item.entry.model_dump(mode="json") for item in plan.watched])),
    }


def program_parts(program: Program) -> dict[str, Any]:
    """What of a run a program decides."""
    return {
        "model": program.model.class_name,
        "weights": program.model.weights_sha256,
        "loop": program.loop.model_dump(mode="json") if program.loop is not None else None,
        "recurrence": recurrence_digest(program.recurrence),
        "conditions": _conditions(program),
        "passes": [_pass(record) for record in program.records if _changes_values(record)],
    }


def key_of(parts: Mapping[str, Any]) -> str:
    """SHA-256 of the parts."""
    return _sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")))


def differences(stored: Any, here: Any, at: str = "") -> list[str]:
    """What of a store is not as it would be here, one phrase for each value: `loop.sampler.steps: 50 there, 8 here`."""
    return list(_differences(stored, here, at))


def _differences(stored: Any, here: Any, at: str) -> Iterator[str]:
    if isinstance(stored, Mapping) and isinstance(here, Mapping):
        for name in dict.fromkeys((*stored, *here)):
            yield from _differences(stored.get(name), here.get(name), f"{at}.{name}" if at else name)
    elif stored != here:
        yield f"{at}: {_shown(stored)} in the store, {_shown(here)} here"


def _shown(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(item, Mapping) and "pass" in item for item in value):
        return ", ".join(f"{item['pass']} {item['sha256'][:SHORT]}" for item in value) or "none"
    if isinstance(value, str) and len(value) == hashlib.sha256().digest_size * 2:
        return value[:SHORT]
    return "none" if value is None else json.dumps(value)


def _changes_values(record: PassRecord) -> bool:
    return record.outcome == "changed" and not record.keeps_activations


def _pass(record: PassRecord) -> dict[str, str]:
    details = json.dumps([record.changed, dict(record.details)], sort_keys=True, default=str)
    return {"pass": record.name, "sha256": _sha256(details)}


def _conditions(program: Program) -> str:
    """Hash of the example that conditions are taken from, and of baked-in constants; classes follow from the loop."""
    values: dict[str, Any] = {f"constant {name}": value for name, value in program.constants.items()}
    if program.loop is None:
        values |= {f"example {name}": value for name, value in program.example.items()}
    elif class_input(program.inputs, program.loop) is None:
        named = [item.name for item in program.inputs if item.role == "condition"]
        values |= {f"condition {name}": program.example[name] for name in named}
        values |= {f"unconditional {name}": value for name, value in program.unconditional.items()}
    digest = hashlib.sha256()
    for name, value in sorted(values.items()):
        if isinstance(value, torch.Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().double().numpy().tobytes())
        else:
            digest.update(f"{name} {value!r}".encode())
    return digest.hexdigest()


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
