"""From which length on a cosine transform by FFT is faster than a product with its matrix.

    python benchmarks/dct_speed.py
    python benchmarks/dct_speed.py --device cuda

The answer is `MATRIX_LENGTH` in loco_diffusion/adapters/loca/spectrum.py. Both ways are timed as they are used
there, on float32 rows, the matrix made on the spot. Writes dct_speed-DEVICE.json and .md.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from output import RESULTS, describe, write
from timing import in_turn, paired_ratio
from torch import Tensor

from loco_diffusion.adapters.loca import spectrum
from loco_diffusion.machine import describe_machine

LENGTHS = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 3072)


def main(
    tokens: Annotated[int, typer.Option(help="Rows to transform.")] = 1024,
    repeats: Annotated[int, typer.Option(help="Repetitions; the median counts.")] = 20,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = RESULTS,
) -> None:
    """Time both ways for each length and write the numbers and a table."""
    out.mkdir(parents=True, exist_ok=True)
    results = {
        "settings": {"tokens": tokens, "repeats": repeats, "device": device},
        "machine": describe_machine(device, ["torch"]),
        "rows": [measure(length, tokens, repeats, device) for length in LENGTHS],
    }
    path = out / f"dct_speed-{device}.json"
    write(results, path, to_markdown)
    typer.echo(f"Wrote {path} and {path.with_suffix('.md')}.")


def measure(length: int, tokens: int, repeats: int, device: str) -> dict[str, float]:
    """Median milliseconds of both ways, and the median ratio of FFT to matrix."""
    x = torch.randn(tokens, length, device=device)
    runs = {"matrix": partial(_by_matrix, x), "fft": partial(spectrum._by_fft, x)}
    samples = in_turn(runs, repeats, device)
    return {
        "length": length,
        "matrix_ms": median(samples["matrix"]),
        "fft_ms": median(samples["fft"]),
        "ratio": paired_ratio(samples["fft"], samples["matrix"]),
    }


def _by_matrix(x: Tensor) -> Tensor:
    return x @ spectrum.dct_matrix(x.shape[-1], x).mT


def to_markdown(results: dict[str, Any]) -> str:
    """The results as a table."""
    settings = results["settings"]
    lines = [
        "# Cosine transforms: FFT or matrix",
        "",
        f"{settings['tokens']} rows in float32. Medians of {settings['repeats']} paired repetitions.",
        "",
        describe(results["machine"]),
        "",
        "| length | matrix, ms | FFT, ms | FFT / matrix |",
        "|---:|---:|---:|---:|",
    ]
    for row in results["rows"]:
        times = f"{row['matrix_ms']:.3f} | {row['fft_ms']:.3f} | {row['ratio']:.2f}"
        lines.append(f"| {row['length']} | {times} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
