"""Schedules of a run: learning rate, noise levels. Pure functions of the step."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import compute_density_for_timestep_sampling
from torch import Tensor

from loco_diffusion.training.config import TrainingConfig
from loco_diffusion.training.settings import TimestepSettings

_DRAWS = 2  # keeps the random stream apart from those of `data.batches`


def learning_rate_schedule(config: TrainingConfig) -> Callable[[int], float]:
    """The share of the peak learning rate by the step's number (0-based), as `config.lr_scheduler` says."""
    if config.lr_scheduler == "trapezoid":
        return lambda step: _trapezoid(step, config.steps, config.warmup_steps, config.decay)
    name = "constant_with_warmup" if config.lr_scheduler == "constant" else config.lr_scheduler
    nothing = torch.optim.SGD([torch.zeros(())], lr=1.0)  # only the function of the step is wanted
    scheduler = get_scheduler(
        name, nothing, num_warmup_steps=config.warmup_steps, num_training_steps=config.steps
    )
    factor: Callable[[int], float] = scheduler.lr_lambdas[0]
    return factor


def _trapezoid(step: int, steps: int, warmup_steps: int, decay: float) -> float:
    """Rises linearly, stays at 1, falls linearly to 0.

    The first step has 1/warmup_steps; the step after the last would have 0.
    """
    rise = (step + 1) / warmup_steps if step < warmup_steps else 1.0
    decay_steps = decay * steps
    fall = (steps - step) / decay_steps if steps - step < decay_steps else 1.0
    return min(rise, fall)


def sample_sigmas(count: int, settings: TimestepSettings, rng: np.random.Generator) -> Tensor:
    """Noise levels: float32 (count,) in [0, 1]; 1 is pure noise.

    Args:
        count: how many.
        settings: resolved for the model.
        rng: of the batch.

    Source: Esser et al. 2024 (arXiv 2403.03206), the densities (section 3.1) and the resolution-dependent shift
    (equation 23).
    """
    sigmas = compute_density_for_timestep_sampling(
        str(settings.sampling),
        count,
        settings.mean,
        settings.std,
        settings.mode_scale,
        generator=torch.Generator().manual_seed(int(rng.integers(2**63))),
    )
    shift = settings.shift or 1.0
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def draws_of(seed: int, batch: int, process: int) -> np.random.Generator:
    """The generator of everything random in one batch; equal after a resume without any stored state."""
    return np.random.default_rng([seed, _DRAWS, batch, process])
