"""A model's call as a function of named tensors: nested arguments flattened, constants baked in."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..loop.errors import UsageError

PLAIN = (str, int, float, bool, type(None))
"""What a model may return beside tensors, and is left out."""


def flatten(kwargs: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Split keyword arguments into named tensors and named constants, nested names joined by dots."""
    leaves, _ = pytree.tree_flatten_with_path(dict(kwargs))
    named = {dotted(path): value for path, value in leaves}
    tensors = {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}
    return tensors, {name: value for name, value in named.items() if name not in tensors}


def dotted(path: Sequence[Any]) -> str:
    """The name of a leaf: keys and indices on the way to it, joined by dots."""
    return ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)


def in_signature_order(call: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments in the order in which the callable declares them, undeclared ones last."""
    names = list(inspect.signature(call).parameters)
    unknown = [name for name in kwargs if name not in names]
    return {name: kwargs[name] for name in [*names, *unknown] if name in kwargs}


class Calling(torch.nn.Module):
    """One method of a model as a function of positional tensors that returns a dictionary of named tensors.

    The model stays under the attribute `model`; tensors that never change become buffers of this module.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        method: str,
        kwargs: Mapping[str, Any],
        inputs: Sequence[str],
        latent: tuple[int, ...] | None,
    ):
        """Remember how the model is called.

        Args:
            model: the module.
            method: the name of the method to call.
            kwargs: its keyword arguments; tensors not named in `inputs` are baked in.
            inputs: names (joined by dots) of the tensors the caller supplies, in order.
            latent: shape of one latent without the batch, when the first output is a prediction for it.
        """
        super().__init__()
        self.model = model
        self._method = method
        self._inputs = tuple(inputs)
        self.latent = latent
        leaves, self._spec = pytree.tree_flatten_with_path(dict(kwargs))
        self._names = [dotted(path) for path, _ in leaves]
        self._constants = {n: v for n, (_, v) in zip(self._names, leaves, strict=True) if n not in self._inputs}
        for name, value in self._constants.items():
            if isinstance(value, torch.Tensor):
                self.register_buffer(_buffer(name), value, persistent=False)

    def forward(self, *tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        """Rebuild the keyword arguments, call the method and name what it returns."""
        given = dict(zip(self._inputs, tensors, strict=True))
        leaves = [given[name] if name in given else self._constant(name) for name in self._names]
        result = getattr(self.model, self._method)(**pytree.tree_unflatten(leaves, self._spec))
        outputs = named_outputs(result)
        if self.latent is not None:
            first = next(iter(outputs))
            outputs = {"sample": prediction(outputs.pop(first), self.latent)} | outputs
        return {_free(name, self._inputs): value for name, value in outputs.items()}

    def _constant(self, name: str) -> Any:
        value = self._constants[name]
        return getattr(self, _buffer(name)) if isinstance(value, torch.Tensor) else value


def _free(name: str, inputs: Sequence[str]) -> str:
    """An output name that no input has: a UNet calls its latent `sample` too."""
    return f"{name}_output" if name in inputs else name


def _buffer(name: str) -> str:
    return f"argument_{name.replace('.', '_')}"


def named_outputs(result: Any) -> dict[str, torch.Tensor]:
    """The tensors a model returns.

    They are called as their fields when the model names them, those inside of a field with their place behind a dot
    (`hidden_states.0`); else `sample`, `output_1`, `output_2`...

    Raises:
        UsageError: there are others inside of an object that cannot be looked into.
    """
    if isinstance(result, Mapping):
        fields = {name: leaf for field, value in result.items() for name, leaf in _inside(str(field), value)}
        if fields:
            return fields
    leaves = [leaf for _, leaf in _inside("", result)]
    return {"sample" if i == 0 else f"output_{i}": leaf for i, leaf in enumerate(leaves)}


def _inside(name: str, value: Any) -> list[tuple[str, torch.Tensor]]:
    """The tensors of a field and their names."""
    found = []
    for path, leaf in pytree.tree_flatten_with_path(value)[0]:
        if isinstance(leaf, torch.Tensor):
            found.append((".".join(filter(None, (name, dotted(path)))), leaf))
        elif not isinstance(leaf, PLAIN):
            raise UsageError(
                f"output {name or 'of the model'}: expected tensors, or tuples, lists and mappings of them; received "
                f"{type(leaf).__name__}, which would be lost. Let the model leave it out, as in constants: "
                "{use_cache: false}."
            )
    return found


def prediction(output: torch.Tensor, latent: tuple[int, ...]) -> torch.Tensor:
    """The part of an output that predicts the latent.

    A model that learns the variance too returns twice the channels; the prediction is their first half.
    """
    sizes = tuple(output.shape[1:])
    if len(sizes) == len(latent) and sizes != tuple(latent):
        doubled = [d for d, (have, want) in enumerate(zip(sizes, latent, strict=True)) if have != want]
        if len(doubled) == 1 and sizes[doubled[0]] == 2 * latent[doubled[0]]:
            return output.narrow(doubled[0] + 1, 0, latent[doubled[0]])
    return output
