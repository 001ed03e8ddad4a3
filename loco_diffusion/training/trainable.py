"""The parameters that a run trains, and how far they have come."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from accelerate.utils import broadcast
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from loco_diffusion.adapters.calibration import fit_supports, layers_to_fit
from loco_diffusion.control import Controller, layers
from loco_diffusion.training.examples import Batch


class Trainable:
    """The parameters of an adapter, in the groups "adapter" and "encoder", on the training device.

    Args:
        controller: holds the adapter.
        name: of the adapter.
        denoiser: which it is in.
        device: where the parameters go, and stay.
        ema_decay: to keep a moving average of the parameters, too, which starts where they start.

    Attributes:
        groups: the parameters; no group is empty.
    """

    def __init__(
        self,
        controller: Controller,
        name: str,
        denoiser: nn.Module,
        device: torch.device,
        ema_decay: float | None = None,
    ) -> None:
        self.name = name
        self.denoiser = denoiser
        groups = controller.trainable_parameters(name)
        self.groups = {group: parameters for group, parameters in groups.items() if parameters}
        for parameter in self.parameters:  # the optimizer wants them where they will stay
            parameter.data = parameter.data.to(device)
        self._initial = self._copies()
        self._ema = None if ema_decay is None else EMAModel(self.parameters, ema_decay, foreach=True)
        self._fitted: dict[str, Tensor] = {}  # what `fit` made of the adapter; no seed gives it again

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All of them."""
        return [parameter for group in self.groups.values() for parameter in group]

    @property
    def sizes(self) -> dict[str, int]:
        """How many numbers each group has."""
        return {name: sum(p.numel() for p in group) for name, group in self.groups.items()}

    @property
    def needs_fit(self) -> bool:
        """Whether the adapter's method chooses from gradients where it turns."""
        return bool(layers_to_fit(self.denoiser, self.name))

    def fit(self, loss: Callable[[Batch], Tensor], batches: Iterable[Batch]) -> None:
        """Choose where the adapter turns, the same in all processes."""
        fit_supports(self.denoiser, lambda _, batch: loss(batch), batches, self.name)
        weights = layers.weights_of(self.denoiser, self.name)
        # Each process has seen its own examples.
        self._begin_at({path: broadcast(tensor.contiguous()).clone() for path, tensor in weights.items()})

    def average(self) -> None:
        """Let the moving average, if there is one, follow a step."""
        if self._ema is not None:
            self._ema.step(self.parameters)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """In the block the parameters are their moving average, if there is one."""
        if self._ema is None:
            yield
            return
        kept = [parameter.detach().clone() for parameter in self.parameters]
        # Not the average's own methods for this: they hide the change from what is computed of weights and kept.
        self._set(self._ema.shadow_params)
        try:
            yield
        finally:
            self._set(kept)

    def changes(self) -> dict[str, float]:
        """The norm of each group's change since the start; the device is waited for."""
        return {
            name: float(
                torch.stack(
                    [(p.detach() - start).norm() for p, start in zip(group, self._initial[name], strict=True)]
                ).norm()
            )
            for name, group in self.groups.items()
        }

    def norms(self) -> dict[str, float]:
        """The norm of each group; the device is waited for."""
        return {
            name: float(torch.stack([p.detach().norm() for p in group]).norm())
            for name, group in self.groups.items()
        }

    def are_finite(self) -> bool:
        """Whether no parameter is NaN or infinite; the device is waited for."""
        return bool(torch.stack([p.isfinite().all() for p in self.parameters]).all())

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of them."""
        tensors: dict[str, Tensor] = {}
        for name, group in self.groups.items():
            tensors |= {f"{name}.{i}": parameter for i, parameter in enumerate(group)}
        if self._ema is not None:
            tensors |= {f"ema.{i}": average for i, average in enumerate(self._ema.shadow_params)}
        return tensors | {f"fitted.{name}": tensor for name, tensor in self._fitted.items()}

    def load(self, tensors: dict[str, Tensor], step: int) -> None:
        """Undo `tensors`.

        Args:
            tensors: of a checkpoint.
            step: how many steps were taken until then.

        Raises:
            KeyError, RuntimeError: they are of other parameters.
        """
        fitted = {n.removeprefix("fitted."): t for n, t in tensors.items() if n.startswith("fitted.")}
        if fitted:
            self._begin_at(fitted)
        self._set([tensors[f"{name}.{i}"] for name, group in self.groups.items() for i in range(len(group))])
        if self._ema is not None:
            for i, average in enumerate(self._ema.shadow_params):
                average.copy_(tensors[f"ema.{i}"])
            self._ema.optimization_step = step

    def _begin_at(self, fitted: dict[str, Tensor]) -> None:
        layers.set_weights(self.denoiser, self.name, fitted)
        self._fitted = fitted
        self._initial["adapter"] = self._copies()["adapter"]
        if self._ema is not None:
            for average, parameter in zip(self._ema.shadow_params, self.parameters, strict=True):
                average.copy_(parameter.detach())

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    def _copies(self) -> dict[str, list[Tensor]]:
        return {name: [p.detach().clone() for p in group] for name, group in self.groups.items()}
