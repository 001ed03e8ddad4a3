"""The state of an optimizer, of any class, as tensors and numbers that a checkpoint can keep."""

from __future__ import annotations

import math
from typing import Any

import torch


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors of the optimizer's state as a flat dict, `{prefix}.{parameter index}.{name}`."""
    return {
        f"{prefix}.{index}.{name}": value
        for index, entries in _state(optimizer).items()
        for name, value in entries.items()
        if isinstance(value, torch.Tensor)
    }


def optimizer_numbers(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What is left of the state, for JSON: numbers of parameters, by index, and of groups."""
    return {
        "parameters": {
            str(index): _numbers(entries) for index, entries in _state(optimizer).items() if _numbers(entries)
        },
        "groups": [_numbers(group) for group in optimizer.state_dict()["param_groups"]],
    }


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, torch.Tensor],
    prefix: str,
    numbers: dict[str, Any] | None = None,
) -> None:
    """Undo `optimizer_tensors` and `optimizer_numbers`; without numbers those of the groups stay."""
    numbers = numbers or {"parameters": {}, "groups": []}
    state: dict[int, dict[str, Any]] = {int(i): dict(v) for i, v in numbers["parameters"].items()}
    for key, value in tensors.items():
        if key.startswith(prefix + "."):
            _, index, name = key.rsplit(".", 2)
            state.setdefault(int(index), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    for group, saved in zip(groups, numbers["groups"], strict=bool(numbers["groups"])):
        group.update(saved)
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _state(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    """By the parameter's index; what bitsandbytes hides in a nested dict, and shares between parameters, beside
    the rest and in copies."""
    state: dict[int, dict[str, Any]] = {}
    for index, entries in optimizer.state_dict()["state"].items():
        nested = [value for value in entries.values() if isinstance(value, dict)]
        hidden = {name: value.clone() for part in nested for name, value in part.items()}
        state[index] = {name: v for name, v in entries.items() if not isinstance(v, dict)} | hidden
    return state


def _numbers(entries: dict[str, Any]) -> dict[str, float]:
    return {
        name: value
        for name, value in entries.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }
