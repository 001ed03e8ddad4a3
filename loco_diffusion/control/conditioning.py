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
from loco_diffusion.control.family import Pipeline
from loco_diffusion.control.features import Features, FeatureSum


@dataclass(frozen=True)
class Condition:
    """A condition, ready for the denoiser.

    Attributes:
        features: of the encoder route, or None.
        recall: of the tokens route, or None.
        turning: the strength at which its adapter is on while denoising; None where it is off, or fused.
        window: when it acts.
    """

    features: Features | None
    recall: Recall | None
    turning: float | None
    window: Window = ALWAYS

    def acts(self, share: float) -> bool:
        """Whether it acts in the step that begins after this share of the steps."""
        return self.window[0] <= share < self.window[1]


class Conditioning:
    """Conditions in a denoiser, switched on and off as the schedule goes.

    Args:
        denoiser: the model.
        attentions: its self-attentions, where a condition is of the tokens route.
        conditions: by name, in the order in which adapters apply.
        token_pixels, copies: see `FeatureSum`.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        attentions: SelfAttentions | None,
        conditions: Mapping[str, Condition],
        token_pixels: int,
        copies: Callable[[], int],
    ) -> None:
        self.features: FeatureSum | None = None
        self._denoiser = denoiser
        self._attentions = attentions
        self._conditions = conditions
        self._token_pixels = token_pixels
        self._copies = copies
        self._switched = ExitStack()

    @contextmanager
    def applied(self, pipe: Pipeline) -> Iterator[None]:
        """In the block the conditions act, from the first step on."""
        with ExitStack() as stack:
            stack.callback(self._off)
            self._on(0.0)
            if self._attentions is not None:
                stack.enter_context(recomputing(self._denoiser, self._attentions))
            if any(condition.window != ALWAYS for condition in self._conditions.values()):
                stack.enter_context(after_each_step(pipe.scheduler, self._on))
            yield

    def _on(self, share: float) -> None:
        acting = {name: c for name, c in self._conditions.items() if c.acts(share)}
        self._off()
        features = {name: c.features for name, c in acting.items() if c.features is not None}
        if features:
            self.features = FeatureSum(features, self._token_pixels, self._copies)
        strengths = {name: c.turning for name, c in acting.items() if c.turning is not None}
        recalls = [c.recall for c in acting.values() if c.recall is not None]
        if self._attentions is not None:
            self._switched.enter_context(self._attentions.recalling(recalls))
        self._switched.enter_context(layers.activated(self._denoiser, strengths))

    def _off(self) -> None:
        self._switched.close()
        self.features = None


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
    """In the block, call `act` with the share of the steps that are done, after each step of a scheduler."""
    step = scheduler.step
    done = 0

    @wraps(step)  # pipelines read its signature: whether it takes a generator
    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal done
        result = step(*args, **kwargs)
        # Image-to-image starts at a later step than the first.
        steps = len(scheduler.timesteps) - (getattr(scheduler, "begin_index", None) or 0)
        done = done + 1 if done + 1 < steps else 0  # another picture may follow
        act(done / steps)
        return result

    scheduler.step = counted
    try:
        yield
    finally:
        del scheduler.step
