"""Which layers of a denoiser an adapter sits on, when the user does not say."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

Preset = Literal["attention", "attention+ff", "all-linear"]
PRESETS: tuple[Preset, ...] = get_args(Preset)
DEFAULT_PRESET: Preset = "attention"


class _Layers(NamedTuple):
    """Regular expressions for the names of a model's linear layers: those of the attention, of the
    feed-forward parts, and all others but the last layer of the model."""

    attention: str
    feed_forward: str
    others: str


_SELF = r"to_q|to_k|to_v|to_out\.0"
_JOINT = rf"{_SELF}|add_q_proj|add_k_proj|add_v_proj|to_add_out"
_FF = r".*\.ff(_context)?\.net\.(0\.proj|2)"
_EMBEDDER = r"(timestep|text|guidance)_embedder\.linear_[12]"

_LAYERS = {
    "FluxTransformer2DModel": _Layers(
        rf".*\.attn\.({_JOINT})",
        rf"{_FF}|single_transformer_blocks\.\d+\.(proj_mlp|proj_out)",
        rf"(x|context)_embedder|time_text_embed\.{_EMBEDDER}|.*norm\w*\.linear",
    ),
    "Flux2Transformer2DModel": _Layers(
        # In a single block, one layer makes queries, keys, values and the feed-forward part.
        rf".*\.attn\.({_JOINT})|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)",
        r".*\.ff(_context)?\.linear_(in|out)",
        rf"(x|context)_embedder|time_guidance_embed\.{_EMBEDDER}|.*_modulation\w*\.linear|norm_out\.linear",
    ),
    "SD3Transformer2DModel": _Layers(
        rf".*\.attn2?\.({_JOINT})", _FF, rf"context_embedder|time_text_embed\.{_EMBEDDER}|.*norm\w*\.linear"
    ),
    "PixArtTransformer2DModel": _Layers(
        rf".*\.attn[12]\.({_SELF})",
        _FF,
        r"caption_projection\.linear_[12]|adaln_single\.(linear|emb\.\w+_embedder\.linear_[12])",
    ),
    "SanaTransformer2DModel": _Layers(
        rf".*\.attn[12]\.({_SELF})",
        r".*\.ff\.conv_(inverted|point)",  # 1 x 1 convolutions; the one between them is grouped
        r"caption_projection\.linear_[12]|time_embed\.linear|time_embed\.(\w+\.)?\w+_embedder\.linear_[12]",
    ),
    "QwenImageTransformer2DModel": _Layers(
        rf".*\.attn\.({_JOINT})",
        r".*\.(img|txt)_mlp\.net\.(0\.proj|2)",
        rf"(img|txt)_in|time_text_embed\.{_EMBEDDER}|.*\.(img|txt)_mod\.1|norm_out\.linear",
    ),
    "UNet2DConditionModel": _Layers(
        rf".*\.attn[12]\.({_SELF})",
        _FF,
        r"(time|add|class)_embedding\.linear_[12]|encoder_hid_proj|.*\.time_emb_proj"
        r"|.*\.attentions\.\d+\.proj_(in|out)",  # 1 x 1 convolutions in the oldest models
    ),
}
DENOISERS: tuple[str, ...] = tuple(_LAYERS)


def default_target_modules(model_class: str, preset: str = DEFAULT_PRESET) -> str | None:
    """The target modules for a diffusers denoiser.

    Args:
        model_class: the class name, for example "FluxTransformer2DModel".
        preset: "attention" (all projections of every attention), "attention+ff" (the feed-forward layers as
            well; Sana's are convolutions) or "all-linear" (all linear layers but the model's last one, and the
            feed-forward layers).

    Returns:
        A regular expression for a config's ``target_modules``, or None if the class or the preset is not known.
    """
    if model_class not in _LAYERS or preset not in PRESETS:
        return None
    return "|".join(_LAYERS[model_class][: PRESETS.index(preset) + 1])  # type: ignore[arg-type]
