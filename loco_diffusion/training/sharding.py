"""A frozen base that is split over the processes of a run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def split_over_processes(denoiser: nn.Module, trained: Iterable[nn.Parameter], device: torch.device) -> None:
    """Leave each process a share of the denoiser's frozen weights; a block has all of its own only while it works.

    What is trained stays whole: it is small, and its gradients are averaged where the optimizer steps. Only frozen
    weights are split, hence no gradient has to be.

    Args:
        denoiser: of diffusers, the same in all processes.
        trained: its parameters that are trained, on `device`.
        device: of this process; the shares go there block by block.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    model: Any = denoiser
    blocks = {*(model._no_split_modules or []), *(model._repeated_blocks or [])}
    whole = set(trained)
    for module in reversed(list(denoiser.modules())):  # from the inside out
        if module is denoiser or type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh, ignored_params=whole)
