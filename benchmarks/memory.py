"""Peak memory, measured in a process of its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def in_new_process(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What a function of a module's top level returns in a process that has run nothing before."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args, **kwargs).result()


class Peak:
    """The most memory of a block of code so far; restart() forgets what was before."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device != "cpu"
        self.before = torch.cuda.memory_allocated() if self.on_gpu else _status("VmRSS")
        self.bytes = 0

    def restart(self) -> None:
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the kernel's high-water mark of resident memory

    def stop(self) -> None:
        now = torch.cuda.max_memory_allocated() if self.on_gpu else _status("VmHWM")
        self.bytes = now - self.before


@contextmanager
def peak_over(device: str) -> Iterator[Peak]:
    """Measure the peak of a block over the memory before it: allocated on a GPU, else resident (Linux)."""
    peak = Peak(device)
    yield peak
    peak.stop()


def _status(field: str) -> int:
    """Bytes, from the process's status."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])
