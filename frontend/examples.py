"""Example keyword arguments of a model: from the loop's description, from a file of tensors, or from a short table."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..loop.errors import UsageError, nearest
from ..loop.spec import ComponentFile, InputSpec, LoopSpec

BATCH = 2
TIMESTEP = 500.0  # in scheduler units, the middle of the usual 1000

# Text encoders: architecture -> the key of the configuration that holds the longest prompt.
TEXT_ENCODERS = {
    "CLIPTextModel": "max_position_embeddings",
    "CLIPTextModelWithProjection": "max_position_embeddings",
    "T5EncoderModel": "n_positions",
    "UMT5EncoderModel": "n_positions",
}


def example_kwargs(
    model: torch.nn.Module,
    method: str,
    description: LoopSpec | ComponentFile | None,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
) -> dict[str, Any]:
    """Keyword arguments with a batch of two for one call.

    Args:
        model: the network.
        method: the method that is called.
        description: the content of `loop.yaml`, or None for a known text encoder.
        config: the content of `config.json`.
        tensors: values by name, nested names joined by dots; they win over made-up ones.

    Raises:
        UsageError: an input cannot be made up from what is known; the message gives the lines to add.
    """
    generator = torch.Generator().manual_seed(0)
    if description is None:
        inputs, constants = _text_encoder(model, config), {}
    else:
        inputs, constants = dict(description.inputs), dict(description.constants)
    _refuse_unknown(tensors, inputs)
    values: dict[str, Any] = {}
    for name, value in constants.items():
        if name not in inputs:
            put(values, name, value)
    for name, spec in inputs.items():
        given = {n: t for n, t in tensors.items() if n == name or n.startswith(f"{name}.")}
        if given:
            for leaf, tensor in given.items():
                put(values, leaf, _given(leaf, tensor, spec))
        elif spec.role == "constant":
            put(values, name, _constant(name, spec, constants))
        else:
            put(values, name, _made_up(model, method, name, spec, description, generator))
    return as_lists(values)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of an `--inputs` file by name.

    Raises:
        UsageError: the file is missing or is no safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file of example inputs.") from None
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path}: not a safetensors file of example inputs: {error}") from None


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


def _text_encoder(model: torch.nn.Module, config: Mapping[str, Any]) -> dict[str, InputSpec]:
    architecture = type(model).__name__
    length = config.get(TEXT_ENCODERS.get(architecture, ""), getattr(model.config, "n_positions", None))
    if architecture not in TEXT_ENCODERS or not isinstance(length, int):
        raise UsageError(
            f"{architecture}: its example inputs are not known. Add a loop.yaml:\n"
            "  component: {method: forward}\n"
            f"  inputs: {{{_first_parameter(model)}: {{role: condition, shape: [77], dtype: int64}}}}"
        )
    return {"input_ids": InputSpec(role="condition", shape=(length,), dtype="int64")}


def _first_parameter(model: torch.nn.Module) -> str:
    return next(iter(inspect.signature(model.forward).parameters), "input_ids")


def _refuse_unknown(tensors: Mapping[str, torch.Tensor], inputs: Mapping[str, InputSpec]) -> None:
    for name in tensors:
        if not any(name == known or name.startswith(f"{known}.") for known in inputs):
            raise UsageError(
                f"example inputs: {name!r} is no input of the model; {nearest(name, list(inputs))} "
                f"Or add `{name}: condition` to the inputs of loop.yaml."
            )


def _given(name: str, tensor: torch.Tensor, spec: InputSpec) -> torch.Tensor:
    if spec.role == "constant":
        return tensor
    if tensor.ndim == 0 or tensor.shape[0] == 0:
        raise UsageError(f"example inputs: {name!r} has shape {list(tensor.shape)}; expected a leading batch.")
    if spec.shape is not None and tuple(tensor.shape[1:]) != spec.shape:
        raise UsageError(
            f"example inputs: {name!r} has shape {list(tensor.shape)}; loop.yaml declares {list(spec.shape)} after the "
            "batch."
        )
    rows = tensor[:BATCH]
    return rows if len(rows) == BATCH else rows.repeat(BATCH, *(1,) * (tensor.ndim - 1))


def _constant(name: str, spec: InputSpec, constants: Mapping[str, Any]) -> torch.Tensor:
    if name not in constants:
        raise UsageError(
            f"input {name!r} is constant, but has no value. Give it with --inputs FILE.safetensors (or inputs.safetensors "
            f"beside loop.yaml), or add it to loop.yaml:\n  constants: {{{name}: [[0, 0, 0], [0, 0, 1]]}}"
        )
    return torch.tensor(constants[name], dtype=_dtype(name, spec.dtype or "float32"))


def _made_up(
    model: torch.nn.Module,
    method: str,
    name: str,
    spec: InputSpec,
    description: LoopSpec | ComponentFile | None,
    generator: torch.Generator,
) -> torch.Tensor:
    if isinstance(description, LoopSpec) and spec.role == "state":
        return torch.randn([BATCH, *description.latent.shape], generator=generator)
    if isinstance(description, LoopSpec) and spec.role == "timestep":
        value = TIMESTEP * description.sampler.timestep_scale
        return torch.full([BATCH], value, dtype=_dtype(name, spec.dtype or "float32"))
    if spec.shape is None and spec.dtype is None and _is_class(model, method, name, description):
        return torch.arange(BATCH)
    if spec.shape is None:
        raise UsageError(
            f"input {name!r} has no shape. Add it to loop.yaml, without the batch:\n"
            f"  inputs: {{{name}: {{role: {spec.role}, shape: [77, 768], dtype: float32}}}}\n"
            f"or give an example: --inputs FILE.safetensors with a tensor {name!r}."
        )
    shape, dtype = [BATCH, *spec.shape], _dtype(name, spec.dtype or "float32")
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    if not spec.shape:
        return torch.arange(BATCH).to(dtype)
    return torch.ones(shape, dtype=dtype)  # valid as a mask and as token numbers


def _is_class(model: torch.nn.Module, method: str, name: str, description: LoopSpec | ComponentFile | None) -> bool:
    """Whether a condition is a class number: its unconditional value is one, or its annotation says so."""
    if isinstance(description, LoopSpec) and description.guidance is not None:
        unconditional = description.guidance.unconditional
        if isinstance(unconditional, dict) and isinstance(unconditional.get(name), int):
            return True
    parameter = inspect.signature(getattr(model, method)).parameters.get(name)
    return parameter is not None and "LongTensor" in str(parameter.annotation)


def _dtype(name: str, text: str) -> torch.dtype:
    found = getattr(torch, text, None)
    if not isinstance(found, torch.dtype):
        raise UsageError(f"input {name!r}: unknown dtype {text!r}; expected float32, int64 or bool.")
    return found
