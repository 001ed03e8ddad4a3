"""The chains that rotated layers keep in evaluation, and what makes them compute new ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from diffusers.training_utils import EMAModel
from method_helpers import CASES, Case
from rotated_helpers import config, dense_weight, inputs, layer, with_weight
from torch import Tensor, nn

from loco_diffusion.adapters.rotated import RotatedLayer, Side

ROTATED = [case for case in CASES if case.method in ("loco-both", "loft", "loft-free")]


@pytest.fixture(params=ROTATED, ids="-".join)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def rotated(case: Case) -> RotatedLayer:
    """A frozen layer of the case in evaluation."""
    made = case.layer().requires_grad_(False)
    assert isinstance(made, RotatedLayer)
    return made


def kept(made: RotatedLayer, side: Side = "input") -> Any:
    found = made._kept.get(("default", side))
    return None if found is None else found.factors


def check_change(made: RotatedLayer, x: Tensor, change: Callable[[], object]) -> None:
    """The layer keeps its chain until the change, and then does what a layer does that keeps none."""
    before, first = made(x), kept(made)
    assert torch.equal(made(x), before) and first is not None and kept(made) is first
    with torch.no_grad():
        change()
        x = x.to(made.get_base_layer().weight)
        after = made(x)
        assert kept(made) is not first
        assert torch.equal(made.train()(x), after)
    assert not torch.allclose(after, before.to(after), atol=1e-3)


def parameters(made: RotatedLayer) -> dict[nn.ParameterDict, nn.Parameter]:
    containers = [getattr(made, name) for name in made.adapter_layer_names]
    return {container: container["default"] for container in containers if "default" in container}


def halved(made: RotatedLayer) -> dict[str, Tensor]:
    return {name: value * (0.5 if ".default" in name else 1) for name, value in made.state_dict().items()}


def step(made: RotatedLayer, **settings: bool) -> None:
    """Of an optimizer."""
    for parameter in parameters(made).values():
        parameter.requires_grad_().grad = torch.randn_like(parameter)
    torch.optim.AdamW(parameters(made).values(), lr=0.3, **settings).step()
    made.requires_grad_(False)


def swap(made: RotatedLayer) -> None:
    for parameter in parameters(made).values():
        parameter.data = parameter.data * 0.5


def replace(made: RotatedLayer) -> None:
    for container, parameter in parameters(made).items():
        container["default"] = nn.Parameter(parameter * 0.5, requires_grad=False)


CHANGES: dict[str, Callable[[RotatedLayer, Case], object]] = {
    "optimizer": lambda made, case: step(made),
    "fused optimizer": lambda made, case: step(made, fused=True),
    "foreach optimizer": lambda made, case: step(made, foreach=True),
    "data swapped": lambda made, case: swap(made),
    "new parameter": lambda made, case: replace(made),
    "strength": lambda made, case: made.set_scale("default", 0.5),
    "load_state_dict": lambda made, case: made.load_state_dict(halved(made)),
    "load with assign": lambda made, case: made.load_state_dict(halved(made), assign=True),
    "trained in between": lambda made, case: step(made.train()) or made.eval(),
    "adapter replaced": lambda made, case: made.update_layer("default", case.config()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_kept_chain_is_dropped_when_something_changes(case: Case, change: str) -> None:
    made = rotated(case)
    check_change(made, case.inputs(), partial(CHANGES[change], made, case))


def test_kept_chain_is_dropped_when_a_tensor_changes_in_place(case: Case) -> None:
    made = rotated(case)
    for tensor in made._parameters_of("default"):
        check_change(made.eval(), case.inputs(), partial(tensor.mul_, 0.5))


@pytest.mark.parametrize(
    "to",
    [
        torch.float64,
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")),
    ],
)
def test_kept_chain_moves_with_the_layer(case: Case, to: Any) -> None:
    made, x = rotated(case), case.inputs()
    before, first = made(x), kept(made)
    after = made.to(to)(x.to(to))
    assert kept(made) is not first and kept(made).rotation[0].device == after.device
    torch.testing.assert_close(after.to(before), before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("remedy", [RotatedLayer.eval, RotatedLayer.clear_chains])
def test_writes_into_data_are_not_noticed(case: Case, remedy: Callable[[RotatedLayer], object]) -> None:
    """As the class says: they leave no trace that could be looked for."""
    made, x = rotated(case), case.inputs()
    before = made(x)
    average = EMAModel(parameters(made).values())
    for shadow in average.shadow_params:
        shadow.mul_(0.5)
    average.copy_to(parameters(made).values())
    assert torch.equal(made(x), before)
    remedy(made)
    after = made(x)
    assert torch.equal(made.train()(x), after) and not torch.allclose(after, before, atol=1e-3)


def test_kept_chains_follow_the_active_adapter() -> None:
    made = layer(side="output")
    made.update_layer("other", config(side="output", inference_mode=True))
    x = inputs(made)
    for name in ("default", "other", "default"):
        made.set_adapter(name, inference_mode=True)
        expected = with_weight(made, dense_weight(made, name), x)
        torch.testing.assert_close(made(x), expected, atol=1e-5, rtol=0)
    made.delete_adapter("default")
    assert kept(made, "output") is None


def test_kept_chain_follows_the_activations_dtype(case: Case) -> None:
    made, x = rotated(case), case.inputs()
    made(x)
    with torch.autocast("cpu", torch.bfloat16):
        made(x)
    assert kept(made).rotation[0].dtype == torch.bfloat16


def test_training_keeps_no_chain(case: Case) -> None:
    made, x = rotated(case), case.inputs()
    made(x)
    made.train()
    assert kept(made) is None
    made(x)
    assert kept(made) is None


def test_evaluation_with_gradients_keeps_no_chain(case: Case) -> None:
    made, x = rotated(case).requires_grad_(True), case.inputs()
    made(x).sum().backward()
    assert kept(made) is None and all(p.grad.abs().max() > 0 for p in parameters(made).values())
    with torch.no_grad():
        made(x)
    assert kept(made) is not None


def test_chain_kept_in_inference_mode_serves_gradients_of_the_input(case: Case) -> None:
    made, x = rotated(case), case.inputs()
    with torch.inference_mode():
        expected = made(x)
    first = kept(made)
    x = x.clone().requires_grad_()
    out = made(x)
    out.sum().backward()
    torch.testing.assert_close(out, expected.clone())
    assert kept(made) is first and x.grad is not None
