"""When LoCA learns its coefficients, and when its locations."""

from __future__ import annotations

from typing import Literal

from torch import nn

from loco_diffusion.adapters.loca.layer import LoCALayer
from loco_diffusion.errors import UserError

Phase = Literal["coefficients", "locations"]


class LocationSchedule:
    """LoCA's alternating training (arXiv 2502.06820): coefficients and locations in turn, then coefficients.

    Usable from any loop: make it when the optimizer holds the adapter's parameters, call :meth:`step` after
    each optimizer step. It freezes what is not to be learned (``requires_grad``), so gradients must be set to
    None between steps, as ``zero_grad`` does. DistributedDataParallel keeps in step only what requires a gradient
    when it wraps the model: wrap it first, with ``find_unused_parameters=True``, then make the schedule.

        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        schedule = LocationSchedule(model, total_steps)
        for batch in batches:
            loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    """

    def __init__(
        self,
        model: nn.Module,
        total_steps: int,
        adapter_name: str = "default",
        until: float = 0.15,
        coefficient_steps: int = 10,
        location_steps: int = 20,
    ) -> None:
        """
        Args:
            model: with LoCA layers.
            total_steps: optimizer steps of the whole training.
            adapter_name: the adapter that is trained.
            until: the part of the training, 0..1, after which the locations stay; the paper has 0.1 to 0.2.
            coefficient_steps, location_steps: optimizer steps in turn, above 0.

        Raises:
            UserError: the model has no such LoCA adapter, or a number is out of range.
        """
        layers = [module for module in model.modules() if isinstance(module, LoCALayer)]
        self.layers = [layer for layer in layers if adapter_name in layer.loca_l]
        if not self.layers:
            raise UserError(f"The model has no LoCA adapter {adapter_name!r}: add it before its schedule.")
        if not 0 <= until <= 1:
            raise UserError(f"LocationSchedule's until is a part of the training, from 0 to 1, not {until}.")
        if min(coefficient_steps, location_steps) < 1:
            raise UserError("LocationSchedule needs coefficient_steps and location_steps above 0.")
        self.adapter_name = adapter_name
        self.last_step = int(until * total_steps)
        self.coefficient_steps = coefficient_steps
        self.location_steps = location_steps
        self.steps_done = 0
        self._freeze()

    @property
    def phase(self) -> Phase:
        """What the next optimizer step learns."""
        in_turn = self.steps_done % (self.coefficient_steps + self.location_steps)
        if self.steps_done < self.last_step and in_turn >= self.coefficient_steps:
            return "locations"
        return "coefficients"

    def step(self) -> None:
        """Count an optimizer step."""
        self.steps_done += 1
        self._freeze()

    def state_dict(self) -> dict[str, int]:
        """What a resumed training needs."""
        return {"steps_done": self.steps_done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from :meth:`state_dict`."""
        self.steps_done = state["steps_done"]
        self._freeze()

    def _freeze(self) -> None:
        locations = self.phase == "locations"
        for layer in self.layers:
            layer.loca_a[self.adapter_name].requires_grad_(not locations)
            layer.loca_l[self.adapter_name].requires_grad_(locations)
