"""For `accelerate launch`: a step with gradients of this process only; prints what became of the parameters."""

from __future__ import annotations

import json
import sys

import torch
from accelerate import Accelerator
from torch import nn

from loco_diffusion.training.config import make_config
from loco_diffusion.training.optimizer import Optimizer


def gradients(process: int) -> list[torch.Tensor | None]:
    """Those of two parameters; only the first process has one for the second."""
    generator = torch.Generator().manual_seed(process)
    first, second = (4 * torch.randn(3, 2, generator=generator) for _ in range(2))
    return [first, second if process == 0 else None]


def step(accelerator: Accelerator, given: list[torch.Tensor | None], name: str) -> list[list[list[float]]]:
    """The parameters after two steps with these gradients."""
    fields = {"condition": "canny", "output": "unused", "steps": 2, "optimizer": name, "weight_decay": 0.1}
    parameters = [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3, 2))]
    optimizer = Optimizer(make_config(fields), accelerator, {"adapter": parameters})
    for number in range(2):
        for parameter, gradient in zip(parameters, given, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        optimizer.step(number)
    return [parameter.tolist() for parameter in parameters]


if __name__ == "__main__":
    accelerator = Accelerator(cpu=True)
    process = accelerator.process_index
    result = {name: step(accelerator, gradients(process), name) for name in ("adamw", "prodigy")}
    with open(f"{sys.argv[1]}/{process}-of-{accelerator.num_processes}.json", "w") as file:
        json.dump(result, file)
