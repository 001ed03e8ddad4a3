"""Schedules of a run: learning rate, noise levels. Pure functions of the step."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from loco_diffusion.training.config import TimestepSettings

_DRAWS = 2  # keeps the random stream apart from those of `data.batches`


def learning_rate_factor(step: int, steps: int, warmup_steps: int, decay: float) -> float:
    """Share of the peak learning rate in `step` (0-based): rises linearly, stays at 1, falls linearly to 0.

    The first step has 1/warmup_steps; the step after the last would have 0.
    """
    rise = (step + 1) / warmup_steps if step < warmup_steps else 1.0
    decay_steps = decay * steps
    fall = (steps - step) / decay_steps if steps - step < decay_steps else 1.0
    return min(rise, fall)


def sample_sigmas(count: int, settings: TimestepSettings, rng: np.random.Generator) -> Tensor:
    """Noise levels: float32 (count,) in [0, 1]; 1 is pure noise.

    Source: Esser et al. 2024 (arXiv 2403.03206), the logit-normal density (section 3.1) and the
    resolution-dependent shift (equation 23).
    """
    if settings.sampling == "uniform":
        sigmas = rng.random(count)
    else:
        sigmas = 1 / (1 + np.exp(-(settings.mean + settings.std * rng.standard_normal(count))))
    shifted = settings.shift * sigmas / (1 + (settings.shift - 1) * sigmas)
    return torch.from_numpy(shifted.astype(np.float32))


def draws_of(seed: int, batch: int, process: int) -> np.random.Generator:
    """The generator of everything random in one batch; equal after a resume without any stored state."""
    return np.random.default_rng([seed, _DRAWS, batch, process])
