"""What tests of one controlled adapter, "canny", do again and again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loco_diffusion import Controller
from loco_diffusion.control.adapter import Route
from tiny_pipelines import Tiny
from tiny_pipelines.controlled import add, maps


def add_frozen(pipe: Any, route: Route) -> Controller:
    """A controller with an adapter "canny" as after loading."""
    controller = Controller(pipe)
    add(controller, route)
    for parameters in controller.trainable_parameters("canny").values():
        for parameter in parameters:
            parameter.requires_grad_(False)
    return controller


def draw(tiny: Tiny, pipe: Any, controller: Controller, **arguments: Any) -> Tensor:
    """Under the control of the adapter "canny"."""
    with controller(canny=maps(tiny)):
        return tiny.draw(pipe, **arguments)


def assert_same(tiny: Tiny, pipe: Any, controller: Controller, expected: Tensor, stock: Tensor) -> None:
    """With control, again with control, and without."""
    for _ in range(2):
        torch.testing.assert_close(draw(tiny, pipe, controller).cpu(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tiny.draw(pipe).cpu(), stock, atol=1e-5, rtol=1e-5)


def has_unconditional_half(tiny: Tiny, pipe: Any, controller: Controller) -> bool:
    """Whether guidance asks the denoiser for more predictions."""
    rows: list[int] = []
    denoiser = controller.family.denoiser(pipe)
    hook = denoiser.register_forward_hook(lambda module, args, output: rows.append(len(output[0])))
    tiny.draw(pipe, num_inference_steps=1, **tiny.guided)
    hook.remove()
    return sum(rows) > 1
