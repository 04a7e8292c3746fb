"""The hash of everything in a stage that a lowering can read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from .program import Stage

NAMED = (torch.dtype, torch.device, torch.layout, torch.memory_format)
PLAIN = (type(None), bool, int, float, complex, str, type(...))


class UnknownValueError(Exception):
    """A graph holds a value whose text does not say what it is."""


def stage_digest(stage: Stage) -> str | None:
    """SHA-256 over name, rate, ports, nodes and weights of a stage; None where a node holds something unknown.

    Of a node: name, operator, arguments, the shape and type of its value, and its place in the model's source, which
    engine files repeat. The calls at which a variant runs are the driver's affair.
    """
    digest = hashlib.sha256()
    try:
        for line in _lines(stage):
            digest.update(line.encode() + b"\n")
        for name, tensor in sorted(stage.tensors().items()):
            add_tensor(digest, name, tensor)
    except UnknownValueError:
        return None
    return digest.hexdigest()


def add_tensor(digest: Any, name: str, tensor: torch.Tensor) -> None:
    """Add the name, dtype, shape and bytes of a tensor to a hash."""
    if not isinstance(tensor, torch.Tensor):
        raise UnknownValueError(name)
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)  # a scalar has no bytes view before it is flattened
    digest.update(flat.view(torch.uint8).numpy().data)


def _lines(stage: Stage) -> Iterator[str]:
    yield f"{stage.name} {stage.rate}"
    yield from (f"input {port}" for port in stage.inputs)
    yield from (f"output {port}" for port in stage.outputs)
    for node in stage.graph.graph.nodes:
        yield f"{node.op} {node.name} {_target(node)} {_text(node.args)} {_text(node.kwargs)}"
        yield f"{_text(node.meta.get('shape'))} {_value(node.meta.get('val'))}"
        yield f"{_modules(node)} {node.meta.get('stack_trace')}"


def _target(node: fx.Node) -> str:
    """The operator by a name that is the same in every process."""
    target = node.target
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    name = getattr(target, "__qualname__", None)
    if name is None or "<" in name:  # a lambda, or a function within another
        raise UnknownValueError(str(target))
    return f"{target.__module__}.{name}"


def _text(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, PLAIN):
        return repr(value)
    if isinstance(value, NAMED):
        return str(value)
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_text(item)}' for key, item in value.items())}}}"
    if isinstance(value, slice):
        return f"slice{_text((value.start, value.stop, value.step))}"
    raise UnknownValueError(repr(value))


def _value(value: Any) -> str:
    """What a node computes, without its content."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {tuple(value.shape)} {value.stride()}"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_value, value))}]"
    return str(value)


def _modules(node: fx.Node) -> str:
    """The modules a node came from; the keys of this entry are names of one process."""
    entries = (node.meta.get("nn_module_stack") or {}).values()
    return ", ".join(f"{path} {getattr(kind, '__qualname__', kind)}" for path, kind in entries)
