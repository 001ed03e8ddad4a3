"""Gradients of a model's weights on a few calibration batches, and adapters fitted to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from loco_diffusion.adapters.rotated import RotatedLayer
from loco_diffusion.errors import UserError

Batch = TypeVar("Batch")
LossFunction = Callable[[nn.Module, Batch], Tensor]

NUM_BATCHES = 4


def weight_gradients(
    model: nn.Module,
    loss_fn: LossFunction[Batch],
    batches: Iterable[Batch],
    names: Iterable[str],
    num_batches: int = NUM_BATCHES,
) -> dict[str, Tensor]:
    """The gradient of a loss with respect to some weights, summed over the first batches.

    The model runs in evaluation mode. Afterwards it is what it was: modes, ``requires_grad``, ``grad`` and
    torch's random state do not change. Needs memory for two gradients a weight, one of them in float32.

    Args:
        model: any model.
        loss_fn: takes the model and a batch and returns a scalar.
        batches: a loader, or any iterable of what ``loss_fn`` understands.
        names: the weights, by their names in ``model.named_parameters()``.
        num_batches: how many batches to use, if there are as many.

    Returns:
        For each name a tensor of the weight's shape, float32 (float64 for a float64 weight).

    Raises:
        UserError: no such weight, a weight without gradients (quantised), no batches, or a weight that the
            loss does not depend on.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = list(names)
    for name in names:
        if name not in parameters:
            raise UserError(f"The model has no parameter {name!r}: see model.named_parameters().")
    return _gradients(model, loss_fn, batches, {name: parameters[name] for name in names}, num_batches)


def fit_supports(
    model: nn.Module,
    loss_fn: LossFunction[Batch],
    batches: Iterable[Batch],
    adapter_name: str = "default",
    num_batches: int = NUM_BATCHES,
) -> None:
    """Choose where an adapter turns from the gradient of the loss with respect to the base weights.

    For LOFT with ``support="gradient"`` or ``"skew"`` and LoCO with ``init="skew"``. To be called once, before
    training (and before the model is wrapped for distributed training, which makes all processes equal): what
    an adapter has learned means nothing in other directions. The gradients are the base model's: all adapters
    are off. Everything but the fitted adapter stays as :func:`weight_gradients` leaves it.

    Args:
        model: holds the adapter, through get_peft_model, inject_adapter_in_model or diffusers' add_adapter.
        loss_fn, batches, num_batches: as for :func:`weight_gradients`.
        adapter_name: the adapter to fit.

    Raises:
        UserError: there is nothing to fit, an adapter is merged, or for the reasons of :func:`weight_gradients`.
    """
    adapters = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if any(layer.merged for layer in adapters):
        raise UserError("Gradients are taken of the base weights: unmerge the adapters first.")
    layers = layers_to_fit(model, adapter_name)
    if not layers:
        raise UserError(
            f"The adapter {adapter_name!r} has nothing to fit: only LOFT with support gradient or skew and LoCO "
            "with init skew start from gradients."
        )
    weights = {name: getattr(layer.get_base_layer(), "weight", None) for name, layer in layers.items()}
    gradients = _gradients(model, loss_fn, batches, weights, num_batches, adapters)
    for name, layer in layers.items():
        layer.fit(adapter_name, gradients.pop(name))


def layers_to_fit(model: nn.Module, adapter_name: str = "default") -> dict[str, RotatedLayer]:
    """The layers, by name, in which an adapter starts from gradients, see :func:`fit_supports`."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, RotatedLayer)
        and adapter_name in module.scaling
        and module.needs_gradient(adapter_name)
    }


def _gradients(
    model: nn.Module,
    loss_fn: LossFunction[Batch],
    batches: Iterable[Batch],
    weights: Mapping[str, Any],
    num_batches: int,
    switched_off: Iterable[BaseTunerLayer] = (),
) -> dict[str, Tensor]:
    for name, weight in weights.items():
        if type(weight) is not nn.Parameter or not weight.is_floating_point():
            raise UserError(
                f"No gradient for the quantised weight {name!r}: load the base model in bfloat16."
            )
    totals: dict[str, Tensor] = {}
    num_used = 0
    with _calibrating(model, weights.values()):
        for batch in islice(batches, num_batches):
            num_used += 1
            with _switched_off(switched_off):  # not around the batches, whose source may switch adapters on
                loss = loss_fn(model, batch)
                if not loss.requires_grad:
                    continue
                gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
                if gradient is not None:
                    gradient = gradient.to(torch.promote_types(weight.dtype, torch.float32))
                    totals[name] = totals[name] + gradient if name in totals else gradient
    if not num_used:
        raise UserError("There are no calibration batches: give at least one.")
    missing = [name for name in weights if name not in totals]
    if missing:
        raise UserError(
            f"The calibration loss does not depend on {len(missing)} of {len(weights)} target weights "
            f"({missing[0]!r} first): use a loss that reaches them or leave them out of target_modules."
        )
    return totals


@contextmanager
def _calibrating(model: nn.Module, weights: Iterable[Tensor]) -> Iterator[None]:
    """Evaluation mode, gradients for nothing but the weights; the former state comes back at the end."""
    modes = {module: module.training for module in model.modules()}
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    devices = {parameter.device for parameter in trainable if parameter.is_cuda}
    try:
        with torch.random.fork_rng(list(devices)), torch.enable_grad():
            model.eval().requires_grad_(False)
            for weight in weights:
                weight.requires_grad_()
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, flag in trainable.items():
            parameter.requires_grad_(flag)


@contextmanager
def _switched_off(adapters: Iterable[BaseTunerLayer]) -> Iterator[None]:
    # Not enable_adapters, which also decides what is to be trained.
    former = {layer: layer._disable_adapters for layer in adapters}
    try:
        for layer in former:
            layer._disable_adapters = True
        yield
    finally:
        for layer, off in former.items():
            layer._disable_adapters = off
