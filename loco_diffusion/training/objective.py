"""What a denoiser learns from a batch: noise is added, and the loss of its prediction is taken."""

from __future__ import annotations

from torch import Tensor, nn

from loco_diffusion.control.family import Family
from loco_diffusion.training.config import TrainingConfig
from loco_diffusion.training.examples import Batch


class FlowMatching:
    """Flow-matching loss (Lipman et al. 2023, arXiv 2210.02747).

    At (1 - sigma) latents + sigma noise, the velocity noise - latents is to be predicted.

    Args:
        config: of the run.
        family: of the denoiser.
        denoiser: the model.
    """

    def __init__(self, config: TrainingConfig, family: Family, denoiser: nn.Module) -> None:
        self.config = config
        self.family = family
        self.denoiser = denoiser

    def loss(self, batch: Batch) -> Tensor:
        """The batch's mean, a scalar in float32."""
        sigmas = batch.sigmas.view(-1, *[1] * (batch.latents.ndim - 1))
        noisy = (1 - sigmas) * batch.latents + sigmas * batch.noise
        velocity = self.family.predict(
            self.denoiser, noisy, batch.sigmas, batch.text, guidance=self.config.guidance
        )
        return nn.functional.mse_loss(velocity.float(), batch.noise - batch.latents)
