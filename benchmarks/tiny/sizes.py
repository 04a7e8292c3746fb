"""Configurations of published models, made small enough for a processor; every other key stays as it is.

Widths that another component has to match (of text embeddings, of what is projected to them) are all divided by one
number, so that those that were equal stay equal, and those that were sums stay sums. Sizes inside a component are capped,
or given for its class where several have to fit each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Config = Mapping[str, Any]
Rule = Callable[[Any], Any]


def divided(by: int) -> Rule:
    """A rule that divides numbers, those in lists included; what is no number stays."""

    def rule(value: Any) -> Any:
        if isinstance(value, list):
            return [rule(entry) for entry in value]
        return type(value)(max(1, value // by)) if _is_number(value) else value

    return rule


def at_most(limit: int) -> Rule:
    """A rule that caps numbers, those in lists included; what is no number stays."""

    def rule(value: Any) -> Any:
        if isinstance(value, list):
            return [rule(entry) for entry in value]
        return min(limit, value) if _is_number(value) else value

    return rule


def exactly(size: Any) -> Rule:
    """A rule that gives a size where there is one; None stays."""
    return lambda value: value if value is None else size


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


SHARED = divided(32)
CHANNELS = divided(16)
LAYERS = at_most(2)
HEADS = at_most(2)

BY_KEY: Mapping[str, Rule] = {
    # widths that have to match those of another component
    **dict.fromkeys(
        (
            "addition_time_embed_dim",
            "cap_feat_dim",
            "caption_channels",
            "caption_projection_dim",
            "clip_image_in_channels",
            "clip_text_in_channels",
            "clip_text_pooled_in_channels",
            "conditioning_dim",
            "cross_attention_dim",
            "cross_attention_dim_t5",
            "cross_attention_input_dim",
            "d_model",
            "encoder_hid_dim",
            "global_states_input_dim",
            "hidden_size",
            "joint_attention_dim",
            "out_hidden_size",
            "pooled_projection_dim",
            "projection_class_embeddings_input_dim",
            "projection_dim",
            "text_dim",
            "text_embed_dim",
            "text_encoder_dim",
        ),
        SHARED,
    ),
    # widths of a component's own
    **dict.fromkeys(("d_ff", "intermediate_size", "ffn_dim", "upsample_initial_channel"), divided(32)),
    **dict.fromkeys(("block_out_channels", "base_dim", "decoder_base_dim"), CHANNELS),
    **dict.fromkeys(("encoder_hidden_size", "decoder_channels"), CHANNELS),
    "conditioning_embedding_out_channels": divided(4),
    "norm_num_groups": at_most(4),
    **dict.fromkeys(("freq_dim", "time_embed_dim", "time_proj_dim", "timestep_guidance_channels"), at_most(32)),
    # attention
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_heads", "n_kv_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_key_value_attention_heads"), at_most(1)),
    **dict.fromkeys(("head_dim", "d_kv"), at_most(16)),
    # depth
    **dict.fromkeys(
        (
            "depth",
            "n_layers",
            "num_decoder_layers",
            "num_hidden_layers",
            "num_layers",
            "num_single_layers",
            "transformer_layers_per_block",
        ),
        LAYERS,
    ),
    **dict.fromkeys(
        (
            "down_num_layers_per_block",
            "layers_per_block",
            "n_refiner_layers",
            "num_refiner_layers",
            "num_res_blocks",
            "up_num_layers_per_block",
        ),
        at_most(1),
    ),
    # images
    **dict.fromkeys(("sample_size", "sample_height", "sample_width", "pos_embed_max_size"), divided(8)),
}

UNET: Mapping[str, Rule] = {
    "attention_head_dim": HEADS,  # the number of heads, whatever the key says
    "cross_attention_dim": lambda width: (CHANNELS if isinstance(width, list) else SHARED)(width),  # a list: its own
}
ROPE_OF_THREE: Mapping[str, Rule] = {"attention_head_dim": exactly(16), "axes_dims_rope": exactly([4, 6, 6])}
BY_CLASS: Mapping[str, Mapping[str, Rule]] = {
    "UNet2DConditionModel": UNET,
    "UNet3DConditionModel": UNET,
    "ControlNetModel": UNET,
    "UNet2DModel": {"sample_size": exactly(32)},  # halved by each of six blocks but one
    "FluxTransformer2DModel": ROPE_OF_THREE,
    "FluxControlNetModel": ROPE_OF_THREE,
    "QwenImageTransformer2DModel": ROPE_OF_THREE,
    "Flux2Transformer2DModel": {"attention_head_dim": exactly(16), "axes_dims_rope": exactly([4, 4, 4, 4])},
    "SD3Transformer2DModel": {
        "num_attention_heads": exactly(6),
        "attention_head_dim": exactly(8),  # 6 * 8 = 1536 / 32, the width of its captions
        "num_layers": at_most(3),
        "dual_attention_layers": lambda layers: [layer for layer in layers or () if layer < 3],
    },
    "Transformer2DModel": {
        "num_attention_heads": exactly(4),
        "attention_head_dim": exactly(9),  # 4 * 9 = 1152 / 32, the width of its captions
        "sample_size": lambda size: size if size == 128 else size // 8,  # PixArt's 128 switches conditions on
    },
    "HunyuanDiT2DModel": {"attention_head_dim": exactly(16), "hidden_size": exactly(32)},
    "CogVideoXTransformer3DModel": {"attention_head_dim": exactly(16), "sample_frames": exactly(9)},
    "WanTransformer3DModel": {"attention_head_dim": exactly(12)},
    "LTXVideoTransformer3DModel": {
        "num_attention_heads": exactly(4),
        "attention_head_dim": exactly(16),  # 4 * 16 = 2048 / 32, the width of its captions
    },
    "Lumina2Transformer2DModel": {
        "num_attention_heads": exactly(6),
        "num_kv_heads": exactly(2),
        "axes_dim_rope": exactly([4, 4, 4]),  # 6 * 12 = 2304 / 32, its width
        "multiple_of": at_most(16),
    },
    "ZImageTransformer2DModel": {"dim": exactly(32), "axes_dims": exactly([4, 6, 6])},
    "StableAudioDiTModel": {
        "num_attention_heads": exactly(4),
        "num_key_value_attention_heads": exactly(2),
        "attention_head_dim": exactly(8),
        "sample_size": divided(64),
    },
    "StableCascadeUNet": {"block_out_channels": divided(32)},
    "StableDiffusionSafetyChecker": {"vocab_size": exactly(100)},  # it reads no text
    "Qwen3ForCausalLM": {"num_hidden_layers": at_most(27)},  # of which FLUX.2 klein reads the 27th
    "Mistral3ForConditionalGeneration": {
        "num_hidden_layers": at_most(30),  # of which FLUX.2 reads the 30th
        "image_token_index": exactly(261),
    },
    "Qwen2_5_VLForConditionalGeneration": {
        "mrope_section": exactly([8, 10, 10]),  # half of 3584 / 32 / 2
        "vision_start_token_id": exactly(259),
        "vision_end_token_id": exactly(260),
        "vision_token_id": exactly(261),
        "image_token_id": exactly(261),
        "video_token_id": exactly(262),
    },
}
DEFAULTS_TOO_LARGE: Mapping[str, Config] = {
    "UNet2DConditionModel": {"norm_num_groups": 4},
    "FluxTransformer2DModel": {"axes_dims_rope": [4, 6, 6]},
    "FluxControlNetModel": {"axes_dims_rope": [4, 6, 6]},
    "AutoencoderKLWan": {"base_dim": 6},
    "AutoencoderKLLTXVideo": {
        "decoder_block_out_channels": [8, 16, 32, 32],
        "decoder_layers_per_block": [1, 1, 1, 1, 1],
    },
}
"""Keys that published configurations leave out, and whose defaults are not for a processor."""


def shrunk(config: Config, name: str, vocabulary: int | None = None) -> dict[str, Any]:
    """A tiny configuration.

    Args:
        config: The published one.
        name: Class of the component.
        vocabulary: Number of tokens, of a text encoder.
    """
    rules = dict(BY_KEY) | dict(BY_CLASS.get(name, {}))
    if vocabulary is not None:
        rules |= {"vocab_size": exactly(vocabulary)} | dict.fromkeys(
            ("bos_token_id", "eos_token_id", "pad_token_id"), at_most(vocabulary - 1)
        )
    return dict(DEFAULTS_TOO_LARGE.get(name, {})) | _apply(rules, config)


def _apply(rules: Mapping[str, Rule], config: Config) -> dict[str, Any]:
    def small(key: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return _apply(rules, value)
        return rules[key](value) if key in rules else value

    return {key: small(key, value) for key, value in config.items()}
