"""How the benchmarks write what they measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def write(results: dict[str, Any], path: Path, to_markdown: Callable[[dict[str, Any]], str]) -> None:
    """Write results as JSON, and beside it as Markdown."""
    path.write_text(json.dumps(results, indent=1) + "\n")
    path.with_suffix(".md").write_text(to_markdown(results))


def describe(machine: dict[str, Any]) -> str:
    """What `describe_machine` tells, in a line."""
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    return (
        f"{machine['device']}; {machine['cpu']}, {machine['cpu_count']} cores, {machine['threads']} threads, "
        f"load {machine['load']}; Python {machine['python']}, {packages}."
    )
