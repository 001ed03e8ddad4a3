"""From which length on a cosine transform by FFT is faster than a product with its matrix.

    python benchmarks/dct_speed.py
    python benchmarks/dct_speed.py --device cuda

The answer is `MATRIX_LENGTH` in loco_diffusion/adapters/loca/spectrum.py. Both ways are timed as they are used
there, on float32 rows, the matrix made on the spot.
"""

from __future__ import annotations

from functools import partial
from statistics import median
from typing import Annotated

import torch
import typer
from timing import in_turn, paired_ratio
from torch import Tensor

from loco_diffusion.adapters.loca import spectrum
from loco_diffusion.machine import describe_machine

LENGTHS = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 3072)


def main(
    tokens: Annotated[int, typer.Option(help="Rows to transform.")] = 1024,
    repeats: Annotated[int, typer.Option(help="Repetitions; the median counts.")] = 20,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Time both ways for each length."""
    typer.echo(
        f"{describe_machine(device, ['torch'])}\n{tokens} rows\nlength  matrix, ms  FFT, ms  FFT / matrix"
    )
    for length in LENGTHS:
        x = torch.randn(tokens, length, device=device)
        runs = {"matrix": partial(_by_matrix, x), "fft": partial(spectrum._by_fft, x)}
        samples = in_turn(runs, repeats, device)
        ratio = paired_ratio(samples["fft"], samples["matrix"])
        matrix, fft = median(samples["matrix"]), median(samples["fft"])
        typer.echo(f"{length:6}  {matrix:10.3f}  {fft:7.3f}  {ratio:12.2f}")


def _by_matrix(x: Tensor) -> Tensor:
    return x @ spectrum.dct_matrix(x.shape[-1], x).mT


if __name__ == "__main__":
    typer.run(main)
