"""`tables.safetensors`: the recurrence, the fitted plans and the values that depend on the timestep only.

| key | what |
|---|---|
| `recurrence/...` | the sampler over S calls; folding it with any guidance scale gives an unfitted plan |
| `full/...` | that plan with the guidance left open: its weights are those of guided outputs |
| `scale=<scale>/...` | the fitted plan of one guidance scale; 1.0 for a loop without guidance |
| `values/<name>` | [S, ...] a value of rate `timestep` for every grid call |
| `constants/<name>` | a tensor that was baked in at capture, to compare an argument with |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ..loop.errors import BundleError
from ..loop.plan import Plan, fold
from ..loop.recurrence import Recurrence

Array = np.ndarray
TABLES = "tables.safetensors"
SCALE = "scale="


@dataclass(frozen=True, eq=False)
class Tables:
    """The arrays of a bundle beside its stages.

    Attributes:
        recurrence: the sampler, None for a component.
        fitted: guidance scale -> plan; key 1.0 for a loop without guidance.
        values: name -> [S, ...], values of rate `timestep` for every grid call.
        constants: name -> tensor baked in at capture; the manifest has the constants that are no tensors.
    """

    recurrence: Recurrence | None = None
    fitted: Mapping[float, Plan] = field(default_factory=dict)
    values: Mapping[str, Array] = field(default_factory=dict)
    constants: Mapping[str, Array] = field(default_factory=dict)

    def arrays(self) -> dict[str, Array]:
        """All of it as named arrays."""
        found = {f"values/{name}": value for name, value in self.values.items()}
        found |= {f"constants/{name}": value for name, value in self.constants.items()}
        if self.recurrence is not None:
            found |= _prefixed("recurrence", self.recurrence.arrays())
            found |= _prefixed("full", fold(self.recurrence).arrays())
        for scale, plan in self.fitted.items():
            found |= _prefixed(f"{SCALE}{float(scale)!r}", plan.arrays())
        return found

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> Tables:
        """Rebuild the tables from `arrays()`.

        Raises:
            BundleError: an array is missing, has another shape, or reads outputs that do not exist yet.
        """
        groups: dict[str, dict[str, Array]] = {}
        for key, value in arrays.items():
            group, _, name = key.partition("/")
            groups.setdefault(group, {})[name] = value
        try:
            recurrence = Recurrence.from_arrays(groups["recurrence"]) if "recurrence" in groups else None
            fitted = {
                float(group.removeprefix(SCALE)): Plan.from_arrays(members)
                for group, members in groups.items()
                if group.startswith(SCALE)
            }
        except (KeyError, ValueError, IndexError, TypeError) as error:
            raise BundleError(f"{TABLES}: expected complete plans; received an unusable one: {error}.") from error
        tables = cls(recurrence, fitted, groups.get("values", {}), groups.get("constants", {}))
        tables.check()
        return tables

    def check(self) -> None:
        """Raise BundleError when the tables do not belong to the recurrence."""
        S = self.recurrence.calls if self.recurrence is not None else 0
        if self.recurrence is not None and not _finite(self.recurrence.arrays()):
            raise BundleError(f"{TABLES}: the recurrence has values that are not finite.")
        for scale, plan in self.fitted.items():
            reason = _misfit(plan, self.recurrence)
            if reason is not None:
                raise BundleError(f"{TABLES}: the plan of guidance scale {scale} {reason}.")
        for name, value in self.values.items():
            if value.shape[:1] != (S,):
                raise BundleError(f"{TABLES}: values/{name} must have {S} rows; received shape {list(value.shape)}.")
        if not _finite(self.values):
            raise BundleError(f"{TABLES}: the values of the calls are not all finite.")


def _misfit(plan: Plan, recurrence: Recurrence | None) -> str | None:
    """Why a plan cannot drive the loop of a sampler, or None."""
    if recurrence is None:
        return "has no sampler"
    N, S = plan.evaluations, recurrence.calls
    positions = plan.positions
    if (
        positions.dtype.kind != "i"
        or N == 0
        or positions[0] != 0
        or (np.diff(positions) <= 0).any()
        or positions[-1] >= S
    ):
        return f"needs positions that ascend from 0 below {S}; received {positions.tolist()}"
    if plan.draws != recurrence.draws:
        return f"weighs {plan.draws} draws of noise; the sampler makes {recurrence.draws}"
    if (plan.prediction is None) != (recurrence.prediction is None):
        return "and its sampler differ in whether they bound what they predict"
    if not _finite(plan.arrays()):
        return "has values that are not finite"
    return None


def _finite(arrays: Mapping[str, Array]) -> bool:
    return all(np.isfinite(array).all() for array in arrays.values())


def _prefixed(prefix: str, arrays: Mapping[str, Array]) -> dict[str, Array]:
    return {f"{prefix}/{name}": value for name, value in arrays.items()}
