"""What a person asks about a pipeline folder before compiling it: the key `pipeline` of `inspect --json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..loop.spec import LoopSpec
from .calling import flatten
from .load import Around, Checkpoint

FORMLESS = "has no form of the `tokenizers` library, which engines read prompts with; save the folder with a fast one"


def overview(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Describe the pipeline of a checkpoint and the bundle that it becomes; None for a folder without a pipeline.

    Returns:
        `class`, `networks` (`name`, `class`, `parameters`, `in_bundle`, `reason`, and `calls` of those that take turns),
        `image` ([height, width] or None), `guidance`, `takes` (what a request gives) and `refused` (what stands in the
        way, with what to do).
    """
    run, loop = checkpoint.run, checkpoint.loop
    if run is None or loop is None:
        return None
    takes, refused = _takes(checkpoint, loop)
    return {
        "class": type(run.pipeline).__name__,
        "networks": _networks(checkpoint),
        "image": _image(run.pipeline, run.arguments, loop.latent.shape),
        "guidance": _guidance(loop),
        "takes": takes,
        "refused": refused,
    }


def _networks(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    assert checkpoint.run is not None
    found = []
    for name, part in checkpoint.run.pipeline.components.items():
        if not isinstance(part, torch.nn.Module):
            continue
        reason = _left_out(checkpoint, name, part)
        parameters = sum(value.numel() for value in part.parameters())
        row = {"name": name, "class": type(part).__name__, "parameters": parameters}
        found.append(row | {"in_bundle": not reason, "reason": reason} | _turns(checkpoint, part))
    return found


def _turns(checkpoint: Checkpoint, part: torch.nn.Module) -> dict[str, int]:
    """At how many calls a network runs that takes turns with others."""
    experts = checkpoint.experts
    numbers = [i for i, network in enumerate(experts.networks) if network is part] if experts is not None else []
    return {"calls": experts.by_call.count(numbers[0])} if experts is not None and numbers else {}


def _left_out(checkpoint: Checkpoint, name: str, part: torch.nn.Module) -> str:
    """Why a network does not go into the bundle; empty for one that does."""
    networks = (checkpoint.model,) if checkpoint.experts is None else checkpoint.experts.called()
    if any(part is one for one in networks):
        return ""
    if checkpoint.around is None:
        return "only the denoiser of this pipeline is compiled"
    if name.startswith("text_encoder"):
        return "" if _has_text(checkpoint.around) else "the pipeline was given embeddings"
    return checkpoint.around.surroundings.undecoded if name == "vae" else "neither the loop nor its ends read it"


def _has_text(around: Around) -> bool:
    return around.prompts is not None and around.surroundings.text() is not None


def _image(pipeline: Any, arguments: Mapping[str, Any], latent: tuple[int, ...]) -> list[int] | None:
    """Height and width of an image: as asked for, of the latent, or the pipeline's own."""
    factor, own = (getattr(pipeline, name, None) for name in ("vae_scale_factor", "default_sample_size"))
    if "height" in arguments and "width" in arguments:
        return [arguments["height"], arguments["width"]]
    if len(latent) == 3 and getattr(pipeline, "vae", None) is None:
        return [*latent[1:]]
    if len(latent) == 3 and isinstance(factor, int):
        return [factor * size for size in latent[1:]]
    return [own * factor] * 2 if isinstance(own, int) and isinstance(factor, int) else None


def _guidance(loop: LoopSpec) -> str:
    if loop.guidance is None:
        return "one branch"
    guidance = loop.guidance
    other = "the request gives the other" if guidance.unconditional == "input" else "the other is written down"
    text = f"two branches at scale {guidance.scales[0]:g}, {other}"
    if guidance.strength is not None:
        guided = [strength for strength in guidance.strength if strength]
        scales = ", at scales of their own" if len(set(guided)) > 1 else ""
        text += f"; {len(guided)} of {len(guidance.strength)} calls are guided{scales}"
    if guidance.rescale is not None:
        text += f"; each {guidance.rescale.over} of the output follows the {guidance.rescale.measure} of the conditional one"
    return text


def _takes(checkpoint: Checkpoint, loop: LoopSpec) -> tuple[list[str], list[str]]:
    """What a request gives, and what of it cannot be had."""
    around = checkpoint.around
    text = around.surroundings.text() if around is not None and around.prompts is not None else None
    if text is not None and around is not None:
        lengths = {prompt.tokenizer: prompt.length for prompt in text.prompts.values()}
        takes = [
            f"prompts: {tokenizer} reads {length} tokens and cuts the rest" for tokenizer, length in lengths.items()
        ]
        pipeline = around.surroundings.pipeline
        formless = [name for name in lengths if getattr(getattr(pipeline, name), "backend_tokenizer", None) is None]
        return takes, [f"{name}: {type(getattr(pipeline, name)).__name__} {FORMLESS}" for name in formless]
    tensors, _ = flatten(checkpoint.kwargs)
    conditions = [name for name in tensors if name in loop.conditions]
    if not conditions:
        return ["noise alone"], []
    shapes = {name: list(tensors[name].shape[1:]) for name in conditions}
    return [f"{name}, {f'{shape}' if shape else 'a number'} for each sample" for name, shape in shapes.items()], []
