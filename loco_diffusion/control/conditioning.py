"""What a denoiser meets in a `with controller(...)`, and when in the schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import nn

from loco_diffusion.control import layers
from loco_diffusion.control.adapter import ALWAYS, Window
from loco_diffusion.control.attention import Recall, SelfAttentions
from loco_diffusion.control.family import Family, Pipeline
from loco_diffusion.control.features import Features, FeatureSum
from loco_diffusion.control.joint import JointCondition
from loco_diffusion.control.rows import Rows


@dataclass(frozen=True)
class Condition:
    """A condition, ready for the denoiser.

    Attributes:
        features: of the encoder route, or None.
        recall: of the tokens route, or None.
        joint: of the tokens route where the condition's tokens see the picture, or None.
        turning: the strength at which its adapter is on while denoising; None where it is off, or fused.
        window: when it acts.
    """

    features: Features | None = None
    recall: Recall | None = None
    joint: JointCondition | None = None
    turning: float | None = None
    window: Window = ALWAYS

    def acts(self, share: float) -> bool:
        """Whether it acts in the step that begins after this share of the steps."""
        return self.window[0] <= share < self.window[1]


class Conditioning:
    """Conditions in a denoiser, switched on and off as the schedule goes.

    Args:
        family: of the pipeline.
        pipe: the pipeline.
        denoiser: its denoiser.
        attentions: the self-attentions of it, where an adapter is of the tokens route.
        conditions: by name, in the order in which adapters apply.
        rows: of the denoiser's batch.
    """

    def __init__(
        self,
        family: Family,
        pipe: Pipeline,
        denoiser: nn.Module,
        attentions: SelfAttentions | None,
        conditions: Mapping[str, Condition],
        rows: Rows,
    ) -> None:
        self.features: FeatureSum | None = None
        self._family = family
        self._pipe = pipe
        self._denoiser = denoiser
        self._attentions = attentions
        self._conditions = conditions
        self._rows = rows
        self._switched = ExitStack()
        self._acting: set[str] | None = None  # not even begun

    @contextmanager
    def applied(self) -> Iterator[None]:
        """In the block the conditions act, from the first step on."""
        with ExitStack() as stack:
            stack.callback(self._off)
            self._on(0.0)
            if self._attentions is not None:
                stack.enter_context(recomputing(self._denoiser, self._attentions))
            windows = any(condition.window != ALWAYS for condition in self._conditions.values())
            if windows or not self._rows.unconditional:
                stack.enter_context(after_each_step(self._pipe.scheduler, self._on))
            yield

    def _on(self, share: float) -> None:
        self._rows.later = False
        acting = {name: c for name, c in self._conditions.items() if c.acts(share)}
        if acting.keys() == self._acting:
            return
        self._off()
        self._acting = set(acting)
        features = {name: c.features for name, c in acting.items() if c.features is not None}
        if features:
            self.features = FeatureSum(features, self._family.token_pixels(self._pipe), self._rows)
        strengths = {name: c.turning for name, c in acting.items() if c.turning is not None}
        recalls = [c.recall for c in acting.values() if c.recall is not None]
        if self._attentions is not None:
            self._switched.enter_context(self._attentions.recalling(recalls))
        joint = [c.joint for c in acting.values() if c.joint is not None]
        if joint:
            self._switched.enter_context(self._with_joint(joint))
        self._switched.enter_context(layers.activated(self._denoiser, strengths))

    @contextmanager
    def _with_joint(self, conditions: list[JointCondition]) -> Iterator[None]:
        before = vars(self._denoiser).get("forward")  # offloading sets one, too
        self._denoiser.forward = self._family.joint_forward(  # type: ignore[method-assign]
            self._denoiser, conditions, self._rows
        )
        try:
            yield
        finally:
            del self._denoiser.forward
            if before is not None:
                self._denoiser.forward = before

    def called(self) -> None:
        """To be called after the denoiser: what it is asked next in the same step is the unconditional half."""
        if not self._rows.unconditional:  # written only then, so that compiled models are not compiled again
            self._rows.later = True

    def _off(self) -> None:
        self._switched.close()
        self.features = None
        self._acting = None


@contextmanager
def recomputing(denoiser: nn.Module, attentions: SelfAttentions) -> Iterator[None]:
    """In the block, what gradient checkpointing computes again meets what it met at first.

    Needed on the tokens route, where a condition's pass and a denoising pass follow each other before the
    backward pass computes the blocks of both again.

    Args:
        denoiser: the model, its adapters in the state of the pass to come.
        attentions: its self-attentions, likewise.
    """
    if not torch.is_grad_enabled():
        yield
        return
    resume, state = attentions.resume, layers.state_of(denoiser)

    def checkpointing(original: Callable[..., Any]) -> Callable[..., Any]:
        def run(function: Callable[..., Any], *args: Any) -> Any:
            again = False

            def resumed(*args: Any) -> Any:
                nonlocal again
                if not again:
                    again = True
                    return function(*args)
                with resume(), layers.in_state(state):
                    return function(*args)

            return original(resumed, *args)

        return run

    changed = [module for module in denoiser.modules() if getattr(module, "gradient_checkpointing", False)]
    before: list[Any] = [module._gradient_checkpointing_func for module in changed]
    for module, original in zip(changed, before, strict=True):
        module._gradient_checkpointing_func = checkpointing(original)  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, original in zip(changed, before, strict=True):
            module._gradient_checkpointing_func = original


@contextmanager
def after_each_step(scheduler: Any, act: Callable[[float], None]) -> Iterator[None]:
    """In the block, call `act` with the share of the steps that are done: after each step of a scheduler, and
    when it begins anew."""
    step, set_timesteps = scheduler.step, scheduler.set_timesteps
    done, steps = 0, 0

    @wraps(step)  # pipelines look which arguments it has
    def counted(output: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal done, steps
        if done == 0:
            steps = len(scheduler.timesteps) - _first_step(scheduler, timestep)
        result = step(output, timestep, *args, **kwargs)
        done = (done + 1) % steps  # another picture may follow
        act(done / steps)
        return result

    @wraps(set_timesteps)
    def anew(*args: Any, **kwargs: Any) -> Any:
        nonlocal done
        done = 0  # the last picture may have been left unfinished
        act(0.0)
        return set_timesteps(*args, **kwargs)

    scheduler.step, scheduler.set_timesteps = counted, anew
    try:
        yield
    finally:
        del scheduler.step, scheduler.set_timesteps


def _first_step(scheduler: Any, timestep: Any) -> int:
    """The number of a picture's first step; image-to-image begins later than at 0."""
    if hasattr(scheduler, "begin_index"):
        return scheduler.begin_index or 0
    return int((scheduler.timesteps == timestep).nonzero()[0])  # waits for the device, once a picture
