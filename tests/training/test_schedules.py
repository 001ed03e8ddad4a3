"""Learning rate and noise levels."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

from loco_diffusion.training.config import make_config
from loco_diffusion.training.schedules import draws_of, learning_rate_schedule, sample_sigmas
from loco_diffusion.training.settings import TimestepSettings


def _factors(steps: int, **fields: Any) -> list[float]:
    config = make_config({"condition": "canny", "output": "unused", "steps": steps, **fields})
    factor = learning_rate_schedule(config)
    return [factor(step) for step in range(steps + 1)]


def test_learning_rates_rise_stay_and_fall() -> None:
    trapezoid = _factors(10, warmup_steps=2, decay=0.4)
    assert trapezoid == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])
    assert set(_factors(10, decay=0)[:10]) == {1.0}
    assert set(_factors(10, lr_scheduler="constant")) == {1.0}
    assert _factors(4, lr_scheduler="constant", warmup_steps=2) == pytest.approx([0, 0.5, 1, 1, 1])
    assert _factors(4, lr_scheduler="linear") == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    assert _factors(4, lr_scheduler="cosine", warmup_steps=2) == pytest.approx([0, 0.5, 1, 0.5, 0])


def test_sigmas_have_the_right_medians() -> None:
    rng = np.random.default_rng(0)
    uniform = sample_sigmas(4000, TimestepSettings().resolved(flow=False), rng)
    assert uniform.min() >= 0 and uniform.max() <= 1
    assert uniform.mean() == pytest.approx(0.5, abs=0.02)
    assert uniform.std() == pytest.approx(12**-0.5, abs=0.02)
    shifted = sample_sigmas(4000, TimestepSettings(shift=3).resolved(flow=True), rng)
    assert shifted.median() == pytest.approx(0.75, abs=0.02)  # 3 * 0.5 / (1 + 2 * 0.5)
    for dynamic, expected in ((False, 0.75), (True, 0.5)):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic)
        own = sample_sigmas(4000, TimestepSettings().resolved(flow=True, scheduler=scheduler), rng)
        assert own.median() == pytest.approx(expected, abs=0.02)
    noisier = sample_sigmas(4000, TimestepSettings(mean=1).resolved(flow=True), rng)
    assert noisier.median() == pytest.approx(0.731, abs=0.02)  # the sigmoid of 1
    middle = sample_sigmas(4000, TimestepSettings(sampling="mode"), rng)
    assert middle.mean() == pytest.approx(0.5, abs=0.02)
    assert middle.min() >= 0 and middle.max() <= 1 and middle.std() < uniform.std() - 0.02


def test_draws_differ_between_batches_processes_and_seeds() -> None:
    values = {draws_of(*numbers).random() for numbers in itertools.product((0, 1), repeat=3)}
    assert len(values) == 8
    assert draws_of(1, 2, 3).random() == draws_of(1, 2, 3).random()
