"""PyTorch as it comes: `eager` and `torch.compile`, in float32."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import yaml

from ...frontend.calling import Calling, flatten, in_signature_order
from ...frontend.load import LOOP_FILE, PIPELINE_FILE, Checkpoint, load_checkpoint
from ...loop.errors import UsageError
from ...loop.pipeline_call import PipelineCall
from ...loop.ports import StageCallable
from ...loop.spec import LoopSpec
from ..work import Work

Array = np.ndarray


def load(checkpoint: Path, loop: LoopSpec | None, call: PipelineCall | None) -> Checkpoint:
    """Load a checkpoint as bundles of it were made.

    Args:
        checkpoint: the folder.
        loop: stands in for the `loop.yaml` of a folder that has none.
        call: what a pipeline is called with; None leaves it its defaults.

    Raises:
        UsageError: it cannot be loaded.
    """
    describes_itself = (checkpoint / LOOP_FILE).is_file() or (checkpoint / PIPELINE_FILE).is_file()
    if loop is None or describes_itself:
        return load_checkpoint(checkpoint, call=call)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / LOOP_FILE
        file.write_text(yaml.safe_dump(loop.model_dump(mode="json", exclude_none=True)), encoding="utf-8")
        return load_checkpoint(checkpoint, loop=file)


def module_of(checkpoint: Path, model_work: Work) -> tuple[Calling, dict[str, torch.Tensor]]:
    """The network of a checkpoint as a function of positional tensors, with an example value [2, ...] of each.

    Tensors whose role is `constant` are baked in, as in a bundle.

    Raises:
        UsageError: it cannot be loaded, or several networks take turns in its loop.
    """
    loop = model_work.loop
    loaded = load(checkpoint, loop, model_work.call)
    if loaded.experts is not None:
        raise UsageError(
            f"{checkpoint}: expected a model of one network; {len(loaded.experts.called())} take turns in its loop, which "
            "baselines do not have. Leave them out: --baselines ''."
        )
    kwargs = in_signature_order(getattr(loaded.model, loaded.method), loaded.kwargs)
    tensors, _ = flatten(kwargs)
    constant = loop.names("constant") if loop is not None else []
    example = {n: v for n, v in tensors.items() if n not in constant and n.split(".")[0] not in constant}
    latent = loop.latent.shape if loop is not None else None
    calling = Calling(loaded.model, loaded.method, kwargs, list(example), latent)
    calling.eval()
    return calling, example


def open_module(checkpoint: Path, model_work: Work, threads: int, compiled: bool) -> tuple[StageCallable, int]:
    """The network as a callable and the bytes of its float32 weights.

    Args:
        checkpoint: the folder.
        model_work: how it is called.
        threads: number of threads of an operator.
        compiled: wrap it in `torch.compile`; the first call compiles, for the batch size it is called with.
    """
    torch.set_num_threads(threads)
    module, example = module_of(checkpoint, model_work)
    names = list(example)
    size = sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
    run = torch.compile(module) if compiled else module

    def call(inputs: Mapping[str, Array]) -> list[Array]:
        arguments = [torch.from_numpy(np.ascontiguousarray(inputs[name])) for name in names]
        with torch.inference_mode():
            return [output.numpy() for output in run(*arguments).values()]

    return call, size
