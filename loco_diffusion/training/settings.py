"""The sections of the configuration, but for that of the data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from loco_diffusion.errors import UserError
from loco_diffusion.options import peft_config

if TYPE_CHECKING:
    from peft import PeftConfig


class Settings(BaseModel):
    """A section of the configuration; unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class EncoderSettings(Settings):
    """The control-condition encoder."""

    input: Literal["pixels", "latents"] = Field(
        default="pixels", description="What it reads: the map's pixels, or the VAE's latents of the map."
    )
    hidden_size: int = Field(default=256, ge=1, description="Width between its two layers.")


class TokensSettings(Settings):
    """The tokens route."""

    stride: int = Field(
        default=1,
        ge=1,
        description="Tokens of the picture, along a side, that one of the condition stands for.",
    )
    joint: bool = Field(
        default=False, description="Whether the condition's tokens see the picture (FLUX.1 only)."
    )


class AdapterSettings(Settings):
    """The adapter in the denoiser's linear layers, of any method that peft knows."""

    method: str = Field(
        default="loco", description="Name of the peft method: loco, lora, oft, hra, boft, ..."
    )
    target_modules: str | list[str] = Field(
        default="attention",
        description='Layers: "attention", "attention+ff", ends of module names, or a regular expression.',
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="Further fields of the method's own config class; for loco r, num_rotations, alpha, "
        "chain_order, map, ...",
    )

    fit_after: int = Field(
        default=0,
        ge=0,
        description="Steps in which the condition encoder learns alone before the adapter is fitted to gradients "
        "again (loco with init skew; loft with support gradient or skew): at the start the encoder gives zeros, so "
        "that the gradients do not know the condition.",
    )

    @model_validator(mode="after")
    def _options_fit_the_method(self) -> AdapterSettings:
        self.peft_config(self.target_modules)
        return self

    def peft_config(self, target_modules: str | list[str]) -> PeftConfig:
        """The method's config.

        Args:
            target_modules: in peft's form, without our presets.

        Raises:
            ValueError: the method is unknown, or does not accept the options.
        """
        return peft_config(self.method, target_modules, self.options)


class TimestepSettings(Settings):
    """How the noise level sigma in [0, 1] of a training example is drawn, and how much its error counts.

    For models that predict noise (Stable Diffusion 1, 2 and XL, PixArt), sigma is a share of the training timesteps.
    """

    sampling: Literal["uniform", "logit_normal", "mode"] | None = Field(
        default=None,
        description="Distribution before the shift (Esser et al. 2024, arXiv 2403.03206): uniform, "
        "logit_normal or mode; default: logit_normal for flow matching, uniform where noise is predicted.",
    )
    mean: float = Field(
        default=0.0,
        description="Of logit_normal, before the sigmoid; above 0, more noise (less in diffusers).",
    )
    std: float = Field(default=1.0, gt=0, description="Of logit_normal, before the sigmoid.")
    mode_scale: float = Field(
        default=1.29, ge=-1, le=1.75, description="Of mode: above 0, more of the middle; below, less."
    )
    shift: float | None = Field(
        default=None,
        gt=0,
        description="sigma becomes shift sigma / (1 + (shift - 1) sigma); above 1, more noise. Default: as the base's "
        "scheduler has it, so that adapters learn at the times at which they draw; 1 where that depends on the "
        "picture's size, and where noise is predicted.",
    )
    weighting: Literal["none", "sigma_sqrt", "cosmap", "min_snr"] | None = Field(
        default=None,
        description="Of errors by sigma: for flow matching none (the default), sigma_sqrt or cosmap (Esser et "
        "al. 2024); where noise is predicted min_snr (Hang et al. 2023, arXiv 2303.09556; the default) or none.",
    )
    snr_gamma: float = Field(
        default=5.0,
        gt=0,
        description="Of min_snr: the signal-to-noise ratio above which errors count the same.",
    )

    def resolved(self, flow: bool, scheduler: Any = None) -> TimestepSettings:
        """With the defaults of a model.

        Args:
            flow: whether it predicts velocities, as `Family.flow` says.
            scheduler: of its pipeline.

        Raises:
            UserError: the weighting is of the other kind.
        """
        weightings = ("none", "sigma_sqrt", "cosmap") if flow else ("none", "min_snr")
        if self.weighting is not None and self.weighting not in weightings:
            kind = "matches flows" if flow else "predicts noise"
            raise UserError(
                f"timesteps.weighting is {self.weighting}, but this base {kind}; use {' or '.join(weightings)}."
            )
        sampling, weighting = ("logit_normal", "none") if flow else ("uniform", "min_snr")
        return self.model_copy(
            update={
                "sampling": self.sampling or sampling,
                "weighting": self.weighting or weighting,
                "shift": self.shift or (_shift_of(scheduler) if flow else 1.0),
            }
        )


def _shift_of(scheduler: Any) -> float:
    """By which a scheduler of flow matching shifts the times of every picture."""
    config = getattr(scheduler, "config", {})
    return 1.0 if config.get("use_dynamic_shifting") else float(config.get("shift", 1.0))


class ValidationSettings(Settings):
    """Pictures that are drawn under held-out conditions, and scored, while the adapter learns."""

    pictures: int = Field(default=4, ge=0, le=64, description="How many; 0 draws none.")
    every: int = Field(
        default=500,
        ge=1,
        description="Steps between them; also of rotation angles and orthogonality. The last step has them, too.",
    )
    steps: int | None = Field(
        default=None, ge=1, description="Denoising steps a picture; default: what suits the base."
    )
    guidance: float | None = Field(
        default=None, ge=0, le=100, description="Guidance scale; default: what suits the base."
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="Of the first picture's noise; others count on.")
    path: str | None = Field(
        default=None,
        description="Folder of their originals, with a metadata.jsonl. Default: the first scenes of the "
        "validation seeds; of other data the first pictures (a tenth at most), which are not trained on then; "
        "of streams none.",
    )
