"""What denoisers are asked, for flows and for noise, and what errors weigh."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from tiny_pipelines import TINY
from tiny_pipelines.sd import build as build_sd

from loco_diffusion.control import MapTokens
from loco_diffusion.errors import UserError
from loco_diffusion.training.config import TrainingConfig, make_config
from loco_diffusion.training.examples import Batch
from loco_diffusion.training.objective import FlowMatching, NoisePrediction, Objective
from loco_diffusion.training.settings import TimestepSettings

KINDS = ("epsilon", "v_prediction", "sample")


@pytest.fixture
def batch() -> Batch:
    """Random latents at five noise levels."""
    latents, noise = torch.randn(2, 5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    maps = MapTokens(torch.zeros(5, 16, 1), (4, 4), "pixels")
    sigmas = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])
    return Batch(latents, {}, maps, torch.ones(5, dtype=torch.bool), sigmas, noise)


def _config(**timesteps: Any) -> TrainingConfig:
    return make_config({"condition": "canny", "output": "unused", "steps": 1, "timesteps": timesteps})


def _scheduler(kind: str) -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="scaled_linear", beta_end=0.012, prediction_type=kind, clip_sample=False
    )


def test_the_right_velocity_leads_back_to_the_latents(batch: Batch) -> None:
    question = FlowMatching(TimestepSettings().resolved(flow=True))(batch)
    assert torch.equal(question.noisy[0], batch.latents[0]) and torch.equal(question.noisy[4], batch.noise[4])
    back = question.noisy - question.sigmas.view(-1, 1, 1, 1) * question.answer
    torch.testing.assert_close(back, batch.latents)
    assert question.weights is None


@pytest.mark.parametrize("kind", KINDS)
def test_the_right_answer_is_what_the_scheduler_wants(batch: Batch, kind: str) -> None:
    scheduler = _scheduler(kind)
    question = NoisePrediction(TimestepSettings().resolved(flow=False), scheduler)(batch)
    timesteps = [0, 100, 500, 900, 999]
    assert (question.sigmas * 1000).round().tolist() == timesteps
    expected = scheduler.add_noise(batch.latents, batch.noise, torch.tensor(timesteps))
    torch.testing.assert_close(question.noisy, expected)
    scheduler.set_timesteps(1000)
    for row, timestep in enumerate(timesteps):
        step = scheduler.step(question.answer[row], timestep, question.noisy[row])
        torch.testing.assert_close(step.pred_original_sample, batch.latents[row], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_min_snr_weighs_errors_of_the_clean_latents(batch: Batch, kind: str) -> None:
    """Whatever is predicted, an error counts as min(SNR, gamma) times the one it makes in the latents."""
    scheduler = _scheduler(kind)
    question = NoisePrediction(TimestepSettings(snr_gamma=3).resolved(flow=False), scheduler)(batch)
    alphas = scheduler.alphas_cumprod[[0, 100, 500, 900, 999]]
    snr = alphas / (1 - alphas)
    # d latents / d answer at a given noisy picture, from latents = (noisy - sqrt(1 - a) noise) / sqrt(a), or
    # latents = sqrt(a) noisy - sqrt(1 - a) v.
    slopes = {"epsilon": 1 / snr, "v_prediction": 1 - alphas, "sample": torch.ones(5)}
    assert question.weights is not None
    torch.testing.assert_close(question.weights, snr.clamp(max=3) * slopes[kind])
    plain = NoisePrediction(TimestepSettings(weighting="none").resolved(flow=False), scheduler)
    assert plain(batch).weights is None


def test_flows_are_weighted_by_sigma(batch: Batch) -> None:
    def weights(weighting: Any) -> torch.Tensor:
        made = FlowMatching(TimestepSettings(weighting=weighting).resolved(flow=True))(batch).weights
        assert made is not None
        return made

    torch.testing.assert_close(weights("sigma_sqrt")[1:], batch.sigmas[1:] ** -2)
    assert weights("sigma_sqrt")[0] == pytest.approx(1e6)  # as much as at the schedulers' last noise level
    cosmap = weights("cosmap")
    assert cosmap[2] == pytest.approx(4 / torch.pi) and cosmap[4] == pytest.approx(2 / torch.pi)


def test_the_loss_is_the_weighted_mean_of_squared_errors(batch: Batch) -> None:
    pipe = build_sd()
    objective, plain = (Objective(_config(**f), pipe) for f in ({}, {"weighting": "none"}))
    text = objective.family.encode_prompts(pipe, ["a red cube"])
    batch.text = text
    question = objective.ask(batch)
    assert question.weights is not None
    with torch.no_grad():
        predicted = objective.family.predict(objective.denoiser, question.noisy, question.sigmas, text)
        errors = ((predicted - question.answer) ** 2).mean((1, 2, 3))
        torch.testing.assert_close(objective.loss(batch), (question.weights * errors).mean())
        torch.testing.assert_close(plain.loss(batch), errors.mean())


def test_schedulers_and_weightings_of_the_other_kind_are_refused() -> None:
    pipe = TINY["sdxl"].build()
    with pytest.raises(
        UserError, match="weighting is cosmap, but this base predicts noise; use none or min_snr"
    ):
        Objective(_config(weighting="cosmap"), pipe)
    with pytest.raises(
        UserError, match="weighting is min_snr, but this base matches flows; use none or sigma"
    ):
        Objective(_config(weighting="min_snr"), TINY["sd3"].build())
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(UserError, match="FlowMatchEulerDiscreteScheduler knows no alphas"):
        Objective(_config(), pipe)
    pipe.scheduler = DDIMScheduler(prediction_type="flow")
    with pytest.raises(UserError, match="prediction_type flow, which cannot be trained"):
        Objective(_config(), pipe)
