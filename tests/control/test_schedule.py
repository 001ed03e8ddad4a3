"""When in the schedule, and in which half of guidance, a condition acts."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxImg2ImgPipeline,
    HeunDiscreteScheduler,
)
from tiny_pipelines import DENOISERS, TINY, Tiny
from tiny_pipelines.checks import add_frozen, has_unconditional_half
from tiny_pipelines.controlled import maps
from torch import Tensor

from loco_diffusion import Controller
from loco_diffusion.control import family_of
from loco_diffusion.control.adapter import Route
from loco_diffusion.control.conditioning import after_each_step

on_flux = pytest.mark.parametrize("tiny", [TINY["flux"]], ids=["flux"])


@pytest.fixture
def controller(pipe: Any, route: Route) -> Controller:
    return add_frozen(pipe, route)


# Schedulers.


def schedulers_for(pipe: Any) -> list[Any]:
    """Of the same prediction: of order 2, and one that does not count its steps."""
    config = pipe.scheduler.config
    if family_of(pipe).flow:
        return [
            FlowMatchHeunDiscreteScheduler.from_config(config),
            FlowMatchEulerDiscreteScheduler(shift=3.0),
        ]
    return [cls.from_config(config) for cls in (HeunDiscreteScheduler, DDIMScheduler, EulerDiscreteScheduler)]


@pytest.mark.parametrize(
    ("tiny", "route"),
    [
        *((tiny, "tokens") for tiny in DENOISERS.values()),
        *((TINY[name], "encoder") for name in ("flux", "sd")),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_schedulers_are_swapped(tiny: Tiny, pipe: Any, controller: Controller) -> None:
    for scheduler in schedulers_for(pipe):
        pipe.scheduler = scheduler
        try:
            stock = tiny.draw(pipe, num_inference_steps=4)
        except ValueError as error:  # the stock pipeline gives sigmas that it does not take
            assert "sigmas" in str(error)
            continue
        drawn = {}
        for window in ((0.0, 1.0), (0.0, 0.5), (0.5, 1.0)):
            with controller(canny=maps(tiny), start=window[0], end=window[1]):
                drawn[window] = tiny.draw(pipe, num_inference_steps=4)
        different = [stock, *drawn.values()]
        assert all(not torch.equal(a, b) for number, a in enumerate(different) for b in different[:number])
        assert not {"step", "set_timesteps"} & vars(scheduler).keys()


@pytest.mark.parametrize(
    "name", ["DDIM", "PNDM", "EulerDiscrete", "HeunDiscrete", "DPMSolverMultistep", "LCM"]
)
@pytest.mark.parametrize("skipped", [0, 3])
def test_shares_of_the_steps(name: str, skipped: int) -> None:
    """Image-to-image skips steps, of which only some schedulers are told; a picture may be left unfinished."""
    scheduler = getattr(diffusers, f"{name}Scheduler")()
    shares: list[float] = []
    with after_each_step(scheduler, shares.append):
        for stop in (2, None, None):
            scheduler.set_timesteps(8)
            assert shares.pop() == 0
            first = skipped * scheduler.order
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(first)
            steps = scheduler.timesteps[first:]
            sample = torch.zeros(1, 1, 2, 2)
            for timestep in steps[:stop]:
                scheduler.step(sample, timestep, sample)
            expected = [number / len(steps) for number in range(1, len(steps))] + [0.0]
            assert shares == expected[:stop]
            shares.clear()


@on_flux
def test_windows_in_image_to_image(tiny: Tiny, pipe: Any, controller: Controller) -> None:
    """Of 4 steps, half are made; the window is a share of those."""
    other = FluxImg2ImgPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    arguments = {"image": maps(tiny, seed=3), "strength": 0.5, "num_inference_steps": 4}
    acting: list[bool] = []
    pipe.transformer.register_forward_pre_hook(lambda module, args: acting.append(is_acting(controller)))
    for window, expected in (((0.0, 0.5), [True, False]), ((0.5, 1.0), [False, True])):
        with controller(canny=maps(tiny), start=window[0], end=window[1]):
            acting.clear()
            tiny.draw(other, **arguments)
        assert acting == expected


def is_acting(controller: Controller) -> bool:
    hooks = controller._hooks
    features = hooks.conditioning is not None and hooks.conditioning.features is not None
    return features or hooks.attentions is not None and bool(hooks.attentions._recalls)


# The unconditional half of guidance.


def test_dropped_in_the_unconditional_half(
    tiny: Tiny, pipe: Any, controller: Controller, route: Route
) -> None:
    """The prediction of that half is the one with `keep` False; the other half's is as ever."""
    if not has_unconditional_half(tiny, pipe, controller):
        pytest.skip("has no classifier-free guidance")
    seen: list[tuple[Any, Tensor]] = []
    denoiser = controller.family.denoiser(pipe)
    denoiser.register_forward_hook(lambda module, args, output: seen.append((args, output[0].clone())))

    def predictions(**settings: Any) -> list[Tensor]:
        """Of both halves at the first step, unconditional first."""
        with controller(canny=maps(tiny), **settings):
            seen.clear()
            tiny.draw(pipe, num_inference_steps=1, **tiny.guided)
        outputs = [output for _, output in seen]
        return list(outputs[0].chunk(2)) if len(outputs) == 1 else outputs[::-1]

    everywhere, nowhere = predictions(), predictions(keep=torch.tensor([False]))
    dropped = predictions(unconditional=False)
    torch.testing.assert_close(dropped[0], nowhere[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dropped[1], everywhere[1], atol=1e-5, rtol=1e-5)
    assert (everywhere[0] - nowhere[0]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("tiny", "route"), [(TINY["flux"], "encoder"), (TINY["sana"], "tokens")], ids=["calls", "stacked"]
)
def test_dropped_and_compiled(tiny: Tiny, pipe: Any, controller: Controller) -> None:
    """Where the halves are two calls, and where they are one; a condition for each of two pictures."""

    def guided() -> Tensor:
        with controller(canny=maps(tiny, batch=2), unconditional=False):
            return tiny.draw(pipe, ["a pink cube", "a blue cone"], **tiny.guided)

    expected = guided()
    torch._dynamo.reset()
    controller.family.denoiser(pipe).compile(backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(guided(), expected, atol=1e-5, rtol=1e-5)
        with torch._dynamo.config.patch(error_on_recompile=True):
            torch.testing.assert_close(guided(), expected, atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()
