"""Options of the TensorRT backend."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from ...loop.options import Options

LARGEST_BATCH = 1 << 20
ComputeCapability = Literal["SM75", "SM80", "SM86", "SM89", "SM120", "SM121"]


class PlanOptions(Options):
    """Options of a plan, whoever builds it.

    Attributes:
        precision: type of products and of what lies between them; norms and timesteps stay in float32.
        min_batch: smallest batch of an evaluation, guidance branches counted.
        opt_batch: the batch kernels are chosen for.
        max_batch: largest batch of an evaluation, guidance branches counted.
        workspace_mib: device memory in MiB that the layers may use beside weights and activations; null is all.
    """

    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    min_batch: int = Field(default=1, ge=1, le=LARGEST_BATCH)
    opt_batch: int = Field(default=8, ge=1, le=LARGEST_BATCH)
    max_batch: int = Field(default=64, ge=1, le=LARGEST_BATCH)
    workspace_mib: int | None = Field(default=None, ge=1, le=1 << 24)

    @model_validator(mode="after")
    def _batches_in_order(self) -> Self:
        if not self.min_batch <= self.opt_batch <= self.max_batch:
            received = f"{self.min_batch}, {self.opt_batch} and {self.max_batch}"
            raise ValueError(f"min_batch, opt_batch and max_batch in rising order; received {received}")
        return self


class TensorrtOptions(PlanOptions):
    """Options of the engine.

    Attributes:
        provider: the package that builds and runs; `auto` takes the one that is installed, TensorRT-RTX first.
        capability: compute capability of the GPU to build for; null is the GPU of this machine.
        timing_cache: file with kernel timings of earlier builds, read and written; classic TensorRT only.
        keep_graph: write the ONNX graph of each plan beside it, for tools that compare the two.
    """

    provider: Literal["auto", "tensorrt_rtx", "tensorrt"] = "auto"
    capability: ComputeCapability | None = None
    timing_cache: Path | None = None
    keep_graph: bool = False
