"""Adapted layers in what they must run in: half precision, compilers, checkpointing, several processes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from method_helpers import CASES, TARGETS, Case, first_layer
from rotated_helpers import IN, layer
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from loco_diffusion.adapters import LocationSchedule
from loco_diffusion.adapters.adapted import AdaptedLayer
from loco_diffusion.adapters.loca import spectrum

# "loco" and "loco-output" are within "loco-both", with the second adapter that `trainable` adds.
RUN = [case for case in CASES if case.method in ("loco-both", "loft", "loft-free", "loca")]
LOCA = Case("loca", "linear")


@pytest.fixture(params=RUN, ids="-".join)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def trainable(case: Case) -> AdaptedLayer:
    """A layer with two active adapters in training."""
    model = case.model(target_modules=TARGETS[case.kind][:1])
    exponential = {"map": "exp"} if case.method.startswith("loco") else {}
    model.add_adapter("other", case.config(target_modules=TARGETS[case.kind][:1], **exponential))
    model.base_model.set_adapter(["default", "other"])
    return first_layer(model).train()


def gradients(made: AdaptedLayer, run: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """Of a loss with respect to the adapters and the input."""
    made.zero_grad()
    x = x.clone().requires_grad_()
    run(x).float().square().sum().backward()
    found = [p.grad for p in (*made.parameters(), x) if p.grad is not None]
    assert len(found) == 1 + sum(p.requires_grad for p in made.parameters())
    return found


@pytest.mark.parametrize("training", [True, False])
def test_autocast_and_half_precision(case: Case, training: bool) -> None:
    made, x = trainable(case).train(training), case.inputs()
    learned = [p.dtype for p in made.parameters()]
    exact, exact_gradients = made(x), gradients(made, made, x)

    def check(out: Tensor, found: list[Tensor]) -> None:
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), exact, atol=0.06, rtol=0.02)
        for gradient, expected in zip(found, exact_gradients, strict=True):
            assert (gradient - expected).norm() < 0.05 * expected.norm()

    with torch.autocast("cpu", torch.bfloat16):
        out = made(x)
        found = gradients(made, made, x)
    assert exact.dtype == torch.float32
    check(out, found)
    made.get_base_layer().to(torch.bfloat16)
    with torch.no_grad():
        out = made(x.bfloat16())
    check(out, gradients(made, lambda x: made(x.bfloat16()), x))
    assert [p.dtype for p in made.parameters() if p.requires_grad] == learned[-len(found) + 1 :]


def test_half_precision_keeps_small_magnitudes() -> None:
    made = layer(dtype=torch.bfloat16, magnitude=True)
    for v in made.loco_v.values():
        v.zero_()
    for m in (made.loco_m["default"], made.loco_m_out["default"]):
        m.fill_(2.0**-10)  # bfloat16 rounds 1 + 2^-10 to 1
    factors = made._make_factors("default", "input", torch.bfloat16)
    torch.testing.assert_close(factors.gain.float(), torch.full((IN,), 2.0**-10), atol=2.0**-18, rtol=0)


def check_compiled(case: Case, backend: str) -> None:
    made, x = trainable(case), case.inputs()
    expected = gradients(made, made, x)
    torch._dynamo.reset()
    compiled = torch.compile(made, fullgraph=True, backend=backend)
    torch.testing.assert_close(gradients(made, compiled, x), expected, atol=1e-3, rtol=1e-3)
    made.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), made(x), atol=1e-4, rtol=1e-4)


def test_compiles_into_one_graph(case: Case) -> None:
    check_compiled(case, "aot_eager")


def test_fourier_transforms_compile_into_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectrum, "MATRIX_LENGTH", 8)
    check_compiled(LOCA, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("case", [Case("loco-both", "linear"), LOCA], ids="-".join)
def test_compiles_with_the_default_backend(case: Case) -> None:
    check_compiled(case, "inductor")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_graphs(case: Case) -> None:
    made = trainable(case).cuda()
    x = case.inputs().cuda()
    weights = [p for p in made.parameters() if p.requires_grad]
    run = torch.cuda.make_graphed_callables(made, (x,))
    with torch.no_grad():
        for weight in weights:
            weight.mul_(1.1)
    found = torch.autograd.grad(run(x).square().sum(), weights)
    torch.cuda.set_sync_debug_mode("error")
    expected = torch.autograd.grad(made(x).square().sum(), weights)
    torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(case: Case, use_reentrant: bool) -> None:
    made, x = trainable(case), case.inputs()
    expected = gradients(made, made, x)
    recomputed = gradients(made, partial(checkpoint, made, use_reentrant=use_reentrant), x)
    torch.testing.assert_close(recomputed, expected, atol=0, rtol=0)


def train(case: Case, rows: slice, parallel: bool) -> dict[str, Tensor]:
    """The parameters after four steps on some rows of the input; LoCA's second and fourth move locations."""
    made, x = trainable(case), case.inputs()[rows]
    loca = case.method == "loca"
    run = DistributedDataParallel(made, find_unused_parameters=loca) if parallel else made
    optimizer = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=5.0)
    schedule = LocationSchedule(made, 4, until=1, coefficient_steps=1, location_steps=1) if loca else None
    for _ in range(4):
        run(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
    return {name: p.detach() for name, p in made.named_parameters()}


def _train_in_parallel(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    trained = {"-".join(case): train(case, slice(rank, rank + 1), parallel=True) for case in RUN}
    torch.save(trained, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_data_parallel_training(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_train_in_parallel, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for case in RUN:
        one, other = (rank["-".join(case)] for rank in ranks)
        expected = train(case, slice(None), parallel=False)
        start = dict(trainable(case).named_parameters())
        for name, value in expected.items():
            assert torch.equal(one[name], other[name])
            torch.testing.assert_close(one[name], value, atol=1e-4, rtol=1e-4)
            learns = start[name].requires_grad
            assert torch.equal(value, start[name]) != learns
