"""The frozen-dimension report: which sizes a captured graph is fixed to, and what fixed them.

Only the batch of a captured graph is dynamic. Which of the other sizes the model itself demands, and in which line,
shows a run of the model on symbolic sizes: an equality it guards on pins the sizes in it.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..ir.program import FrozenDimension
from ..loop.ports import Port
from .calling import Calling

logger = logging.getLogger(__name__)

BY_EXAMPLE = "the example: the model takes other sizes, this capture does not"
BY_CONSTANT = "a constant argument of the capture"
# What tracing a model on symbolic sizes can raise; the report then says so.
TRACING_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)

Dimension = tuple[str, int]  # input, dimension


def frozen_dimensions(
    calling: Calling, example: Mapping[str, torch.Tensor], ports: Sequence[Port]
) -> tuple[FrozenDimension, ...]:
    """Every size of an input that the graph is fixed to, in input order.

    Args:
        calling: the captured call.
        example: its inputs.
        ports: the ports of the graph; None marks what stayed dynamic.
    """
    try:
        pinned = pinning_lines(calling, example)
        unpinned = BY_EXAMPLE
    except TRACING_ERRORS as error:
        logger.info("no run on symbolic sizes: %s", error)
        pinned = {}
        unpinned = f"the example (the model does not run on symbolic sizes: {type(error).__name__})"
    return tuple(
        FrozenDimension(port.name, dimension, size, pinned.get((port.name, dimension), unpinned))
        for port in ports
        for dimension, size in enumerate(port.shape)
        if size is not None
    )


def baked_constants(constants: Mapping[str, Any]) -> tuple[FrozenDimension, ...]:
    """Sizes given as numbers in lists, such as the image shapes of QwenImage: `dimension` is the place in the list."""
    found = []
    for name, value in constants.items():
        parent, _, place = name.rpartition(".")
        if place.isdigit() and isinstance(value, int) and not isinstance(value, bool):
            found.append(FrozenDimension(parent, int(place), value, BY_CONSTANT))
    return tuple(found)


def pinning_lines(calling: Calling, example: Mapping[str, torch.Tensor]) -> dict[Dimension, str]:
    """For each size the model demands, the module and line that does so.

    The model is copied without its weights and run on fake tensors with a symbol for every size but the first; each
    guard belongs to the innermost module that was running.
    """
    from torch._dispatch.python import enable_python_dispatcher
    from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment, allow_non_fake_inputs=True)
    mode.cache_enabled = False  # of results by shape: to compare symbolic shapes takes longer than to compute again
    with FakeCopyMode(mode):
        fake = copy.deepcopy(calling)
    fake.latent = None  # the comparison with the latent's shape is ours, not the model's
    owners = _record_owners(fake, environment)
    inputs = {name: _symbolic(mode, name, value) for name, value in example.items()}
    with mode, enable_python_dispatcher(), torch.no_grad():
        fake(*inputs.values())
    symbols = {
        size.node._expr: (name, dimension)
        for name, value in inputs.items()
        for dimension, size in enumerate(value.shape)
        if isinstance(size, torch.SymInt)
    }
    return _first_pins(environment.guards, owners, symbols)


def _symbolic(mode: Any, name: str, value: torch.Tensor) -> torch.Tensor:
    from torch._dynamo.source import LocalSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    sizes = [DimDynamic.DYNAMIC if dimension else DimDynamic.STATIC for dimension in range(value.ndim)]
    return mode.from_tensor(
        value, source=LocalSource(name), symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes)
    )


def _record_owners(fake: Calling, environment: Any) -> list[str]:
    """A list that grows with the guards: for each the innermost module that ran when it was made."""
    owners: list[str] = []
    running = [""]

    def attribute() -> None:
        owners.extend([running[-1]] * (len(environment.guards) - len(owners)))

    def enter(text: str) -> None:
        attribute()
        running.append(text)

    def leave() -> None:
        attribute()
        running.pop()

    for path, module in fake.model.named_modules():
        text = f"{path} ({type(module).__name__})" if path else type(module).__name__
        module.register_forward_pre_hook(lambda *_, text=text: enter(text))
        module.register_forward_hook(lambda *_: leave())
    return owners


def _first_pins(guards: Sequence[Any], owners: Sequence[str], symbols: Mapping[Any, Dimension]) -> dict[Dimension, str]:
    import sympy

    pinned: dict[Dimension, str] = {}
    for guard, owner in zip(guards, [*owners, *[""] * len(guards)], strict=False):
        expression = guard.expr
        if not isinstance(expression, sympy.Eq) or not expression.rhs.is_number:
            continue
        if any(type(part).__name__ in ("Mod", "PythonMod") for part in sympy.preorder_traversal(expression)):
            continue  # a multiple, not one size
        for symbol in expression.free_symbols:
            if symbol in symbols:
                pinned.setdefault(symbols[symbol], _where(owner, str(guard.sloc)))
    return pinned


def _where(owner: str, location: str) -> str:
    """The module, with the line in the model's own code; lines inside PyTorch say nothing to a user."""
    line = location.strip("()")
    in_pytorch = line.startswith(("_", "torch/", "functional.py", "utils/", "nn/", "fx/", "overrides.py"))
    return " at ".join(part for part in (owner, "" if in_pytorch else line) if part)
