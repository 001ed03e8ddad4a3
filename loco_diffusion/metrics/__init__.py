"""Control scores as torchmetrics classes; `loco_diffusion.metrics.functional` has them per picture.

| task | score | what goes in |
|---|---|---|
| canny | `EdgeF1()`, `EdgeF1(tolerance=1)` | `Canny().extract` of output and input |
| depth | `PixelMSE()` | `Depth().extract` of output and input |
| mask | `MaskedMSE()`, and `PixelMSE()` on the whole | output, input, `Mask().region` |
| colorization | `GrayMSE()`, and `PixelMSE()` in colour | output, input |
| deblur | `BlurMSE()`, and `PixelMSE()` unblurred | output, input |
"""

from __future__ import annotations

from loco_diffusion.metrics.edges import EdgeF1
from loco_diffusion.metrics.pixels import BlurMSE, GrayMSE, MaskedMSE, PixelMSE

__all__ = ["BlurMSE", "EdgeF1", "GrayMSE", "MaskedMSE", "PixelMSE"]
