"""The comparison of adapters' speed and memory, at toy size."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from adapter_speed import MODES, PACKAGES, Settings, measure_time, peak_of_step, to_markdown  # noqa: E402
from memory import in_new_process, peak_over  # noqa: E402
from methods import BARE, METHODS  # noqa: E402

from loco_diffusion.machine import describe_machine  # noqa: E402

SETTINGS = Settings(
    width=128, tokens=8, text_tokens=4, rank=8, repeats=1, device="cpu", adapter_dtype="float32"
)


def test_every_method_runs_with_as_many_parameters() -> None:
    rows = measure_time("linear", [BARE, *METHODS], SETTINGS)
    assert [row["method"] for row in rows] == [BARE, *METHODS]
    assert not [row for row in rows if "error" in row]
    sizes = {row["method"]: row["parameters"] for row in rows}
    smaller = {"RoAd", "LOFT, r = 64", BARE}
    assert sizes["LoRA"] == sizes["LoCO"] == 2 * 8 * 128 and sizes[BARE] == 0
    assert all(abs(size / sizes["LoRA"] - 1) < 0.1 for name, size in sizes.items() if name not in smaller)
    assert all(row[mode]["median_ms"] > 0 for row in rows for mode in MODES)

    for row in rows:
        row["peak_bytes"] = 2**20
    rows[-1]["error"] = "ValueError: too | wide"
    machine = describe_machine("cpu", PACKAGES)
    table = to_markdown(
        {"workload": "linear", "settings": asdict(SETTINGS), "machine": machine, "rows": rows}
    ).splitlines()
    cells = [line.count("|") for line in table if line.startswith("|")]
    assert len(cells) == 2 + len(rows) and set(cells) == {7}
    assert f"torch {machine['packages']['torch']}" in "".join(table)


def test_blocks_of_flux() -> None:
    rows = measure_time("flux_blocks", [BARE, "LoRA", "LoCO"], SETTINGS)
    assert not [row for row in rows if "error" in row]
    assert rows[1]["parameters"] == rows[2]["parameters"] == 11 * 2 * 8 * 128


def _peak_of_a_tensor() -> tuple[int, int]:
    """Its bytes, and the peak of a block that made it."""
    with peak_over("cpu") as peak:
        torch.ones(2**24)
        peak.restart()
        kept = torch.ones(2**22)
    return kept.nbytes, peak.bytes


def test_peak_memory_counts_a_step() -> None:
    size, peak = in_new_process(_peak_of_a_tensor)  # as the benchmarks do: freed memory would be used again
    assert size // 2 < peak < 2 * size
    assert in_new_process(peak_of_step, "linear", "LoCO", SETTINGS) < 2**26
