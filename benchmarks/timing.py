"""Paired measurements of time."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from statistics import median
from typing import TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)


def in_turn(
    runs: Mapping[Key, Callable[[], object]], repeats: int, device: str, warm_ups: int = 2
) -> dict[Key, list[float]]:
    """Milliseconds of each run, all of them in turn within each repetition, so that a disturbance meets all."""
    samples: dict[Key, list[float]] = {key: [] for key in runs}
    for repetition in range(warm_ups + repeats):
        for key, run in runs.items():
            elapsed = milliseconds(run, device)
            if repetition >= warm_ups:
                samples[key].append(elapsed)
    return samples


def milliseconds(run: Callable[[], object], device: str) -> float:
    """The time of one run, until the device is done with it."""
    start = time.perf_counter()
    run()
    if device != "cpu":
        torch.accelerator.synchronize()
    return 1000 * (time.perf_counter() - start)


def paired_ratio(samples: list[float], reference: list[float]) -> float:
    """The median over the repetitions of one run's time over another's."""
    return median(ours / theirs for ours, theirs in zip(samples, reference, strict=True))
