"""The conditions that control generation: canny, depth, mask, colorization, deblur, and those you register.

The settings are OminiControl's (arXiv 2411.15098), given for a short side of 512 pixels.
"""

from __future__ import annotations

from loco_diffusion.conditions.canny import Canny
from loco_diffusion.conditions.colorization import Colorization
from loco_diffusion.conditions.deblur import Deblur
from loco_diffusion.conditions.depth import Depth
from loco_diffusion.conditions.mask import Mask, random_rectangle, random_strokes, region_from_image
from loco_diffusion.conditions.registry import Condition, condition_names, get_condition, register_condition

for _condition in (Canny(), Depth(), Mask(), Colorization(), Deblur()):
    register_condition(_condition)

__all__ = [
    "Canny",
    "Colorization",
    "Condition",
    "Deblur",
    "Depth",
    "Mask",
    "condition_names",
    "get_condition",
    "random_rectangle",
    "random_strokes",
    "region_from_image",
    "register_condition",
]
