"""The profile of a training step, at toy size."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from loco_diffusion.training.config import make_config

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import training_step  # noqa: E402


def test_parts_of_a_step_and_the_bare_model(flux_folder: Path) -> None:
    config = make_config(
        {
            "condition": "canny",
            "output": "unused",
            "base": str(flux_folder),
            "data": {"source": "scenes", "count": 3, "size": 32},
            "adapter": {"options": {"r": 1, "num_rotations": 2}},
            "steps": 1,
            "batch_size": 2,
        }
    )
    results = training_step.measure(config, 4)
    assert results["parts"].keys() == set(training_step.PARTS)
    assert all(milliseconds > 0 for milliseconds in results["parts"].values())
    shares = [value / sum(results["parts"].values()) for value in results["parts"].values()]
    assert results["waiting_share"] == pytest.approx(shares[0])
    assert results["over_bare"] > 0 and results["bare"] > 0
    assert all(f"| {part} |" in training_step.to_markdown(results) for part in training_step.PARTS)
