"""A class-to-image pipeline with a loop of its own, correct or changed in one place."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import zoo

STEPS = 6
SIZE = 8  # of a latent


def deviation_shared(noise: torch.Tensor, conditional: torch.Tensor) -> torch.Tensor:
    """`guidance_rescale` of 0.7, in diffusers' own code."""
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    return rescale_noise_cfg(noise, conditional, guidance_rescale=0.7)


def norm_by_row(noise: torch.Tensor, conditional: torch.Tensor) -> torch.Tensor:
    """As QwenImage and Lumina 2 do it."""
    return noise * (torch.norm(conditional, dim=-1, keepdim=True) / torch.norm(noise, dim=-1, keepdim=True))


def norm_by_sample_at_most(noise: torch.Tensor, conditional: torch.Tensor) -> torch.Tensor:
    """As Z-Image does it, and negates."""
    rows = []
    for one, base in zip(noise, conditional, strict=True):
        most, size = 0.9 * torch.linalg.vector_norm(base), torch.linalg.vector_norm(one)
        rows.append(-one * (most / size) if size > most else -one)
    return torch.stack(rows)


RESCALED = {
    "rescaled by deviation": deviation_shared,
    "rescaled by rows": norm_by_row,
    "rescaled at most": norm_by_sample_at_most,
    "rescaled by another rule": lambda noise, _: noise * (1 + noise.abs().amax((1, 2, 3), keepdim=True)),
}


class ChangedPipeline(diffusers.DiffusionPipeline):
    """`DiTPipeline` in plain words, with a change that a test asks for."""

    change = ""
    output: Any = diffusers.ImagePipelineOutput

    def __init__(self, transformer: Any, scheduler: Any, vae: Any, second: Any):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae, second=second)

    def __call__(
        self,
        class_labels: list[int],
        guidance_scale: float = 3.0,
        num_inference_steps: int = STEPS,
        generator: torch.Generator | None = None,
        output_type: str = "np",
    ) -> Any:
        with torch.no_grad():
            self.scheduler.set_timesteps(num_inference_steps)
            latents = torch.randn(len(class_labels), 4, SIZE, SIZE, generator=generator)
            latents = latents * self.scheduler.init_noise_sigma
            if self.change == "timesteps from step 3 on":
                self.scheduler.timesteps[2:] -= 7
            for i, t in enumerate(self.scheduler.timesteps):
                latents = self._step(i, t, latents, torch.tensor(class_labels), guidance_scale, generator)
            if self.change == "one more call":
                latents = latents - 0.1 * self._prediction(0, self.scheduler.timesteps[-1], latents, class_labels)
            if output_type == "latent":
                return self.output(images=latents)
            images = self.vae.decode(latents / self.vae.config.scaling_factor).sample
            if self.change == "mirrored image":
                images = images.flip(-1)
            return self.output(images=(images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy())

    def _step(self, i: int, t: Any, latents: Any, classes: Any, scale: float, generator: Any) -> Any:
        guides = {"guidance in an interval": i < 3, "guidance that begins later": 2 <= i < 5}.get(self.change, True)
        conditional = self._prediction(i, t, latents, classes)
        if self.change == "dynamic guidance":
            scale = 1 + (scale - 1) * (i + 1) / STEPS
        if not guides or scale <= 1:
            noise = conditional
        else:
            unconditional = self._prediction(i, t, latents, [1000] * len(latents))
            noise = unconditional + scale * (conditional - unconditional)
            noise = RESCALED.get(self.change, lambda noise, _: noise)(noise, conditional)
        if self.change == "negated output":
            noise = -noise
        extra = {"eta": 0.5} if self.change == "other eta" else {}
        if "generator" in inspect.signature(self.scheduler.step).parameters:
            extra["generator"] = generator
        latents = self.scheduler.step(noise, t, latents, return_dict=False, **extra)[0]
        return latents.clamp(-1, 1) if self.change == "clipped latent" else latents

    def _prediction(self, i: int, t: Any, latents: Any, classes: Any) -> Any:
        network = self.second if self.change == "second network" and i >= 3 else self.transformer
        latents = self.scheduler.scale_model_input(latents, t)
        if self.change == "second network on the input" and i >= 3:
            latents = (
                latents + 0.1 * self.second(latents, timestep=t.expand(2), class_labels=torch.tensor([0, 1]))[0][:, :4]
            )
        return network(latents, timestep=t.expand(len(latents)), class_labels=torch.as_tensor(classes)).sample[:, :4]


def folder(path: Path, scheduler: Any = None) -> Path:
    """The pipeline, with two networks of other weights, and DDIM unless another scheduler is given."""
    torch.manual_seed(0)
    config: dict[str, Any] = zoo.DIT.config | {"num_embeds_ada_norm": 1000}
    networks = [diffusers.DiTTransformer2DModel(**config).eval() for _ in range(2)]
    for network in networks:
        for parameter in network.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)  # its last layer begins at zero
    decoder: dict[str, Any] = zoo.VAE_DECODER.config | {"scaling_factor": 0.5}
    vae = diffusers.AutoencoderKL(**decoder)
    scheduler = scheduler or diffusers.DDIMScheduler(clip_sample=False)
    ChangedPipeline(networks[0], scheduler, vae, networks[1]).save_pretrained(path)
    return path


@contextmanager
def change(name: str) -> Iterator[Callable[[Path], ChangedPipeline]]:
    """Let diffusers have the class, with a change; yields what loads a folder of it."""
    ChangedPipeline.change = name
    setattr(diffusers, "ChangedPipeline", ChangedPipeline)  # noqa: B010  (the module has no such attribute)
    try:
        yield lambda path: ChangedPipeline.from_pretrained(path)
    finally:
        delattr(diffusers, "ChangedPipeline")
        ChangedPipeline.change = ""
