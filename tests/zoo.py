"""Tiny, randomly initialized models of the classes the frontend must capture, and folders of them as users have them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml

from stepfold.loop.spec import LoopSpec

if TYPE_CHECKING:
    from stepfold.ir.program import Program

EULER = {"scheduler": "EulerDiscreteScheduler", "config": {}, "steps": 8}
THOUSANDTH = {"timestep_scale": 0.001}
FLOW = {
    "scheduler": "FlowMatchEulerDiscreteScheduler",
    "config": {},
    "steps": 8,
    "set_timesteps": {"sigmas": "linspace"},
}


@dataclass(frozen=True)
class ZooModel:
    """One model: how to build it, how it is called, and what its `loop.yaml` says.

    `document` is the content of `loop.yaml` (None: a transformers text encoder, which needs none); `constants` are
    values of tensors that never change, saved to `inputs.safetensors`.
    """

    name: str
    class_name: str
    config: dict[str, Any]
    document: dict[str, Any] | None
    library: str = "diffusers"
    constants: dict[str, torch.Tensor] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    @property
    def method(self) -> str:
        """The method of the model that is captured."""
        return (self.document or {}).get("component", {}).get("method", "forward")

    @property
    def is_loop(self) -> bool:
        """Whether a loop surrounds the model."""
        return "sampler" in (self.document or {})

    def loop(self) -> LoopSpec | None:
        """The loop around the model, or None for a component."""
        return LoopSpec.model_validate(self.document) if self.is_loop else None

    def build(self) -> torch.nn.Module:
        """The model in float32 and evaluation mode, the same weights each time."""
        torch.manual_seed(0)
        module = __import__(self.library)
        if self.library == "transformers":
            config = getattr(module, self.config["_config"])(**{k: v for k, v in self.config.items() if k[0] != "_"})
            model = getattr(module, self.class_name)(config)
        else:
            model = getattr(module, self.class_name)(**self.config)
        _fill_zero_weights(model)
        return model.eval()

    @cached_property
    def program(self) -> Program:
        """The captured model, captured once a process; passes leave it as it is."""
        from stepfold.frontend.capture import capture

        return capture(self.build(), self.kwargs(2), self.loop(), method=self.method)

    def kwargs(self, batch: int, seed: int = 0) -> dict[str, Any]:
        """Keyword arguments of the captured method for `batch` samples."""
        generator = torch.Generator().manual_seed(seed)
        document = self.document or {"inputs": dict.fromkeys(self.config["_inputs"], self._tokens())}
        values: dict[str, Any] = dict(document.get("constants", {}))
        for name, spec in document["inputs"].items():
            spec = {"role": spec} if isinstance(spec, str) else spec
            value = self.constants.get(name)
            _put(values, name, _random(name, spec, document, batch, generator) if value is None else value)
        return values

    def _tokens(self) -> dict[str, Any]:
        return {"shape": [self.config["_length"]], "dtype": "int64"}

    def save(self, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
        """Write config.json, safetensors weights and loop.yaml, as a user would have them."""
        self.build().to(dtype).save_pretrained(folder, safe_serialization=True)  # type: ignore[operator]
        if self.document is not None:
            (folder / "loop.yaml").write_text(yaml.safe_dump(self.document, sort_keys=False))
        if self.constants:
            from safetensors.torch import save_file

            save_file(self.constants, folder / "inputs.safetensors")
        return folder

    def call(self, model: torch.nn.Module, kwargs: dict[str, Any]) -> torch.Tensor:
        """The first output of the captured method, as eager PyTorch computes it."""
        with torch.no_grad():
            return getattr(model, self.method)(**kwargs, return_dict=False)[0]


def _fill_zero_weights(model: torch.nn.Module) -> None:
    """Give zero-initialized layers (gates, output projections) values, so that every path reaches the output."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.data.normal_(0, 0.05, generator=generator)


def _random(name: str, spec: dict[str, Any], document: dict[str, Any], batch: int, generator: torch.Generator) -> Any:
    role = spec.get("role")
    if role == "state":
        return torch.randn([batch, *document["latent"]["shape"]], generator=generator)
    if role == "timestep":
        return torch.linspace(900.0, 100.0, batch) * document["sampler"].get("timestep_scale", 1.0)
    dtype = getattr(torch, spec.get("dtype", "float32" if "shape" in spec else "int64"))
    shape = [batch, *spec.get("shape", [])]
    if "mask" in name:
        lengths = torch.arange(batch) % 2 + 3
        return (torch.arange(shape[1])[None] < lengths[:, None]).to(dtype)
    if not dtype.is_floating_point:
        return torch.randint(0, 10, shape, generator=generator).to(dtype)
    return torch.randn(shape, generator=generator).to(dtype)


def _put(values: dict[str, Any], name: str, value: Any) -> None:
    *parents, last = name.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
    values[last] = value


def _loop(inputs: dict[str, Any], latent: list[int], **more: Any) -> dict[str, Any]:
    return {"inputs": inputs, "sampler": EULER, "latent": {"shape": latent}, **more}


def _text(*shape: int) -> dict[str, Any]:
    return {"role": "condition", "shape": list(shape), "dtype": "float32"}


def _mask(length: int, dtype: str) -> dict[str, Any]:
    return {"role": "condition", "shape": [length], "dtype": dtype}


def _image_ids(height: int, width: int) -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).float()


DIT = ZooModel(
    "dit",
    "DiTTransformer2DModel",
    {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "sample_size": 8,
        "patch_size": 2,
        "num_embeds_ada_norm": 10,
    },
    _loop(
        {"hidden_states": "state", "timestep": "timestep", "class_labels": "condition"},
        [4, 8, 8],
        guidance={"scale": 2.0, "unconditional": {"class_labels": 10}},
    ),
)
PIXART = ZooModel(
    "pixart",
    "PixArtTransformer2DModel",
    {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "sample_size": 8,
        "patch_size": 2,
        "cross_attention_dim": 32,
        "caption_channels": 24,
        "use_additional_conditions": False,
    },
    _loop(
        {
            "hidden_states": "state",
            "timestep": "timestep",
            "encoder_hidden_states": _text(6, 24),
            "encoder_attention_mask": _mask(6, "int64"),
        },
        [4, 8, 8],
        constants={"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
        guidance={"scale": 2.0, "unconditional": "input"},
    ),
)
SD3 = ZooModel(
    "sd3",
    "SD3Transformer2DModel",
    {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 20,
        "pos_embed_max_size": 12,
        "qk_norm": "rms_norm",
        "dual_attention_layers": (0,),
    },
    _loop(
        {
            "hidden_states": "state",
            "timestep": "timestep",
            "encoder_hidden_states": _text(6, 24),
            "pooled_projections": _text(20),
        },
        [4, 8, 8],
        sampler=FLOW,
        guidance={"scale": 3.5, "unconditional": "input"},
    ),
)
FLUX = ZooModel(
    "flux",
    "FluxTransformer2DModel",
    {
        "patch_size": 1,
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 20,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 6, 6),
    },
    _loop(
        {
            "hidden_states": "state",
            "timestep": "timestep",
            "encoder_hidden_states": _text(6, 24),
            "pooled_projections": _text(20),
            "guidance": _text(),
            "img_ids": {"role": "constant", "shape": [16, 3], "dtype": "float32"},
            "txt_ids": {"role": "constant", "shape": [6, 3], "dtype": "float32"},
        },
        [16, 16],
        sampler=FLOW | THOUSANDTH,
    ),
    constants={"img_ids": _image_ids(4, 4), "txt_ids": torch.zeros(6, 3)},
)
SANA = ZooModel(
    "sana",
    "SanaTransformer2DModel",
    {
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 16,
        "cross_attention_dim": 32,
        "caption_channels": 24,
        "sample_size": 8,
        "patch_size": 1,
    },
    _loop(
        {
            "hidden_states": "state",
            "timestep": "timestep",
            "encoder_hidden_states": _text(6, 24),
            "encoder_attention_mask": _mask(6, "int64"),
        },
        [4, 8, 8],
        sampler=FLOW,
        guidance={"scale": 4.5, "unconditional": "input"},
    ),
)
COGVIDEOX = ZooModel(
    "cogvideox",
    "CogVideoXTransformer3DModel",
    {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 8,
        "text_embed_dim": 24,
        "num_layers": 2,
        "sample_width": 8,
        "sample_height": 8,
        "sample_frames": 9,
        "patch_size": 2,
        "temporal_compression_ratio": 4,
        "max_text_seq_length": 6,
    },
    _loop(
        {"hidden_states": "state", "timestep": "timestep", "encoder_hidden_states": _text(6, 24)},
        [3, 4, 8, 8],
        guidance={"scale": 6.0, "unconditional": "input"},
    ),
)
WAN = ZooModel(
    "wan",
    "WanTransformer3DModel",
    {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 24,
        "freq_dim": 32,
        "ffn_dim": 48,
        "num_layers": 2,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 32,
    },
    _loop(
        {"hidden_states": "state", "timestep": "timestep", "encoder_hidden_states": _text(6, 24)},
        [4, 2, 8, 8],
        sampler=FLOW,
        guidance={"scale": 5.0, "unconditional": "input"},
    ),
)
QWENIMAGE = ZooModel(
    "qwenimage",
    "QwenImageTransformer2DModel",
    {
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "axes_dims_rope": (4, 6, 6),
    },
    _loop(
        {
            "hidden_states": "state",
            "timestep": "timestep",
            "encoder_hidden_states": _text(6, 24),
            "encoder_hidden_states_mask": _mask(6, "int64"),
        },
        [16, 16],
        sampler=FLOW | THOUSANDTH,
        constants={"img_shapes": [[[1, 4, 4]]]},
        guidance={"scale": 4.0, "unconditional": "input"},
    ),
)
HUNYUANVIDEO = ZooModel(
    "hunyuanvideo",
    "HunyuanVideoTransformer3DModel",
    {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
        "patch_size": 2,
        "patch_size_t": 1,
        "guidance_embeds": True,
        "text_embed_dim": 24,
        "pooled_projection_dim": 20,
        "rope_axes_dim": (2, 4, 6),
    },
    _loop(
        {
            "hidden_states": "state",
            "timestep": "timestep",
            "encoder_hidden_states": _text(6, 24),
            "encoder_attention_mask": _mask(6, "int64"),
            "pooled_projections": _text(20),
            "guidance": _text(),
        },
        [4, 2, 8, 8],
        sampler=FLOW,
    ),
)
UNET = ZooModel(
    "unet",
    "UNet2DConditionModel",
    {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 24,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    },
    _loop(
        {"sample": "state", "timestep": "timestep", "encoder_hidden_states": _text(6, 24)},
        [4, 8, 8],
        guidance={"scale": 7.5, "unconditional": "input"},
    ),
)
VAE_DECODER = ZooModel(
    "vae_decoder",
    "AutoencoderKL",
    {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
        "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
        "block_out_channels": (16, 32),
        "latent_channels": 4,
        "norm_num_groups": 8,
        "sample_size": 16,
    },
    {"component": {"method": "decode"}, "inputs": {"z": _text(4, 8, 8)}},
)
CLIP_TEXT = ZooModel(
    "clip_text",
    "CLIPTextModel",
    {
        "_config": "CLIPTextConfig",
        "_length": 12,
        "_inputs": ("input_ids",),
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "projection_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 12,
        "bos_token_id": 0,
        "eos_token_id": 2,
    },
    None,
    library="transformers",
)
T5_ENCODER = ZooModel(
    "t5_encoder",
    "T5EncoderModel",
    {
        "_config": "T5Config",
        "_length": 16,
        "_inputs": ("input_ids",),
        "vocab_size": 64,
        "d_model": 32,
        "d_kv": 16,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 2,
        "n_positions": 16,
        "feed_forward_proj": "gated-gelu",
    },
    None,
    library="transformers",
)
BERT = ZooModel(
    "bert",
    "BertModel",
    {
        "_config": "BertConfig",
        "_length": 12,
        "_inputs": ("input_ids", "attention_mask"),
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 12,
    },
    None,
    library="transformers",
)

ZOO = (
    DIT,
    PIXART,
    SD3,
    FLUX,
    SANA,
    COGVIDEOX,
    WAN,
    QWENIMAGE,
    HUNYUANVIDEO,
    UNET,
    VAE_DECODER,
    CLIP_TEXT,
    T5_ENCODER,
    BERT,
)
BY_NAME = {model.name: model for model in ZOO}
LONG_TO_CAPTURE = (PIXART, SD3, FLUX, SANA, COGVIDEOX, WAN, QWENIMAGE, HUNYUANVIDEO, UNET)
EACH = [
    pytest.param(model, id=model.name, marks=[pytest.mark.slow] if model in LONG_TO_CAPTURE else []) for model in ZOO
]
"""Of `ZOO`, for tests that need a capture; those that take long are for the slow tests."""


def config_of(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a saved folder."""
    return json.loads((folder / "config.json").read_text())
