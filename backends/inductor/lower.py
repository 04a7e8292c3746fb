"""Lower stages for AOTInductor: a shared object with its weights, and a description of what it needs."""

from __future__ import annotations

import json
import logging
import platform
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._inductor.exc import CppCompileError, InductorError, InvalidCxxCompiler

from ...bundle.manifest import PortEntry
from ...ir.operators import RECORDS
from ...ir.program import Stage
from ...loop.errors import StepfoldError, UsageError
from ..export import export_again, lowered
from ..onnx.precision import at_precision
from ..ports import first_line
from .description import ObjectDescription
from .options import InductorOptions

logger = logging.getLogger(__name__)

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}

INTEGER_LAYERS = (torch.ops.stepfold.qlinear.default, torch.ops.stepfold.blocked_linear.default)

SETTINGS: dict[str, Any] = {
    "cpp.march": "",  # the sets of instructions that the description names, and no others of this processor
    "cpp.dynamic_threads": True,  # the number of threads is that of a session
    "aot_inductor.enable_line_tables": False,  # for debuggers
    "max_autotune": False,  # kernels that are chosen by timing differ from build to build
}


LOWERINGS: dict[Any, Callable[..., Any]] = {
    overload: record.reference for overload, record in RECORDS.items() if record.portable is None
}
"""Integer layers are computed in floats, see `_warn_of_float`."""


def prepare(stage: Stage, options: InductorOptions) -> Stage:
    """The stage as the engine computes it, still executable in PyTorch."""
    return at_precision(stage, PRECISIONS[options.precision])


def lower(stage: Stage, folder: Path, *, options: InductorOptions) -> Path:
    """Write the stage as `<name>.so` into a folder, its description beside it, and return the first.

    Raises:
        UsageError: there is no working C++ compiler.
        StepfoldError: an operator has no form in C++, the batch would be fixed, or compilation fails.
    """
    path = folder / f"{stage.name}.so"
    exported = export_again(stage, lowered(prepare(stage, options), LOWERINGS))
    _require_dynamic_batch(stage, exported)
    with tempfile.TemporaryDirectory(prefix="stepfold-") as scratch:
        target = Path(scratch) / path.name
        _compile(stage, exported, target)
        refuse_calls_back(stage, target)
        shutil.copyfile(target, path)
    _described(stage).write(path)
    _warn_of_float(stage)
    return path


def _warn_of_float(stage: Stage) -> None:
    count = sum(node.target in INTEGER_LAYERS for node in stage.graph.graph.nodes)
    if count:
        logger.warning(
            "stage %s: %d quantized layers are computed in float32, no faster than before: Inductor has no product of "
            "their integers. Take --backend onnxruntime or openvino for 8 bits, or --recipe fp32 here.",
            stage.name,
            count,
        )


def _compile(stage: Stage, exported: torch.export.ExportedProgram, target: Path) -> None:
    assert exported.example_inputs is not None
    arguments = exported.example_inputs[0]
    settings = {**SETTINGS, "aot_inductor.output_path": str(target)}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of PyTorch, about its own code
            torch._inductor.aot_compile(exported.module(check_guards=False), arguments, options=settings)
    except InvalidCxxCompiler as error:
        raise UsageError(
            f"backend inductor: {first_line(error)}. Install one, or name one in the variable CXX."
        ) from error
    except (InductorError, CppCompileError) as error:
        raise StepfoldError(f"stage {stage.name}: Inductor cannot compile it: {first_line(error)}") from error


def _require_dynamic_batch(stage: Stage, exported: torch.export.ExportedProgram) -> None:
    """The exporter fixes a size that an operator insists on, and says nothing."""
    for port, node in zip(stage.inputs, exported.graph.find_nodes(op="placeholder")[-len(stage.inputs) :], strict=True):
        size = node.meta["val"].shape[0] if port.shape[:1] == (None,) else None
        if isinstance(size, int):
            raise StepfoldError(
                f"stage {stage.name}: expected a dynamic batch; the exported graph takes {port.name!r} with batch "
                f"{size} only."
            )


def refuse_calls_back(stage: Stage, target: Path) -> None:
    """Raise StepfoldError where the object would call operators by name, which it does through a list of its own.

    PyTorch's loader would read that list, and unpickle the objects that it may name.
    """
    for path in target.parent.glob("*.json"):
        nodes = json.loads(path.read_text(encoding="utf-8")).get("nodes", [])
        if nodes:
            names = sorted({node.get("node", node).get("target", "unknown") for node in nodes})
            raise StepfoldError(
                f"stage {stage.name}: expected operators that Inductor has in C++; {', '.join(names)} would be called "
                "back by name. Choose another backend: --backend onnxruntime."
            )


def _described(stage: Stage) -> ObjectDescription:
    return ObjectDescription(
        torch=str(torch.__version__),
        system=sys.platform,
        machine=platform.machine(),
        instructions=_instructions(),
        inputs=tuple(PortEntry.of(port) for port in stage.inputs),
        outputs=tuple(PortEntry.of(port) for port in stage.outputs),
    )


def _instructions() -> tuple[str, ...]:
    """The sets of instructions that compiled code uses, as `torch.cpu.get_capabilities` names them.

    On x86 they follow from the flags of the compiler; elsewhere they are all that the processor has.
    """
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    able = torch.cpu.get_capabilities()
    flags = pick_vec_isa().build_arch_flags().split()
    if platform.machine() != "x86_64":
        return tuple(sorted(name for name, value in able.items() if value is True))
    names = {flag.removeprefix("-m").replace("-", "_").replace("avx512", "avx512_") for flag in flags}
    return tuple(sorted("fma3" if name == "fma" else name for name in names))
