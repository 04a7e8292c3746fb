"""What sessions share: the check of a model's ports, and errors of engines in one line. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..loop.errors import BundleError
from ..loop.ports import Port


def check_ports(file: Path, kind: str, received: Mapping[str, tuple[str, int]], expected: Sequence[Port]) -> None:
    """Raise BundleError unless the model in a file has the ports that the manifest promises.

    Args:
        file: file of the model.
        kind: `input` or `output`.
        received: name -> dtype and rank of the model's own.
        expected: those of the manifest.
    """
    wanted = {port.name: (port.dtype, len(port.shape)) for port in expected}
    if received != wanted:
        raise BundleError(
            f"{file}: expected the {kind}s {_described(wanted)}; received {_described(received)}. "
            "Build the bundle again with `stepfold optimize`."
        )


def _described(ports: Mapping[str, tuple[str, int]]) -> str:
    return ", ".join(f"{name} ({dtype}, rank {rank})" for name, (dtype, rank) in sorted(ports.items())) or "none"


def shapes(feed: Mapping[str, np.ndarray]) -> str:
    """What a session was given: `x [1, 3] float32, t [1] float32`."""
    return ", ".join(f"{key} {list(value.shape)} {value.dtype}" for key, value in feed.items())


def first_line(error: BaseException) -> str:
    """The first line of an error of an engine."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
