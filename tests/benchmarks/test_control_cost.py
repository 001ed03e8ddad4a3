"""The comparison of what control costs, at toy size."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from control_cost import BARE, PACKAGES, Settings, measure, to_markdown  # noqa: E402

from loco_diffusion.machine import describe_machine  # noqa: E402


def test_every_way_to_control_runs() -> None:
    settings = Settings("flux", width=128, tokens=16, text_tokens=4, layers=1, repeats=1, device="cpu")
    rows = measure(settings)
    assert rows[0]["way"] == BARE and len(rows) == 10
    assert all(row["step_ms"] > 0 and row["ratio"] > 0 for row in rows)
    rows[0]["peak_bytes"] = 2**20
    results = {"settings": asdict(settings), "machine": describe_machine("cpu", PACKAGES), "rows": rows}
    table = [line for line in to_markdown(results).splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(rows) and {line.count("|") for line in table} == {7}
