"""Which layers of a denoiser an adapter sits on, when the user does not say."""

from __future__ import annotations

# peft's two forms: a list matches the ends of module names, a string is a regular expression for whole names.
_FLUX_ATTENTION = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
]
# The single blocks' proj_out needs its full name: the model's own last layer is called proj_out, too.
_FLUX_ATTENTION_FF = (
    r".*\.attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
    r"|.*\.(ff|ff_context)\.net\.(0\.proj|2)"
    r"|single_transformer_blocks\.\d+\.(proj_mlp|proj_out)"
)

DEFAULT_PRESET = "attention"
PRESETS = ("attention", "attention+ff", "all-linear")
TARGET_MODULES: dict[str, dict[str, list[str] | str]] = {
    "FluxTransformer2DModel": {"attention": _FLUX_ATTENTION, "attention+ff": _FLUX_ATTENTION_FF},
}


def default_target_modules(model_class: str, preset: str = DEFAULT_PRESET) -> list[str] | str | None:
    """The target modules for a diffusers denoiser.

    Args:
        model_class: the class name, for example "FluxTransformer2DModel".
        preset: "attention" (all projections of every attention) or "attention+ff" (the feed-forward layers as
        well).

    Returns:
        A value for a config's ``target_modules``, or None if the class or the preset is not known.
    """
    return TARGET_MODULES.get(model_class, {}).get(preset)
