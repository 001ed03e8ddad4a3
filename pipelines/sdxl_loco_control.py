"""Stable Diffusion XL with LoCO control: the stock pipeline with condition maps.

    base = "stabilityai/stable-diffusion-xl-base-1.0"
    pipe = StableDiffusionXLLoCOControlPipeline.from_pretrained(base, dtype=torch.float16)
    pipe.load_control_adapter("path/to/canny")
    image = pipe("a red cube", control={"canny": edges}, control_strength=0.8).images[0]

or, without this file on the path:

    pipe = DiffusionPipeline.from_pretrained(
        base, custom_pipeline=".../sdxl_loco_control.py", trust_remote_code=True
    )
"""

from __future__ import annotations

from diffusers import StableDiffusionXLPipeline

from loco_diffusion.control import ControlledPipeline


class StableDiffusionXLLoCOControlPipeline(ControlledPipeline, StableDiffusionXLPipeline):
    """StableDiffusionXLPipeline whose call takes condition maps; see ControlledPipeline."""
