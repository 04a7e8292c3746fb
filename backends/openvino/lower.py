"""Lower stages for OpenVINO."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import fx

from ...ir.names import module_path
from ...ir.operators import RECORDS
from ...ir.program import Stage, attribute
from ...loop.errors import StepfoldError
from ..exact import in_two_layers
from ..export import where
from ..onnx.blocks import BLOCKED_LINEAR, block_size, blocked_layers, in_blocks_of, matmul_nbits, rounds
from ..onnx.emit import emit
from ..onnx.precision import at_precision
from ..onnx.token_groups import GROUP_QLINEAR, by_token_groups, dynamic_widths, group_size
from ..quantizers import in_floats
from .blocks import BlockedSite, blocked_sites, misfits
from .options import OpenvinoOptions
from .precision import IntegerSite, float_sites, integer_sites
from .session import reason, settings_of

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
GROUP_STEP, LARGEST_GROUP = 16, 256
UNTRANSLATED = re.compile(r"No conversion rule found for operations: ([\w., -]+)")
GROUP_PROPERTY = "DYNAMIC_QUANTIZATION_GROUP_SIZE"
GIVEN_NAME = re.compile(r"[A-Za-z]\w*_\d+")  # Type_number, where the number counts operations of the process


def _quantize_static(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    return torch.onnx.ops.symbolic("QuantizeLinear", (x, scale, zero), dtype=zero.dtype, shape=x.shape, version=21)


def _dequantize(inputs: tuple[torch.Tensor, ...], **attributes: int) -> torch.Tensor:
    return torch.onnx.ops.symbolic(
        "DequantizeLinear", inputs, {**attributes}, dtype=torch.float32, shape=inputs[0].shape, version=21
    )


def _product(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """A float product in the graph; the engine computes it in integers."""
    product = x @ _dequantize((weight, weight_scale), axis=1)
    return product if bias is None else product + bias


def _qlinear(
    q: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    return _product(_dequantize((q, scale, zero)), weight, weight_scale, bias)


def _group_qlinear(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None, group: int
) -> torch.Tensor:
    """The group is not in the graph: it is a property of the whole model."""
    return _product(x, weight, weight_scale, bias)


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, scale: float) -> torch.Tensor:
    """With its head split and merge, which the engine takes into its kernel."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    merged = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)
    return merged.flatten(2)


LOWERINGS: dict[Any, Callable[..., Any]] = {
    torch.ops.stepfold.quantize_static.default: _quantize_static,
    torch.ops.stepfold.qlinear.default: _qlinear,
    GROUP_QLINEAR: _group_qlinear,
    BLOCKED_LINEAR: matmul_nbits,
    torch.ops.stepfold.attention.default: _attention,
}
INTEGER_LAYERS = (torch.ops.stepfold.qlinear.default, GROUP_QLINEAR)


def float_without_vnni(stage: Stage, options: OpenvinoOptions) -> bool:
    """Whether the stage rounds activations at run time, which the engine does on processors with VNNI only."""
    prepared = _grouped(stage)
    rounding = any(rounds(node) for node in blocked_layers(prepared))
    return rounding or bool(prepared.graph.graph.find_nodes(op="call_function", target=GROUP_QLINEAR))


def prepare(stage: Stage, options: OpenvinoOptions) -> Stage:
    """The stage as the engine computes it, still executable in PyTorch.

    Dynamic activation scales are those of groups of a token's features, and products in float have the precision.
    """
    return at_precision(_grouped(stage), PRECISIONS[options.precision])


def _grouped(stage: Stage) -> Stage:
    """The stage with one group for all activations that are quantized on their way into a product.

    Raises:
        StepfoldError: other layers with weights in blocks have float activations, which the group would round too.
    """
    widths = dynamic_widths(stage)
    blocks = [block_size(node) for node in blocked_layers(stage) if rounds(node)]
    stage = in_floats(stage)
    if not widths and not blocks:
        return in_two_layers(stage)
    exact = [node for node in blocked_layers(stage) if not rounds(node)]
    if exact:
        raise StepfoldError(
            f"stage {stage.name}: {where(exact[0])}: expected one kind of activations in all layers of a stage; received "
            f"float ones here and in {len(exact) - 1} more, and 8-bit ones in {len(widths) + len(blocks)}. Choose "
            "--set quantize.activations=float or dynamic for all."
        )
    group = _group_within(blocks, widths) if blocks else group_size(widths, GROUP_STEP, LARGEST_GROUP)
    return in_blocks_of(in_two_layers(by_token_groups(stage, group)), group)


def _group_within(blocks: list[int], widths: list[int]) -> int:
    """The largest group that ends where all blocks end, powers of two, and fits the other layers."""
    group = min(blocks)
    while group > GROUP_STEP and group > min(widths, default=group):
        group //= 2
    return group


def lower(stage: Stage, folder: Path, *, options: OpenvinoOptions) -> Path:
    """Write the stage as `<name>.xml` and `<name>.bin` into a folder and return the first.

    Raises:
        UsageError: the processor lacks the precision.
        StepfoldError: the stage has no ONNX form, OpenVINO cannot read it, or would compute a quantized layer otherwise
            than asked.
    """
    import openvino

    grouped = _grouped(stage)  # without the precision, which is a property of the session
    path = folder / f"{stage.name}.xml"
    with tempfile.TemporaryDirectory(prefix="stepfold-") as scratch:
        model = _read(stage, _emitted(grouped, Path(scratch)))
        group = _group(grouped)
        if group is not None:
            model.set_rt_info(group, ["runtime_options", GROUP_PROPERTY])  # read when the model is compiled
        _rename(model)
        openvino.save_model(model, path, compress_to_fp16=False)
    _require_quantized(grouped, path, group, options)
    return path


def _emitted(stage: Stage, folder: Path) -> Path:
    path = folder / f"{stage.name}.onnx"
    emit(stage, path, LOWERINGS)
    return path


def _group(stage: Stage) -> int | None:
    """The group of all activations that are quantized; 0 keeps them from being so, None where it has no meaning."""
    nodes = stage.graph.graph.find_nodes(op="call_function", target=GROUP_QLINEAR)
    groups = [node.args[4] for node in nodes] + [
        block_size(node) if rounds(node) else 0 for node in blocked_layers(stage)
    ]
    return groups[0] if groups else None  # type: ignore[return-value]


def _read(stage: Stage, file: Path) -> Any:
    """The `openvino.Model` of an ONNX file, as it is written: what pays is done when it is compiled."""
    import openvino

    try:
        return openvino.Core().read_model(file)
    except Exception as error:  # RuntimeError, and what the bindings raise
        refused = UNTRANSLATED.search(str(error))
        where = _places(file, refused[1]) if refused else ""
        raise StepfoldError(f"stage {stage.name}: {where}OpenVINO cannot read it: {reason(error)}") from error


def _places(file: Path, listed: str) -> str:
    """Where the first of the ONNX operations that were refused, as in `Det-23, Unique-11`, comes from."""
    kinds = {name.strip().rpartition("-")[0].rpartition(".")[2] for name in listed.split(",")}
    for node in onnx.load(file, load_external_data=False).graph.node:
        if node.op_type in kinds:
            properties = {entry.key.rpartition(".")[2]: entry.value for entry in node.metadata_props}
            scopes = re.findall(r"'([^']*)'", properties.get("name_scopes", ""))
            module = scopes[-2] if len(scopes) > 1 else ""
            lines = [line.strip() for line in properties.get("stack_trace", "").splitlines() if line.strip()]
            return f"node {node.name} ({module or 'top level'}; {lines[-1] if lines else 'no source line'}): "
    return ""


def _rename(model: Any) -> None:
    """Number the operations without a name of their own within the model, so that the same stage gives the same file."""
    for i, operation in enumerate(model.get_ordered_ops()):
        named = any(output.names for output in operation.outputs())  # by the stage, perhaps with a number at the end
        if not named and GIVEN_NAME.fullmatch(operation.get_friendly_name()):
            operation.set_friendly_name(f"{operation.get_type_name()}_{i}")


def _require_quantized(stage: Stage, path: Path, group: int | None, options: OpenvinoOptions) -> None:
    """Compile the written file for this processor and ask what its quantized layers compute."""
    import openvino

    modules = {
        _weight_of(node): module_path(node)
        for node in stage.graph.graph.nodes
        if node.target in (*INTEGER_LAYERS, BLOCKED_LINEAR)
    }
    if not modules:
        return
    core = openvino.Core()
    settings = settings_of(core, None, options)
    model = core.read_model(path)
    compiled = core.compile_model(model, "CPU", settings)
    _require_blocks(stage, modules, compiled, blocked_sites(model), settings, group or 0)
    _require_integers(stage, modules, compiled, integer_sites(model), settings, group or GROUP_STEP)


def _weight_of(node: fx.Node) -> str:
    """The name of the weight that a quantized layer reads."""
    return str(node.args[RECORDS[node.target].weight].target)  # type: ignore[index, union-attr]


def _require_integers(
    stage: Stage,
    modules: dict[str, str],
    compiled: Any,
    sites: list[IntegerSite],
    settings: dict[str, Any],
    group: int,
) -> None:
    """Raise StepfoldError where a layer with weights in 8 bits is not a product of integers."""
    layers = [node for node in stage.graph.graph.nodes if node.target in INTEGER_LAYERS]
    weights = {_weight_of(node) for node in layers}
    found = float_sites(compiled, sites, settings, group)
    found |= {weight: "it is not in the model" for weight in _lost(stage, weights, {site.weight for site in sites})}
    if found:
        weight, why = next(iter(found.items()))
        raise StepfoldError(
            f"stage {stage.name}: layer {modules.get(weight, weight)}: expected a product of 8-bit integers; OpenVINO "
            f"would compute it in float: {why} ({len(found)} of {len(weights)} layers). Leave the layers "
            "out with --set quantize.skip=[...], or choose other scales with --set quantize.activations: symmetric ones "
            "are stored, dynamic ones belong to tokens; those that change with the timestep are not for this engine."
        )


def _lost(stage: Stage, weights: set[str], found: set[str]) -> set[str]:
    """The weights that a model has neither under their names nor under that of an equal one, which it stores once."""
    kept = [attribute(stage.graph, name) for name in weights & found]
    return {
        name
        for name in weights - found
        if not any(torch.equal(attribute(stage.graph, name), tensor) for tensor in kept)
    }


def _require_blocks(
    stage: Stage,
    modules: dict[str, str],
    compiled: Any,
    sites: list[BlockedSite],
    settings: dict[str, Any],
    group: int,
) -> None:
    """Raise StepfoldError where a layer with weights in blocks is computed otherwise than asked."""
    layers = {str(node.args[1].target): rounds(node) for node in blocked_layers(stage)}  # type: ignore[union-attr]
    rounded = frozenset(weight for weight, rounded in layers.items() if rounded)
    found = misfits(compiled, sites, rounded, settings, group)
    found |= {weight: "it is not in the model" for weight in _lost(stage, set(layers), {s.weight for s in sites})}
    if found:
        weight, why = next(iter(found.items()))
        expected = "rounded to 8 bits" if weight in rounded else "in float"
        raise StepfoldError(
            f"stage {stage.name}: layer {modules.get(weight, weight)}: expected weights in blocks and activations "
            f"{expected}; OpenVINO would compute it otherwise: {why} ({len(found)} of {len(layers)} layers). Leave the "
            "layers out with --set quantize.skip=[...], or choose --set quantize.activations=float or dynamic."
        )
