"""What a denoiser learns from a batch: to undo noise, as its family and its scheduler have it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from diffusers import DDPMScheduler
from diffusers.training_utils import compute_loss_weighting_for_sd3, compute_snr
from torch import Tensor, nn

from loco_diffusion.control.family import Pipeline, family_of
from loco_diffusion.errors import UserError
from loco_diffusion.training.config import TrainingConfig
from loco_diffusion.training.examples import Batch
from loco_diffusion.training.settings import TimestepSettings

LEAST_SIGMA = 1e-3
"""For weights: the smallest noise level of the schedulers of flow-matching models, which have 1,000."""


@dataclass
class Question:
    """What the denoiser is asked about B examples, and the right answer.

    Attributes:
        noisy: noised latents (B, C, h, w).
        sigmas: (B,) in [0, 1], the time in the meaning of `Family.predict`.
        answer: (B, C, h, w).
        weights: (B,) of the squared errors; None for all 1.
    """

    noisy: Tensor
    sigmas: Tensor
    answer: Tensor
    weights: Tensor | None = None


Ask: TypeAlias = Callable[[Batch], Question]


class FlowMatching:
    """Velocities (Lipman et al. 2023, arXiv 2210.02747).

    At (1 - sigma) latents + sigma noise, the velocity noise - latents is to be predicted.

    Args:
        settings: with `weighting` none, sigma_sqrt or cosmap (Esser et al. 2024, arXiv 2403.03206).
    """

    def __init__(self, settings: TimestepSettings) -> None:
        self.weighting = settings.weighting

    def __call__(self, batch: Batch) -> Question:
        sigmas = _beside(batch.sigmas, batch.latents)
        noisy = (1 - sigmas) * batch.latents + sigmas * batch.noise
        weights = None
        if self.weighting != "none":
            weights = compute_loss_weighting_for_sd3(self.weighting, batch.sigmas.clamp(min=LEAST_SIGMA))
        return Question(noisy, batch.sigmas, batch.noise - batch.latents, weights)


class NoisePrediction:
    """The noise, or what else the scheduler's `prediction_type` says (Ho et al. 2020, arXiv 2006.11239; v of
    Salimans and Ho 2022, arXiv 2202.00512), at the scheduler's own noise levels.

    Args:
        settings: with `weighting` none or min_snr (Hang et al. 2023, arXiv 2303.09556, section 3.4).
        scheduler: of the pipeline; its class does not matter.

    Raises:
        UserError: the scheduler does not noise in this way, or something else is to be predicted.
    """

    def __init__(self, settings: TimestepSettings, scheduler: Any) -> None:
        if not hasattr(scheduler, "alphas_cumprod"):
            raise UserError(
                f"This model predicts noise, but its {type(scheduler).__name__} knows no alphas; load a base with "
                "its own scheduler."
            )
        kind = scheduler.config.prediction_type
        if kind not in ("epsilon", "v_prediction", "sample"):
            raise UserError(
                f"This model's scheduler has prediction_type {kind}, which cannot be trained; use a base with "
                "epsilon, v_prediction or sample."
            )
        self.kind = kind
        self.snr_gamma = settings.snr_gamma if settings.weighting == "min_snr" else None
        self.scheduler: Any = DDPMScheduler.from_config(scheduler.config)

    def __call__(self, batch: Batch) -> Question:
        last = self.scheduler.config.num_train_timesteps - 1
        timesteps = (batch.sigmas * (last + 1)).long().clamp(max=last)
        noisy = self.scheduler.add_noise(batch.latents, batch.noise, timesteps)
        if self.kind == "epsilon":
            answer = batch.noise
        elif self.kind == "sample":
            answer = batch.latents
        else:
            answer = self.scheduler.get_velocity(batch.latents, batch.noise, timesteps)
        return Question(noisy, timesteps / (last + 1), answer, self._weights(timesteps))

    def _weights(self, timesteps: Tensor) -> Tensor | None:
        """min(SNR, gamma) as the weight of the clean latents' error, in terms of what is predicted."""
        if self.snr_gamma is None:
            return None
        snr = compute_snr(self.scheduler, timesteps)
        clipped = snr.clamp(max=self.snr_gamma)
        if self.kind == "sample":
            return clipped
        return clipped / (snr if self.kind == "epsilon" else snr + 1)


class Objective:
    """The loss of a pipeline's denoiser.

    Args:
        config: of the run.
        pipe: whose denoiser and scheduler count.

    Raises:
        UserError: the family or the scheduler does not suit `config.timesteps`.
    """

    def __init__(self, config: TrainingConfig, pipe: Pipeline) -> None:
        self.family = family_of(pipe)
        self.denoiser = self.family.denoiser(pipe)
        self.guidance = config.guidance
        settings = config.timesteps.resolved(self.family.flow, pipe.scheduler)
        flow = self.family.flow
        self.ask: Ask = FlowMatching(settings) if flow else NoisePrediction(settings, pipe.scheduler)

    def loss(self, batch: Batch) -> Tensor:
        """The weighted mean of the batch's squared errors, a scalar in float32."""
        question = self.ask(batch)
        answer = self.family.predict(
            self.denoiser, question.noisy, question.sigmas, batch.text, guidance=self.guidance
        ).float()
        if question.weights is None:
            return nn.functional.mse_loss(answer, question.answer)
        errors = nn.functional.mse_loss(answer, question.answer, reduction="none")
        return (_beside(question.weights, errors) * errors).mean()


def _beside(values: Tensor, latents: Tensor) -> Tensor:
    """(B,) as (B, 1, 1, 1), or as many axes as the latents have."""
    return values.view(-1, *[1] * (latents.ndim - 1))
