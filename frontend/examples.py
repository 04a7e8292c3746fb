"""Example keyword arguments of a model: from the loop's description, from a file of tensors, or from a short table."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..loop.array_files import tensor_entries
from ..loop.errors import UsageError, nearest
from ..loop.reading import Expected, opened
from ..loop.spec import ComponentFile, InputSpec, LoopSpec
from ..loop.values import array_of

EXAMPLES = Expected("a safetensors file of example inputs")
DTYPES = ("F32", "F16", "BF16", "F64", "I64", "I32", "I16", "I8", "U8", "BOOL")
DEEPEST_NAME = 8  # parts of a nested name
BATCH = 2
TIMESTEP = 500.0  # in scheduler units, the middle of the usual 1000

# Text encoders: architecture -> the key of the configuration that holds the longest prompt, and the inputs.
TEXT_ENCODERS = {
    "BertModel": ("max_position_embeddings", ("input_ids", "attention_mask")),
    "CLIPTextModel": ("max_position_embeddings", ("input_ids",)),
    "CLIPTextModelWithProjection": ("max_position_embeddings", ("input_ids",)),
    "DistilBertModel": ("max_position_embeddings", ("input_ids", "attention_mask")),
    "T5EncoderModel": ("n_positions", ("input_ids",)),
    "UMT5EncoderModel": ("n_positions", ("input_ids",)),
}


TOKENS = {"input_ids": ("B", "T"), "attention_mask": ("B", "T")}
"""Inputs of text encoders whose shape is known."""


def example_kwargs(
    model: torch.nn.Module,
    method: str,
    description: LoopSpec | ComponentFile | None,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
) -> dict[str, Any]:
    """Keyword arguments for one call: with a row for each row of `tensors`, at least two.

    Args:
        model: the network.
        method: the method that is called.
        description: the content of `loop.yaml`, or None for a transformers model.
        config: the content of `config.json`.
        tensors: values by name, nested names joined by dots; they win over made-up ones. Those of a transformers model
            without a `loop.yaml` also say which inputs it is called with.

    Raises:
        UsageError: an input cannot be made up from what is known; the message gives the lines to add.
    """
    generator = torch.Generator().manual_seed(0)
    if description is None:
        inputs, constants = _transformer_inputs(model, config, tensors), {}
    else:
        inputs, constants = dict(description.inputs), dict(description.constants)
    _refuse_foreign(model, method, [*inputs, *constants])
    _refuse_unknown(tensors, inputs)
    batch = _rows(tensors, inputs, looped=isinstance(description, LoopSpec))
    values: dict[str, Any] = {}
    for name, value in constants.items():
        if name not in inputs:
            put(values, name, value)
    for name, spec in inputs.items():
        given = {n: t for n, t in tensors.items() if n == name or n.startswith(f"{name}.")}
        if given:
            for leaf, tensor in given.items():
                put(values, leaf, _given(leaf, tensor, spec, batch))
        elif spec.role == "constant":
            put(values, name, _constant(name, spec, constants))
        else:
            put(values, name, _made_up(model, method, name, spec, description, batch, generator))
    return as_lists(values)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of an `--inputs` file by name.

    Raises:
        UsageError: the file is missing or is no safetensors file.
    """
    from safetensors.torch import load

    for name, entry in tensor_entries(path, EXAMPLES).items():
        if entry.dtype not in DTYPES:
            raise UsageError(
                f"{path}: example input {name!r}: expected one of {', '.join(DTYPES)}; received {entry.dtype}."
            )
    with opened(path, EXAMPLES) as stream:  # the library opens no path that is not UTF-8
        return dict(sorted(load(stream.read()).items()))


def put(values: dict[str, Any], name: str, value: Any) -> None:
    """Set a value at a dotted name, creating dictionaries on the way."""
    *parents, last = name.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
    values[last] = value


def as_lists(values: Any) -> Any:
    """Turn dictionaries whose keys count 0, 1, 2... into lists, on every level."""
    if not isinstance(values, dict):
        return values
    nested = {key: as_lists(value) for key, value in values.items()}
    if (
        nested
        and all(isinstance(key, str) for key in nested)
        and sorted(nested) == sorted(map(str, range(len(nested))))
    ):
        return [nested[str(i)] for i in range(len(nested))]
    return nested


def unknown_inputs(cls: type) -> str:
    """What to add to the folder of a transformers model whose inputs are not known."""
    return (
        f"{cls.__name__}: its example inputs are not known. Give them: --inputs FILE.safetensors, with a row for each "
        "example. Or add a loop.yaml:\n"
        "  component: {method: forward}\n"
        f"  inputs: {{{_main_input(cls)}: {{role: condition, shape: [77], dtype: int64}}}}"
    )


def _main_input(cls: Any) -> str:
    return getattr(cls, "main_input_name", None) or "input_ids"


def _transformer_inputs(
    model: torch.nn.Module, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> dict[str, InputSpec]:
    """The inputs of a transformers model: those that are given, else those of a known text encoder."""
    if tensors:
        _require_tokens(tensors)
        return _given_inputs(model, list(dict.fromkeys(name.split(".")[0] for name in tensors)))
    key, names = TEXT_ENCODERS.get(type(model).__name__, ("", ()))
    length = config.get(key, getattr(model.config, key, None))
    if not isinstance(length, int):
        raise UsageError(unknown_inputs(type(model)))
    return {name: InputSpec(role="condition", shape=(length,), dtype="int64") for name in names}


def _given_inputs(model: torch.nn.Module, names: list[str]) -> dict[str, InputSpec]:
    parameters = inspect.signature(model.forward).parameters.values()
    known = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    for name in names:
        if name not in known:
            raise UsageError(f"example inputs: {name!r} is no input of {type(model).__name__}; {nearest(name, known)}")
    if _main_input(type(model)) not in names:
        raise UsageError(
            f"example inputs: expected {_main_input(type(model))!r} of {type(model).__name__} among them; received "
            f"{', '.join(names)}."
        )
    return {name: InputSpec(role="condition") for name in names}


def _require_tokens(tensors: Mapping[str, torch.Tensor]) -> None:
    for name in (name for name in TOKENS if name in tensors):
        if tensors[name].ndim != len(TOKENS[name]):
            raise UsageError(
                f"example inputs: {name!r} has shape {list(tensors[name].shape)}; expected [{', '.join(TOKENS[name])}], a "
                "row for each example."
            )


def _refuse_foreign(model: torch.nn.Module, method: str, names: Sequence[str]) -> None:
    """Refuse names of loop.yaml that are no arguments of the method, and names that contradict each other."""
    parameters = inspect.signature(getattr(model, method)).parameters.values()
    known = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for name in names:
        argument, *parts = name.split(".")
        if argument not in known and (not anything or not argument.isidentifier() or argument == "self"):
            raise UsageError(
                f"loop.yaml: {name!r} is no argument of {type(model).__name__}.{method}; {nearest(argument, known)}"
            )
        if len(parts) > DEEPEST_NAME or not all(parts) or any(other.startswith(f"{name}.") for other in names):
            raise UsageError(
                f"loop.yaml: expected an argument, or one nested in it, as in a.b; received {name!r:.60} beside others "
                "that it does not go with."
            )


def _refuse_unknown(tensors: Mapping[str, torch.Tensor], inputs: Mapping[str, InputSpec]) -> None:
    for name in tensors:
        if not all(name.split(".")) or any(other.startswith(f"{name}.") for other in tensors):
            raise UsageError(f"example inputs: expected arguments, or tensors nested in them; received {name!r:.60}.")
        if not any(name == known or name.startswith(f"{known}.") for known in inputs):
            raise UsageError(
                f"example inputs: {name!r} is no input of the model; {nearest(name, list(inputs))} "
                f"Or add `{name}: condition` to the inputs of loop.yaml."
            )


def _rows(tensors: Mapping[str, torch.Tensor], inputs: Mapping[str, InputSpec], *, looped: bool) -> int:
    """Rows of the example: those of the given tensors, and at least two.

    A timestep needs no batch, and in a network without a loop any number of all rows does not: the capture finds out
    whether the model takes one for each row as well.
    """
    rows = {}
    for name, tensor in tensors.items():
        role = next(spec.role for known, spec in inputs.items() if name == known or name.startswith(f"{known}."))
        if role != "constant" and not (tensor.ndim == 0 and (role == "timestep" or not looped)):
            if tensor.ndim == 0 or tensor.shape[0] == 0:
                raise UsageError(f"example inputs: {name!r} has shape {list(tensor.shape)}; expected a leading batch.")
            rows[name] = tensor.shape[0]
    if len(set(rows.values()) - {1}) > 1:
        raise UsageError(
            "example inputs: expected as many rows in each tensor, or one that serves all; received "
            f"{', '.join(f'{name} {count}' for name, count in rows.items())}."
        )
    return max(BATCH, *rows.values()) if rows else BATCH


def _given(name: str, tensor: torch.Tensor, spec: InputSpec, batch: int) -> torch.Tensor:
    if spec.role == "constant":
        return tensor
    if tensor.ndim == 0:
        return tensor.expand(batch).clone() if spec.role == "timestep" else tensor
    if spec.shape is not None and tuple(tensor.shape[1:]) != spec.shape:
        raise UsageError(
            f"example inputs: {name!r} has shape {list(tensor.shape)}; loop.yaml declares {list(spec.shape)} after the "
            "batch."
        )
    return tensor if len(tensor) == batch else tensor.repeat(batch, *(1,) * (tensor.ndim - 1))


def _constant(name: str, spec: InputSpec, constants: Mapping[str, Any]) -> torch.Tensor:
    if name not in constants:
        raise UsageError(
            f"input {name!r} is constant, but has no value. Give it with --inputs FILE.safetensors (or inputs.safetensors "
            f"beside loop.yaml), or add it to loop.yaml:\n  constants: {{{name}: [[0, 0, 0], [0, 0, 1]]}}"
        )
    try:
        value = array_of(constants[name])
    except ValueError as error:
        raise UsageError(f"constants.{name}: {error}.") from None
    return torch.as_tensor(value).to(_dtype(spec.dtype))


def _made_up(
    model: torch.nn.Module,
    method: str,
    name: str,
    spec: InputSpec,
    description: LoopSpec | ComponentFile | None,
    batch: int,
    generator: torch.Generator,
) -> torch.Tensor:
    if isinstance(description, LoopSpec) and spec.role == "state":
        return torch.randn([batch, *description.latent.shape], generator=generator)
    if isinstance(description, LoopSpec) and spec.role == "timestep":
        value = TIMESTEP * description.sampler.timestep_scale + description.sampler.timestep_offset
        return torch.full([batch], value, dtype=_dtype(spec.dtype))
    if spec.shape is None and spec.dtype is None and _is_class(model, method, name, description):
        return _classes(batch, torch.int64)
    if spec.shape is None:
        raise UsageError(
            f"input {name!r} has no shape. Add it to loop.yaml, without the batch:\n"
            f"  inputs: {{{name}: {{role: {spec.role}, shape: [77, 768], dtype: float32}}}}\n"
            f"or give an example: --inputs FILE.safetensors with a tensor {name!r}."
        )
    shape, dtype = [batch, *spec.shape], _dtype(spec.dtype)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    if not spec.shape:
        return _classes(batch, dtype)
    return torch.ones(shape, dtype=dtype)  # valid as a mask and as token numbers


def _classes(batch: int, dtype: torch.dtype) -> torch.Tensor:
    """Class numbers that every model with classes has."""
    return (torch.arange(batch) % BATCH).to(dtype)


def _is_class(model: torch.nn.Module, method: str, name: str, description: LoopSpec | ComponentFile | None) -> bool:
    """Whether a condition is a class number: its unconditional value is one, or its annotation says so."""
    if isinstance(description, LoopSpec) and description.guidance is not None:
        unconditional = description.guidance.unconditional
        if isinstance(unconditional, dict) and isinstance(unconditional.get(name), int):
            return True
    parameter = inspect.signature(getattr(model, method)).parameters.get(name)
    return parameter is not None and "LongTensor" in str(parameter.annotation)


def _dtype(text: str | None) -> torch.dtype:
    """A dtype that the loop file was checked for."""
    return getattr(torch, text or "float32")
