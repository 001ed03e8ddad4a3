"""How gradients become a step: averaged over processes, clipped, and given to the optimizer at its rates."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from loco_diffusion.errors import UserError
from loco_diffusion.training.config import TrainingConfig
from loco_diffusion.training.optimizer_state import (
    load_optimizer_state,
    optimizer_numbers,
    optimizer_tensors,
)
from loco_diffusion.training.schedules import learning_rate_schedule

_PACKAGES = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt"}


def check_optimizer(name: str) -> None:
    """Raise UserError if the package of an optimizer is not installed, or does not work here."""
    package = _PACKAGES.get(name)
    try:
        if package is not None:
            import_module(package)
    except Exception as error:  # a wrong CUDA has other types than ImportError
        raise UserError(
            f"optimizer {name} needs {package}, which cannot be imported ({error}); pip install {package}, or use "
            "optimizer adamw."
        ) from error


class Optimizer:
    """AdamW or a relative, with a learning rate and a weight decay of its own for each group.

    Args:
        config: of the run.
        accelerator: of this process.
        groups: what is trained, on the accelerator's device: "adapter" and "encoder", or one of them.

    Attributes:
        grad_norm: of the last step before clipping, a scalar on the device.
    """

    def __init__(
        self, config: TrainingConfig, accelerator: Accelerator, groups: dict[str, list[nn.Parameter]]
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.groups = groups
        self.optimizer = accelerator.prepare(self._build())
        self.factor = learning_rate_schedule(config)
        self.grad_norm = torch.zeros((), device=accelerator.device)

    @property
    def rates(self) -> dict[str, float]:
        """The learning rates now, under `lr` and `encoder_lr`; Prodigy's as it estimates them."""
        return {
            "lr" if name == "adapter" else "encoder_lr": group["lr"] * group.get("d", 1.0)
            for name, group in zip(self.groups, self.optimizer.param_groups, strict=True)
        }

    def step(self, number: int) -> None:
        """Take the step of that number (0-based) with the gradients that are there, and drop them."""
        config = self.config
        factor = self.factor(number)
        for name, group in zip(self.groups, self.optimizer.param_groups, strict=True):
            group["lr"] = factor * (config.lr if name == "adapter" else config.encoder_lr)
        self._average_gradients()
        if number < config.adapter.fit_after:
            for parameter in self.groups.get("adapter", []):
                parameter.grad = None
        self.grad_norm = self.accelerator.clip_grad_norm_(self._parameters, config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it, besides `state`."""
        return optimizer_tensors(self.optimizer.optimizer, "optimizer")

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it in JSON."""
        scaler = self.accelerator.scaler
        return {
            "optimizer": optimizer_numbers(self.optimizer.optimizer),
            "scaler": scaler.state_dict() if scaler else {},
        }

    def load(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Undo `tensors` and `state`.

        Raises:
            KeyError, RuntimeError: they are of another optimizer.
        """
        load_optimizer_state(self.optimizer.optimizer, tensors, "optimizer", state.get("optimizer"))
        if self.accelerator.scaler is not None and state.get("scaler"):
            self.accelerator.scaler.load_state_dict(state["scaler"])

    @property
    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.groups.values() for parameter in group]

    def _build(self) -> torch.optim.Optimizer:
        config = self.config
        settings = {
            "adapter": {"lr": config.lr, "weight_decay": config.weight_decay},
            "encoder": {"lr": config.encoder_lr, "weight_decay": config.encoder_weight_decay},
        }
        groups = [{"params": group, **settings[name]} for name, group in self.groups.items()]
        if config.optimizer == "adamw8bit":
            from bitsandbytes.optim import AdamW8bit

            return AdamW8bit(groups, betas=config.betas)
        if config.optimizer == "prodigy":
            from prodigyopt import Prodigy

            # Both as its authors advise for diffusion models.
            return Prodigy(groups, betas=config.betas, use_bias_correction=True, safeguard_warmup=True)
        fused = self.accelerator.device.type in ("cpu", "cuda")  # one kernel instead of ten a tensor
        return torch.optim.AdamW(groups, betas=config.betas, fused=fused)

    def _average_gradients(self) -> None:
        """Over processes, in one message: adapters are small, and the denoiser's hooks stay free of DDP's."""
        if self.accelerator.num_processes == 1:
            return
        parameters = [parameter for parameter in self._parameters if parameter.requires_grad]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        mean = self.accelerator.reduce(flat, "mean")
        for parameter, part in zip(parameters, mean.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter)
