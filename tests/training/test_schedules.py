"""Learning rate and noise levels."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from loco_diffusion.training.config import TimestepSettings
from loco_diffusion.training.schedules import draws_of, learning_rate_factor, sample_sigmas


def test_learning_rate_rises_stays_and_falls() -> None:
    factors = [learning_rate_factor(step, 10, warmup_steps=2, decay=0.4) for step in range(10)]
    assert factors == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    assert learning_rate_factor(10, 10, warmup_steps=2, decay=0.4) == 0
    assert {learning_rate_factor(step, 10, 0, 0) for step in range(10)} == {1.0}


def test_sigmas_have_the_right_medians() -> None:
    rng = np.random.default_rng(0)
    uniform = sample_sigmas(4000, TimestepSettings(sampling="uniform"), rng)
    assert uniform.min() >= 0 and uniform.max() <= 1
    assert uniform.mean() == pytest.approx(0.5, abs=0.02)
    assert uniform.std() == pytest.approx(12**-0.5, abs=0.02)
    shifted = sample_sigmas(4000, TimestepSettings(sampling="logit_normal", shift=3), rng)
    assert shifted.median() == pytest.approx(0.75, abs=0.02)  # 3 * 0.5 / (1 + 2 * 0.5)


def test_draws_differ_between_batches_processes_and_seeds() -> None:
    values = {draws_of(*numbers).random() for numbers in itertools.product((0, 1), repeat=3)}
    assert len(values) == 8
    assert draws_of(1, 2, 3).random() == draws_of(1, 2, 3).random()
