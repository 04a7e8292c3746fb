"""Folders of tiny text-to-image pipelines with random weights, and tokenizers of letters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
import zoo
from safetensors.torch import save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = [*(f"{letter}{end}" for letter in LETTERS for end in ("", "</w>")), "!", "<|startoftext|>", "<|endoftext|>"]
PIECES = ["<pad>", "</s>", "<unk>", "▁", *LETTERS]
LENGTH = 12  # tokens of a prompt for CLIP


def clip_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=LENGTH, pad_token=pad_token)


def t5_tokenizer() -> T5Tokenizer:
    return T5Tokenizer(vocab=[(piece, -float(number)) for number, piece in enumerate(PIECES)], extra_ids=0)


def clip(width: int, projection: int | None = None) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(WORDS),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=projection or width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=len(WORDS) - 2,
        eos_token_id=len(WORDS) - 1,
    )
    return CLIPTextModel(config) if projection is None else CLIPTextModelWithProjection(config)


def t5(width: int, multilingual: bool = False) -> Any:
    sizes = {"d_model": width, "d_kv": 8, "d_ff": 2 * width, "num_layers": 2, "num_heads": 2}
    rest = {"vocab_size": len(PIECES), "feed_forward_proj": "gated-gelu"}
    return UMT5EncoderModel(UMT5Config(**sizes, **rest)) if multilingual else T5EncoderModel(T5Config(**sizes, **rest))


def _called(folder: Path, **numbers: float) -> Path:
    """Arguments of the pipeline's call that are other than its defaults."""
    save_file({name: torch.tensor(value) for name, value in numbers.items()}, folder / "inputs.safetensors")
    return folder


def vae(**changes: Any) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(**(zoo.VAE_DECODER.config | {"scaling_factor": 0.5, "shift_factor": 0.1} | changes))


def sd3(folder: Path, with_t5: bool = True) -> Path:
    """Stable Diffusion 3: two CLIP encoders, and T5 or not."""
    torch.manual_seed(0)
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=zoo.SD3.build(),
        vae=vae(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=clip(8, 8),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(16, 12),
        tokenizer_2=clip_tokenizer("!"),
        text_encoder_3=t5(24) if with_t5 else None,
        tokenizer_3=t5_tokenizer() if with_t5 else None,
    )
    pipeline.save_pretrained(folder)
    return folder


def flux(folder: Path) -> Path:
    """FLUX: CLIP for the pooled embedding, T5 for the tokens, a distilled guidance scale."""
    torch.manual_seed(0)
    pipeline = diffusers.FluxPipeline(
        transformer=zoo.FLUX.build(),
        vae=vae(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        text_encoder=clip(20),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(24),
        tokenizer_2=t5_tokenizer(),
    )
    pipeline.save_pretrained(folder)
    return folder


def unet(**changes: Any) -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(**(zoo.UNET.config | changes))


def stable_diffusion(folder: Path, **changes: Any) -> Path:
    """Stable Diffusion 1: one CLIP encoder; `changes` are those of the UNet's configuration."""
    torch.manual_seed(0)
    pipeline = diffusers.StableDiffusionPipeline(
        unet=unet(**changes),
        vae=vae(),
        scheduler=diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1),
        text_encoder=clip(24),
        tokenizer=clip_tokenizer(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def sdxl(folder: Path) -> Path:
    """Stable Diffusion XL: two CLIP encoders, sizes beside the pooled embedding."""
    torch.manual_seed(0)
    pipeline = diffusers.StableDiffusionXLPipeline(
        unet=unet(
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=60,  # 6 * 8 of the sizes + 12 of the pooled embedding
        ),
        vae=vae(),
        scheduler=diffusers.EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1),
        text_encoder=clip(8),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(16, 12),
        tokenizer_2=clip_tokenizer("!"),
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def pixart(folder: Path, name: str = "PixArtAlphaPipeline", **changes: Any) -> Path:
    """PixArt: T5 with a mask; a size that is none of those it was trained for, unless `changes` say another."""
    torch.manual_seed(0)
    pipeline = getattr(diffusers, name)(
        transformer=diffusers.PixArtTransformer2DModel(**(zoo.PIXART.config | changes)),
        vae=vae(),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
        text_encoder=t5(24),
        tokenizer=t5_tokenizer(),
    )
    pipeline.save_pretrained(folder)
    return _called(folder, use_resolution_binning=bool(changes))


WAN_CALL = {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 32}
LTX_CALL = {"height": 32, "width": 64, "num_frames": 3, "max_sequence_length": 32}
COGVIDEOX_CALL = {"num_frames": 9, "max_sequence_length": 32}


def wan(folder: Path) -> Path:
    """Wan 2.1: three latent frames, decoded one after the other."""
    torch.manual_seed(0)
    autoencoder = diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.1, -0.2, 0.3, -0.4],
        latents_std=[1.5, 0.5, 2.0, 1.0],
        scale_factor_temporal=2,
        scale_factor_spatial=2,
    )
    pipeline = diffusers.WanPipeline(
        transformer=zoo.WAN.build(),
        vae=autoencoder,
        scheduler=diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        text_encoder=t5(24, multilingual=True),
        tokenizer=t5_tokenizer(),
    )
    pipeline.save_pretrained(folder)
    return _called(folder, **WAN_CALL)


def cogvideox(folder: Path) -> Path:
    """CogVideoX: five latent frames, decoded as three and two."""
    torch.manual_seed(0)
    autoencoder = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 2,
        up_block_types=("CogVideoXUpBlock3D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        temporal_compression_ratio=2,
        scaling_factor=0.7,
    )
    changes = {"max_text_seq_length": COGVIDEOX_CALL["max_sequence_length"], "temporal_compression_ratio": 2}
    pipeline = diffusers.CogVideoXPipeline(
        transformer=diffusers.CogVideoXTransformer3DModel(**(zoo.COGVIDEOX.config | changes)),
        vae=autoencoder,
        scheduler=diffusers.CogVideoXDDIMScheduler(),
        text_encoder=t5(24),
        tokenizer=t5_tokenizer(),
    )
    pipeline.save_pretrained(folder)
    return _called(folder, **COGVIDEOX_CALL)


def ltx(folder: Path, **changes: Any) -> Path:
    """LTX-Video: two latent frames as patches; `changes` are those of the autoencoder's configuration."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "latent_channels": 8,
        "block_out_channels": (8,),
        "down_block_types": ("LTXVideoDownBlock3D",),
        "decoder_block_out_channels": (8,),
        "layers_per_block": (1, 1),
        "decoder_layers_per_block": (1, 1),
        "spatio_temporal_scaling": (True,),
        "decoder_spatio_temporal_scaling": (True,),
        "decoder_inject_noise": (False, False),
        "downsample_type": ("conv",),
        "upsample_residual": (False,),
        "upsample_factor": (1,),
    }
    autoencoder = diffusers.AutoencoderKLLTXVideo(**(sizes | changes))
    autoencoder.latents_mean.normal_()
    autoencoder.latents_std.uniform_(0.5, 2)
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        num_layers=2,
        caption_channels=24,
    )
    pipeline = diffusers.LTXPipeline(
        transformer=transformer,
        vae=autoencoder,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        text_encoder=t5(24),
        tokenizer=t5_tokenizer(),
    )
    pipeline.save_pretrained(folder)
    return _called(folder, **LTX_CALL)


def text_to_video(folder: Path) -> Path:
    """A UNet over frames, which its scheduler gets as rows."""
    torch.manual_seed(0)
    network = diffusers.UNet3DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=24,
        attention_head_dim=4,
    )
    diffusers.TextToVideoSDPipeline(
        unet=network,
        vae=vae(latent_channels=4, shift_factor=None),
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
        text_encoder=clip(24),
        tokenizer=clip_tokenizer(),
    ).save_pretrained(folder)
    return folder


def chroma(folder: Path) -> Path:
    """Chroma: a FLUX without distilled guidance, whose model counts its batch in Python."""
    torch.manual_seed(0)
    network = diffusers.ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    diffusers.ChromaPipeline(
        transformer=network,
        vae=vae(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=t5(24),
        tokenizer=t5_tokenizer(),
    ).save_pretrained(folder)
    return folder


def unconditional(folder: Path, **config: Any) -> Path:
    """An unconditional UNet with DDIM, which clips unless `config` says otherwise."""
    torch.manual_seed(0)
    network = diffusers.UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    diffusers.DDIMPipeline(network, diffusers.DDIMScheduler(**config)).save_pretrained(folder)
    return folder


def dit(folder: Path) -> Path:
    """DiT: a thousand classes."""
    torch.manual_seed(0)
    pipeline = diffusers.DiTPipeline(
        transformer=diffusers.DiTTransformer2DModel(**(zoo.DIT.config | {"num_embeds_ada_norm": 1000})),
        vae=vae(),
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
    )
    pipeline.save_pretrained(folder)
    return folder
