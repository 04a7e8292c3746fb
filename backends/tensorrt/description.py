"""What an engine file holds: nothing of a plan can be read without a GPU that runs it."""

from __future__ import annotations

from pydantic import Field

from ...loop.spec import Strict
from ..description import Description


class Layer(Strict):
    """A layer of the network definition: its name, kind, and the types of its outputs."""

    name: str
    kind: str
    types: tuple[str, ...]


class Batch(Strict):
    """The batches an engine takes, and the one its kernels were chosen for."""

    min: int = Field(ge=1)
    opt: int = Field(ge=1)
    max: int = Field(ge=1)


class PlanDescription(Description):
    """The description of an engine file.

    Attributes:
        provider: the package that built it.
        provider_version: version of that package; plans are not portable between versions.
        capability: compute capability it was built for.
        precision: type of products: `fp32`, `fp16` or `bf16`.
        batch: its profile; None where no input has a batch.
        layers: the network definition it was built from; empty where its builder does not show it.
        tensors: port -> the name the plan has for it, where it is another.
    """

    provider: str
    provider_version: str
    capability: str
    precision: str
    batch: Batch | None
    layers: tuple[Layer, ...]
    tensors: dict[str, str] = Field(default_factory=dict)

    def tensor(self, port: str) -> str:
        """The name that the plan has for a port."""
        return self.tensors.get(port, port)
