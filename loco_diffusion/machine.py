"""What a measurement ran on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch


def describe_machine(device: str, packages: Iterable[str] = ()) -> dict[str, Any]:
    """The hardware, its present load and the software, as JSON types.

    Args:
        device: that was used, "cpu", "cuda" or "cuda:1".
        packages: installed distributions whose versions count.
    """
    return {
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "python": platform.python_version(),
        "packages": package_versions(packages),
    }


def package_versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of distributions by name; those that are not installed are left out."""
    versions = {}
    for name in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def cpu_name() -> str:
    """The processor's model name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
