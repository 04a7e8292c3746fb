"""What may stand in `--baselines`: `NAME[@STEPS][:solver]`."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ...loop.errors import UsageError, nearest
from ...loop.spec import MOST_STEPS

# Packages each engine needs, and the extra that brings them. All of them read the checkpoint with torch.
NEEDS: dict[str, tuple[tuple[str, ...], str]] = {
    "eager": (("torch", "diffusers"), "compile"),
    "compile": (("torch", "diffusers"), "compile"),
    "onnxruntime": (("torch", "diffusers", "onnx", "onnxscript"), "compile"),
    "onnxruntime-int8": (("torch", "diffusers", "onnx", "onnxscript"), "compile"),
    "onnxruntime-int8-reduced": (("torch", "diffusers", "onnx", "onnxscript"), "compile"),
    "openvino": (("torch", "diffusers", "openvino"), "openvino"),
    "openvino-bf16": (("torch", "diffusers", "openvino"), "openvino"),
    "openvino-int8": (("torch", "diffusers", "openvino", "nncf"), "openvino"),
}
ALIASES = {  # short names of diffusers schedulers
    "ddim": "DDIMScheduler",
    "deis": "DEISMultistepScheduler",
    "dpm": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}
LONGEST_STEPS = 20  # digits; Python converts no number of thousands of them
PATTERN = re.compile(r"(?P<engine>[^@:]+)(?:@(?P<steps>[0-9]+))?(?::(?P<solver>[A-Za-z0-9_+-]+))?")


@dataclass(frozen=True)
class Baseline:
    """One engine along one sampler.

    Attributes:
        name: the exact string that asked for it, the name of its row.
        engine: one of `NEEDS`.
        steps: number of steps of the sampler, or of evaluations of a cache; None takes those of the loop.
        solver: `ab2`, one of `ALIASES`, a diffusers scheduler class, or the cache `taylorseer_lite`; None takes that of the
            loop.
    """

    name: str
    engine: str
    steps: int | None = None
    solver: str | None = None

    @property
    def artifact(self) -> str:
        """The model file it shares: the bf16 hint is given when the fp32 model is opened."""
        return "openvino" if self.engine == "openvino-bf16" else self.engine

    @property
    def solver_class(self) -> str | None:
        """The diffusers class of the solver, or `ab2`; None for that of the loop."""
        return ALIASES.get(self.solver, self.solver) if self.solver else None

    @property
    def is_full_loop(self) -> bool:
        """Whether it runs the loop as the checkpoint says."""
        return self.steps is None and self.solver is None


def parse(text: str) -> Baseline:
    """Read one entry, such as `openvino-int8@15:ab2`.

    Raises:
        UsageError: another form, an unknown engine (the nearest is named) or an impossible number of steps.
    """
    match = PATTERN.fullmatch(text)
    if match is None:
        raise UsageError(f"--baselines: expected NAME[@STEPS][:solver], such as onnxruntime@13:ab2; received {text!r}.")
    engine, steps, solver = match["engine"], match["steps"], match["solver"]
    if engine not in NEEDS:
        raise UsageError(f"--baselines: unknown baseline {engine!r} in {text!r}; {nearest(engine, list(NEEDS))}")
    if steps is not None and (len(steps) > LONGEST_STEPS or not 1 <= int(steps) <= MOST_STEPS):
        raise UsageError(f"--baselines: expected 1 to {MOST_STEPS} steps; received {steps:.20} in {text!r:.80}.")
    return Baseline(text, engine, None if steps is None else int(steps), solver)


def parse_all(texts: Sequence[str]) -> list[Baseline]:
    """Read every entry, in order; one that is asked for twice gets one row. Raises as `parse` does."""
    return [parse(text) for text in dict.fromkeys(text.strip() for text in texts)]


def missing_packages(engine: str) -> str | None:
    """Why a baseline cannot run here and how to get it, or None; imports nothing."""
    packages, extra = NEEDS[engine]
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"needs {', '.join(missing)}: pip install 'stepfold[{extra}]'" if missing else None
