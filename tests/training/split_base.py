"""For `accelerate launch`: train, and tell how much of the denoiser this process holds."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from torch import nn
from torch.distributed.tensor import DTensor

from loco_diffusion.bases import load_base
from loco_diffusion.control import family_of
from loco_diffusion.training import trainer
from loco_diffusion.training.config import load_config


def share(denoiser: nn.Module) -> float:
    """Of the denoiser's numbers in this process."""
    own = [p.to_local() if isinstance(p, DTensor) else p for p in denoiser.parameters()]
    return sum(p.numel() for p in own) / sum(p.numel() for p in denoiser.parameters())


def main(*paths: str) -> None:
    """Train as the configurations of those paths say."""
    pipes = []

    def load(*arguments: Any) -> Any:
        pipes.append(load_base(*arguments))
        return pipes[-1]

    for path in paths:
        config = load_config(Path(path))
        with mock.patch.object(trainer, "load_base", load):
            trainer.train(config)
        held = share(family_of(pipes[-1]).denoiser(pipes[-1]))
        (Path(config.output) / f"share-{os.environ['RANK']}.json").write_text(json.dumps(held))


if __name__ == "__main__":
    main(*sys.argv[1:])
