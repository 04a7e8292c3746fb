"""The recorded probe: one evaluation of the compiled program, replayed by `verify`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ..loop.errors import BundleError
from ..loop.metrics import drift

Array = np.ndarray
PROBE = "probe.safetensors"

# Largest drift of a replay, by the lowest precision of the stages. Engines choose other kernels, and sum in another
# order, on another processor; dynamic int8 also rounds some activations to the neighbouring level.
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2, "int8": 5e-2, "uint8": 5e-2}


@dataclass(frozen=True, eq=False)
class Probe:
    """Inputs and outputs of one evaluation.

    Attributes:
        inputs: name -> [B, ...] for every program input.
        outputs: name -> [B, ...] for every program output.
        tolerance: largest relative L2 error of a replay, see `TOLERANCE`.
        call: grid call of the evaluation, for programs with `values` tables.
        unconditional: name -> [B, ...] conditions of the other guidance branch for the same rows, where a pipeline gave
            them; what fits and measures the bundle again takes them from here.
    """

    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]
    tolerance: float
    call: int | None = None
    unconditional: Mapping[str, Array] = field(default_factory=dict)

    def arrays(self) -> dict[str, Array]:
        """The probe as named arrays."""
        found = {f"inputs/{name}": value for name, value in self.inputs.items()}
        found |= {f"outputs/{name}": value for name, value in self.outputs.items()}
        found |= {f"unconditional/{name}": value for name, value in self.unconditional.items()}
        found["tolerance"] = np.asarray([self.tolerance], np.float64)
        if self.call is not None:
            found["call"] = np.asarray([self.call], np.int64)
        return found

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> Probe:
        """Rebuild a probe from `arrays()`; raises BundleError when parts are missing."""
        inputs, outputs, unconditional = (
            {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
            for prefix in ("inputs/", "outputs/", "unconditional/")
        )
        if not inputs or not outputs or "tolerance" not in arrays:
            raise BundleError(f"{PROBE}: expected inputs, outputs and a tolerance; received {sorted(arrays)}.")
        tolerance, call = arrays["tolerance"], arrays.get("call")
        if tolerance.shape != (1,) or not 0 < float(tolerance[0]) < np.inf:
            raise BundleError(f"{PROBE}: expected one tolerance above 0; received {tolerance.tolist()!r:.60}.")
        if call is not None and (call.shape != (1,) or call.dtype.kind != "i"):
            raise BundleError(f"{PROBE}: expected the number of one call; received {call.tolist()!r:.60}.")
        unfit = [name for name, value in arrays.items() if not np.isfinite(value).all()]
        if unfit:
            raise BundleError(f"{PROBE}: expected finite values; received others in {unfit[0]!r}.")
        return cls(inputs, outputs, float(tolerance[0]), None if call is None else int(call[0]), unconditional)

    def differences(self, received: Mapping[str, Array]) -> list[str]:
        """What of a replay is not as recorded, one line an output."""
        found = []
        for name, expected in self.outputs.items():
            got = received.get(name)
            if got is None or got.shape != expected.shape:
                shape = None if got is None else list(got.shape)
                found.append(f"probe: expected {name} of shape {list(expected.shape)}; received {shape}.")
                continue
            error = drift(got, expected)
            if not error <= self.tolerance:
                found.append(
                    f"probe: expected {name} within {self.tolerance:g} of the recorded values; received drift "
                    f"{error:.3g}. The engine here computes something else: build the bundle again on this machine."
                )
        return found
