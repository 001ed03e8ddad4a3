"""Rotated layers in what they must run in: half precision, compilers, checkpointing, several processes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rotated_helpers import IN, SETTINGS, config, inputs, layer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from loco_diffusion.adapters.loco.layer import LoCOLayer


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
@pytest.mark.parametrize("settings", ["input", "both and magnitude"])
@pytest.mark.parametrize("training", [True, False])
def test_autocast_and_half_precision(kind: str, settings: str, training: bool) -> None:
    made = layer(kind, torch.float32, **SETTINGS[settings]).train(training)
    x = inputs(made, torch.float32)
    exact = made(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = made(x)
    assert out.dtype == torch.bfloat16 and exact.dtype == torch.float32
    torch.testing.assert_close(out.float(), exact, atol=0.06, rtol=0.02)
    made.get_base_layer().to(torch.bfloat16)
    half = made(x.bfloat16())
    assert half.dtype == torch.bfloat16 and made.loco_u["default"].dtype == torch.float32
    torch.testing.assert_close(half.float(), exact, atol=0.06, rtol=0.02)


def test_half_precision_keeps_small_magnitudes() -> None:
    made = layer(dtype=torch.bfloat16, magnitude=True)
    for v in made.loco_v.values():
        v.zero_()
    for m in (made.loco_m["default"], made.loco_m_out["default"]):
        m.fill_(2.0**-10)  # bfloat16 rounds 1 + 2^-10 to 1
    factors = made._make_factors("default", "input", torch.bfloat16)
    torch.testing.assert_close(factors.gain.float(), torch.full((IN,), 2.0**-10), atol=2.0**-18, rtol=0)


def gradients(made: LoCOLayer, run: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """Of a loss with respect to the adapters and the input."""
    made.zero_grad()
    x = x.clone().requires_grad_()
    run(x).square().sum().backward()
    return [p.grad for p in (*made.parameters(), x) if p.grad is not None]


def trainable(kind: str, **settings: Any) -> LoCOLayer:
    """Two active adapters in training."""
    made = layer(kind, torch.float32, **settings).train()
    made.update_layer("other", config(map="exp"))
    made.set_adapter(["default", "other"])
    return made


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_compiles_into_one_graph(kind: str, backend: str) -> None:
    made = trainable(kind, side="both", magnitude=True)
    x = inputs(made, torch.float32)
    expected = gradients(made, made, x)
    torch._dynamo.reset()
    compiled = torch.compile(made, fullgraph=True, backend=backend)
    torch.testing.assert_close(gradients(made, compiled, x), expected, atol=1e-3, rtol=1e-3)
    made.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), made(x), atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_cuda_graphs(kind: str) -> None:
    made = trainable(kind, side="both", magnitude=True).cuda()
    x = inputs(made, torch.float32).cuda()
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
def test_gradient_checkpointing(use_reentrant: bool) -> None:
    made = trainable("linear", side="both", magnitude=True)
    x = inputs(made, torch.float32)
    expected = gradients(made, made, x)
    recomputed = gradients(made, partial(checkpoint, made, use_reentrant=use_reentrant), x)
    torch.testing.assert_close(recomputed, expected, atol=0, rtol=0)


def _train_one_step(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    made = trainable("linear", side="both", magnitude=True)
    parallel = nn.parallel.DistributedDataParallel(made)
    parallel(inputs(made, torch.float32)[rank]).square().sum().backward()
    torch.save([p.grad for p in made.parameters() if p.grad is not None], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_data_parallel_training(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_train_one_step, (str(tmp_path),), nprocs=2)
    made = trainable("linear", side="both", magnitude=True)
    made(inputs(made, torch.float32)).square().sum().backward()
    expected = [p.grad / 2 for p in made.parameters() if p.grad is not None]
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), expected, atol=1e-4, rtol=1e-4)
