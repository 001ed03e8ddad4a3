"""How many steps optimizers have taken: fused ones change parameters without counting up their versions."""

from __future__ import annotations

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

_steps = 0


def optimizer_steps() -> int:
    """Steps of all optimizers in this process, but for those inside a compiled graph."""
    return _steps


def _count(*_: object) -> None:
    global _steps
    if not torch.compiler.is_compiling():
        _steps += 1


register_optimizer_step_post_hook(_count)
