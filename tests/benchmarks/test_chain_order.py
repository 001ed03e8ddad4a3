"""The experiment on the order of chains, at toy size."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from PIL import Image

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import chain_order  # noqa: E402


def test_errors_keep_to_their_bounds_and_the_figure_is_drawn(tmp_path: Path) -> None:
    chain_order.main(size=96, r=2, tokens=4, repeats=1, device="cpu", out=tmp_path)
    results = json.loads((tmp_path / "chain_order.json").read_text())
    for record in results["accuracy"]:
        exact = record["order"] == "exact"
        assert record["error"] <= record["bound"] * (1 + 1e-9) + 1e-13
        assert record["orthogonality_error"] < 1e-13 or not exact
    tight = [
        r["error"] / r["bound"] for r in results["accuracy"] if r["planes"] == "coinciding" and r["bound"]
    ]
    assert max(tight) > 0.95  # planes that coincide reach it
    assert {(t["what"], t["way"]) for t in results["time"]} == {
        *((what, way) for what in ("form", "train", "evaluate") for way in chain_order.WAYS),
        *((what, chain_order.SEQUENTIAL) for what in ("train", "evaluate")),
    }
    with Image.open(tmp_path / "chain_order.png") as picture:
        assert picture.width > 1000 and len(picture.convert("RGB").getcolors(2**20)) > 100
