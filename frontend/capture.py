"""Capture a PyTorch module as a Program of one stage.

`torch.export` keeps the composite operators (`run_decompositions(decomp_table={})`): linear, attention, norms and
convolutions stay whole. The graph is then unlifted (weights are attributes), its assertions are removed and become
the frozen-dimension report, and the rewrites of `stepfold.frontend.repairs` mend what engines refuse.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from ..ir.program import FrozenDimension, ModelIdentity, Program, Stage, slots_of
from ..ir.shapes import port, propagate
from ..loop.calls import instance, named, text
from ..loop.classes import check_unconditional
from ..loop.errors import StepfoldError, UsageError, nearest
from ..loop.ports import InputPort, Port, Rate
from ..loop.recurrence import Recurrence
from ..loop.spec import LoopSpec, Role
from .calling import Calling, flatten, in_signature_order
from .dense import dense, dense_arguments
from .detached import DataAsDetached
from .frozen import baked_constants, frozen_dimensions
from .identity import weights_hash
from .normalize import normalize
from .quantizers import plain_quantizers
from .repairs import repair
from .sampler import probe

logger = logging.getLogger(__name__)

EXAMPLE_BATCH = 2  # torch.export specializes sizes 0 and 1


def capture(
    model: torch.nn.Module,
    kwargs: Mapping[str, Any],
    loop: LoopSpec | None = None,
    *,
    method: str = "forward",
    identity: ModelIdentity | None = None,
) -> Program:
    """Capture a module as it is called.

    Args:
        model: any module `torch.export` takes; it is put into evaluation mode.
        kwargs: keyword arguments as its forward gets them: tensors with a leading batch, nested lists and
            dictionaries of tensors (their names are joined by dots), constants (baked in). With a loop, tensors
            whose role is `constant` have no batch and are baked in too.
        loop: roles of the inputs and the sampler around the module; None captures a component.
        method: the method of the module to capture.
        identity: class and weights hash of the model when the caller knows them.

    Raises:
        UsageError: a tensor has no declared role, or a declared input is missing.
        StepfoldError: `torch.export` refuses the module, or the graph cannot serve another batch size; the message
            says where.
    """
    instance("model", model, torch.nn.Module, "a PyTorch module")
    kwargs = named("kwargs", kwargs)
    if loop is not None:
        instance("loop", loop, LoopSpec, "a LoopSpec or None")
    if not callable(getattr(model, text("method", method), None)):
        raise UsageError(
            f"method: {type(model).__name__} has no method {method!r}; {nearest(method, dir(type(model)))}"
        )
    recurrence = probe(loop.sampler) if loop is not None else None  # refuses a sampler before the model is captured
    if loop is not None and recurrence is not None:
        loop = with_draws(loop, recurrence.draws)
        recurrence = with_strength(recurrence, loop)
    if method == "forward":
        model, kwargs = dense(model), dense_arguments(model, kwargs)
    kwargs = in_signature_order(getattr(model, method), kwargs)
    tensors, constants = flatten(kwargs)
    roles = _roles(list(tensors), loop)
    example = _example(tensors, roles, loop)
    calling = Calling(model.eval(), method, kwargs, list(example), loop.latent.shape if loop else None)
    example = _with_rows(calling, example)
    with plain_quantizers(model):
        graph, names = normalize(export(calling, example, type(model).__name__))
        stage = _stage(graph, names, example, roles, loop)
        frozen = frozen_dimensions(calling, example, stage.inputs) + baked_constants(constants)
    identity = identity or ModelIdentity(type(model).__name__, weights_hash(model))
    inputs = tuple(InputPort(p, roles[p.name], _cardinality(graph, i)) for i, p in enumerate(stage.inputs))
    _check_indices(example, inputs)
    if loop is not None:
        check_unconditional(inputs, loop)
    baked = constants | {name: tensor for name, tensor in tensors.items() if name not in example}
    return _program(stage, inputs, example, identity, loop, recurrence, frozen, baked)


def with_strength(recurrence: Recurrence, loop: LoopSpec) -> Recurrence:
    """The recurrence with how much of the guidance each call has.

    Raises:
        UsageError: the loop says it for another number of calls.
    """
    strength = loop.guidance.strength if loop.guidance is not None else None
    if strength is None:
        return recurrence
    if len(strength) != recurrence.calls:
        raise UsageError(
            f"guidance.strength: expected a number for each of the {recurrence.calls} calls of the sampler; received "
            f"{len(strength)}. Correct loop.yaml."
        )
    return recurrence.guided_by(strength)


def with_draws(loop: LoopSpec, draws: int) -> LoopSpec:
    """The loop with the number of draws that its sampler makes.

    Raises:
        UsageError: it says another number.
    """
    if "draws" in loop.model_fields_set and loop.draws != draws:
        raise UsageError(
            f"draws: the sampler draws noise {draws} times on its way; the loop says {loop.draws}. Leave it out."
        )
    return loop.model_copy(update={"draws": draws})


def _with_rows(calling: Calling, example: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors without dimensions with a row for each sample, where the model makes the same of that."""
    single = [name for name, value in example.items() if value.ndim == 0]
    if not single:
        return example
    rows = _batch_size(example)
    spread = {name: value if value.ndim else value.expand(rows).clone() for name, value in example.items()}
    with torch.no_grad():
        try:
            given = calling(*example.values()).values()
        except (RuntimeError, TypeError, ValueError, IndexError):
            return spread  # the call itself is wrong, which the export tells with the model's own words
        try:
            pairs = zip(given, calling(*spread.values()).values(), strict=True)
            same = all(one.shape == other.shape and torch.allclose(one, other) for one, other in pairs)
        except (RuntimeError, TypeError, ValueError, IndexError):
            same = False
    if not same:
        raise UsageError(
            f"input {single[0]!r}: expected a tensor with a leading batch; received one without dimensions, and the model "
            "makes something else of a row for each sample. Give it as a number, which is baked in."
        )
    return spread


def _check_indices(example: Mapping[str, torch.Tensor], inputs: Sequence[InputPort]) -> None:
    """Refuse example indices outside the table that they read, which no capture notices."""
    for item in inputs:
        value = example[item.name]
        if item.cardinality is not None and not bool(((value >= 0) & (value < item.cardinality)).all()):
            raise UsageError(
                f"input {item.name!r}: expected indices from 0 to {item.cardinality - 1} in the example; received "
                f"{value.min().item()} to {value.max().item()}."
            )


def _roles(names: list[str], loop: LoopSpec | None) -> dict[str, Role]:
    """The role of each tensor; a nested one takes that of the argument it belongs to."""
    if loop is None:
        return dict.fromkeys(names, "condition")
    roles: dict[str, Role] = {}
    for name in names:
        spec = loop.inputs.get(name) or loop.inputs.get(name.split(".")[0])
        if spec is None:
            raise UsageError(
                f"input {name!r} is a tensor without a role. Add `{name}: condition` (or `constant`) to the inputs of "
                f"loop.yaml; declared: {', '.join(loop.inputs)}."
            )
        roles[name] = spec.role
    arguments = {name.split(".")[0] for name in names}
    for name in loop.inputs:
        if name not in roles and name not in arguments:
            raise UsageError(f"input {name!r} of the loop has no example tensor; {nearest(name, names)}")
    return roles


def _example(
    tensors: Mapping[str, torch.Tensor], roles: Mapping[str, Role], loop: LoopSpec | None
) -> dict[str, torch.Tensor]:
    """The tensors a caller supplies, each with a leading batch of at least two (a component may have others)."""
    supplied = {name: value for name, value in tensors.items() if roles[name] != "constant"}
    leading = next((n for n in supplied if roles[n] == "state"), None) if loop else next(iter(supplied), None)
    if leading is None or tensors[leading].ndim == 0:
        raise UsageError("capture: expected an example tensor with a leading batch dimension; received none.")
    batch = tensors[leading].shape[0]
    size = max(batch, EXAMPLE_BATCH)
    example = {name: _batched(value, batch, size, roles[name]) for name, value in supplied.items()}
    wrong = [n for n, v in example.items() if loop and (v.ndim == 0 or v.shape[0] != size)]
    if wrong:
        raise UsageError(
            f"input {wrong[0]!r} has shape {list(tensors[wrong[0]].shape)}; expected a leading batch of {batch}, as "
            f"the latent has. A tensor without a batch that never changes has the role `constant`."
        )
    return example


def _batched(value: torch.Tensor, batch: int, size: int, role: Role) -> torch.Tensor:
    if value.ndim == 0 and role == "timestep":
        return value.expand(size).clone()
    if batch < size and value.ndim > 0 and value.shape[0] == batch:
        return value.repeat(size // batch, *(1,) * (value.ndim - 1))
    return value


def export(calling: Calling, example: Mapping[str, torch.Tensor], name: str) -> torch.export.ExportedProgram:
    """Export a call with a dynamic batch, composite operators kept.

    Args:
        calling: the call.
        example: its inputs; every one whose first size is that of the first input has a batch [B, ...].
        name: name of the model, for the message.

    Raises:
        UsageError: the module itself does not run with this call.
        StepfoldError: `torch.export` refuses the module.
    """
    size = _batch_size(example)
    dynamic = tuple(
        {0: torch.export.Dim.AUTO} if value.ndim and value.shape[0] == size else None for value in example.values()
    )
    try:
        with torch.no_grad(), _quiet(), DataAsDetached():
            exported = torch.export.export(calling, tuple(example.values()), dynamic_shapes=(dynamic,), strict=False)
            return exported.run_decompositions(decomp_table={})
    except (MemoryError, UsageError):
        raise
    except Exception as error:
        _require_runs(calling, example, name)
        raise StepfoldError(f"{name}: torch.export could not capture this model: {_first_line(error)}") from error


def _require_runs(calling: Calling, example: Mapping[str, torch.Tensor], name: str) -> None:
    """Tell a call that the model itself refuses, which its caller can mend, from a model that export refuses."""
    try:
        with torch.no_grad():
            calling(*example.values())
    except MemoryError:
        raise
    except Exception as error:
        given = ", ".join(f"{n} {list(v.shape)} {str(v.dtype).removeprefix('torch.')}" for n, v in example.items())
        raise UsageError(
            f"{name}: expected inputs and a configuration that the model runs with; it was called with {given}, and "
            f"fails: {_first_line(error)} Correct loop.yaml, --inputs or config.json."
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without PyTorch's own account of a failure, a traceback, and its warnings about itself."""
    fake = logging.getLogger("torch._subclasses.fake_tensor")
    level = fake.level
    fake.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        fake.setLevel(level)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _stage(
    graph: fx.GraphModule,
    names: list[str],
    example: Mapping[str, torch.Tensor],
    roles: Mapping[str, Role],
    loop: LoopSpec | None,
) -> Stage:
    inputs = input_ports(graph, example)
    _require_batch(inputs, example)
    try:
        with _quiet():
            propagate(graph, inputs)
    except RuntimeError as error:
        raise StepfoldError(
            f"the model fixes its batch: the captured graph runs at the batch of the example only: {_first_line(error)}"
        ) from error
    repair(graph, inputs)
    graph = fx.GraphModule(graph, graph.graph)  # keeps only the weights that are still read
    nodes = list(graph.graph.output_node().args[0])  # type: ignore[arg-type]
    outputs = tuple(port(node, name) for node, name in zip(nodes, names, strict=True))
    if loop is not None and outputs[0].shape != (None, *loop.latent.shape):
        raise UsageError(
            f"latent.shape of the loop is {list(loop.latent.shape)}, but the model returns "
            f"{list(outputs[0].shape[1:])} for each sample; the prediction must have the latent's shape."
        )
    return Stage("step" if loop else "forward", Rate.of(roles.values()), graph, inputs, outputs)


def _require_batch(inputs: tuple[Port, ...], example: Mapping[str, torch.Tensor]) -> None:
    size = _batch_size(example)
    for item in inputs:
        if item.shape and item.shape[0] == size and example[item.name].shape[0] == size:
            raise StepfoldError(
                f"input {item.name!r}: the model fixes its batch to {size}; expected one that serves any batch. A tensor "
                "without a batch that never changes has the role `constant`."
            )


def _batch_size(example: Mapping[str, torch.Tensor]) -> int:
    return next(iter(example.values())).shape[0]


def input_ports(graph: fx.GraphModule, example: Mapping[str, torch.Tensor]) -> tuple[Port, ...]:
    """The ports of a captured graph, in order: None where export kept the size dynamic."""
    placeholders = graph.graph.find_nodes(op="placeholder")
    ports = []
    for node, (name, value) in zip(placeholders, example.items(), strict=True):
        sizes = tuple(None if not isinstance(size, int) else size for size in node.meta["val"].shape)
        ports.append(Port(name, sizes, str(value.dtype).removeprefix("torch.")))
    return tuple(ports)


def _cardinality(graph: fx.GraphModule, index: int) -> int | None:
    """How many rows the embedding table has that this input indexes, if it does."""
    node = graph.graph.find_nodes(op="placeholder")[index]
    tables = [user for user in node.users if user.target is torch.ops.aten.embedding.default and user.args[1] is node]
    sizes = [user.args[0].meta["val"].shape[0] for user in tables]  # type: ignore[union-attr]
    return min(sizes) if sizes else None


def _program(
    stage: Stage,
    inputs: tuple[InputPort, ...],
    example: Mapping[str, torch.Tensor],
    identity: ModelIdentity,
    loop: LoopSpec | None,
    recurrence: Recurrence | None,
    frozen: tuple[FrozenDimension, ...],
    constants: Mapping[str, Any],
) -> Program:
    return Program(
        slots=slots_of(stage),
        inputs=inputs,
        outputs=tuple(item.name for item in stage.outputs),
        example=dict(example),
        model=identity,
        loop=loop,
        recurrence=recurrence,
        frozen=frozen,
        constants=dict(constants),
    )
