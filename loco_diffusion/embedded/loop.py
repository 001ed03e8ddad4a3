"""The training loop that the recipes share: resumable, with a progress bar and a log."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from loco_diffusion.attention_backend import quickest_attention
from loco_diffusion.training.checkpoints import list_checkpoints, load_checkpoint, save_checkpoint
from loco_diffusion.training.optimizer_state import load_optimizer_state, optimizer_tensors

CHECKPOINT_SECONDS = 120
UNFINISHED = Path(__file__).parent / "unfinished"  # not packaged: trainings on their way between machines
WARMUP, DECAY = 0.02, 0.3  # shares of the run over which the learning rate rises and falls linearly


def learning_rate_factor(step: int, steps: int) -> float:
    """Trapezoid in (0, 1]: a run can be lengthened or shortened until its fall begins."""
    return min(1.0, (step + 1) / (WARMUP * steps + 1), (steps - step) / (DECAY * steps))


@contextmanager
def half_precision(device: str) -> Iterator[None]:
    """bfloat16 autocast where it is faster: on accelerators, and on processors with instructions for it."""
    if device != "cpu" or torch.cpu._is_avx512_bf16_supported():
        with torch.autocast(device, torch.bfloat16), quickest_attention(device, torch.bfloat16, tokens=100):
            yield
    else:
        yield


def train(
    folder: Path,
    model: torch.nn.Module,
    optimizers: list[torch.optim.Optimizer],
    loss_of_step: Callable[[int], torch.Tensor],
    steps: int,
) -> None:
    """Take the model to `steps` optimizer steps, from the newest checkpoint in `folder` if there is one.

    All randomness of a step must come from torch's global generator or from the step's number: the generator is
    seeded with that number, which makes a resumed run equal to an uninterrupted one.
    """
    first = _resume(folder, model, optimizers)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    log = folder / "log.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.4f}"), console=Console(stderr=True)) as bar:
        task = bar.add_task(folder.name, total=steps, completed=first, loss=float("nan"))
        saved, losses = time.monotonic(), []
        for step in range(first, steps):
            torch.manual_seed(step)
            losses.append(_step(model, optimizers, loss_of_step, step, steps))
            if (step + 1) % 50 == 0:
                mean = torch.stack(losses).mean().item()
                losses.clear()
                bar.update(task, completed=step + 1, loss=mean)
                with log.open("a") as file:
                    file.write(json.dumps({"step": step + 1, "loss": mean, "time": time.time()}) + "\n")
            if time.monotonic() - saved > CHECKPOINT_SECONDS or step + 1 == steps:
                _save(folder, step + 1, model, optimizers)
                saved = time.monotonic()
        bar.update(task, completed=steps)


def _step(
    model: torch.nn.Module,
    optimizers: list[torch.optim.Optimizer],
    loss_of_step: Callable[[int], torch.Tensor],
    step: int,
    steps: int,
) -> torch.Tensor:
    loss = loss_of_step(step)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("peak_lr", group["lr"]) * learning_rate_factor(step, steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def _save(folder: Path, step: int, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    # Not the state dict: it names tied weights twice, which safetensors refuses. The models here have no other state.
    tensors: dict[str, torch.Tensor] = {
        f"model.{name}": parameter for name, parameter in model.named_parameters()
    }
    for number, optimizer in enumerate(optimizers):
        tensors |= optimizer_tensors(optimizer, f"optimizer{number}")
    save_checkpoint(folder, step, tensors, {})


def _resume(folder: Path, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer]) -> int:
    checkpoints = list_checkpoints(folder) or list_checkpoints(UNFINISHED / folder.name)
    if not checkpoints:
        return 0
    tensors, state = load_checkpoint(checkpoints[-1])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
    for number, optimizer in enumerate(optimizers):
        load_optimizer_state(optimizer, tensors, f"optimizer{number}")
    return state["step"]


def keep_unfinished(folder: Path) -> Path:
    """Copy the newest checkpoint of `folder` to UNFINISHED: float16 weights, without the optimizers' state.

    A recipe that finds no checkpoint of its own goes on from there, with fresh optimizers.
    """
    tensors, state = load_checkpoint(list_checkpoints(folder)[-1])
    weights = {name: tensor.half() for name, tensor in tensors.items() if name.startswith("model.")}
    return save_checkpoint(UNFINISHED / folder.name, state["step"], weights, {}, keep=1)
