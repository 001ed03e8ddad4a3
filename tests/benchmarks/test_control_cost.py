"""The comparison of what control costs, at toy size."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from control_cost import BARE, PACKAGES, Settings, measure, to_markdown  # noqa: E402

from loco_diffusion.machine import describe_machine  # noqa: E402


@pytest.mark.parametrize(("model", "width", "tokens", "ways"), [("flux", 128, 16, 10), ("sd15", 32, 64, 7)])
def test_every_way_to_control_runs(model: str, width: int, tokens: int, ways: int) -> None:
    settings = Settings(model, width, tokens, text_tokens=4, layers=1, repeats=1, device="cpu")
    saved: list[list[dict[str, Any]]] = []
    rows = measure(settings, saved.append)
    assert saved == [rows] and rows[0]["way"] == BARE and len(rows) == ways
    assert all(row["step_ms"] > 0 and row["ratio"] > 0 for row in rows)
    rows[0]["peak_bytes"] = 2**20
    results = {"settings": asdict(settings), "machine": describe_machine("cpu", PACKAGES), "rows": rows}
    table = [line for line in to_markdown(results).splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(rows) and {line.count("|") for line in table} == {7}
