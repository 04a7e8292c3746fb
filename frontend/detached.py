"""`Tensor.data` as PyTorch can trace it: an alias that a graph knows of, where the real one leaves the trace."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

READ_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]


class DataAsDetached(TorchFunctionMode):
    """Reads `tensor.data` as `tensor.detach()`.

    Both share the tensor's memory and need no gradient. But what is written through `.data`, as CogVideoX does where its
    table of positions is not that of its configuration, is no part of a trace, and `torch.export` refuses the rest.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call what was called, or `detach`."""
        if func == READ_DATA:
            return args[0].detach()
        return func(*args, **(kwargs or {}))
