"""The comparison of two ways to a cosine transform, at toy size."""

from __future__ import annotations

import json
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import dct_speed  # noqa: E402


def test_both_ways_are_timed_and_written(tmp_path: Path) -> None:
    dct_speed.main(tokens=2, repeats=1, device="cpu", out=tmp_path / "new")
    results = json.loads((tmp_path / "new" / "dct_speed-cpu.json").read_text())
    assert [row["length"] for row in results["rows"]] == list(dct_speed.LENGTHS)
    assert all(row["matrix_ms"] > 0 and row["fft_ms"] > 0 and row["ratio"] > 0 for row in results["rows"])
    table = (tmp_path / "new" / "dct_speed-cpu.md").read_text().splitlines()
    assert len([line for line in table if line.startswith("|")]) == 2 + len(dct_speed.LENGTHS)
    assert f"torch {results['machine']['packages']['torch']}" in "".join(table)
