"""Stable Diffusion 1 and 2 with LoCO control: the stock pipeline with condition maps.

    base = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    pipe = StableDiffusionLoCOControlPipeline.from_pretrained(base, dtype=torch.float16)
    pipe.load_control_adapter("path/to/canny")
    image = pipe("a red cube", control={"canny": edges}, control_strength=0.8).images[0]

or, without this file on the path:

    pipe = DiffusionPipeline.from_pretrained(
        base, custom_pipeline=".../sd_loco_control.py", trust_remote_code=True
    )
"""

from __future__ import annotations

from diffusers import StableDiffusionPipeline

from loco_diffusion.control import ControlledPipeline


class StableDiffusionLoCOControlPipeline(ControlledPipeline, StableDiffusionPipeline):
    """StableDiffusionPipeline whose call takes condition maps; see ControlledPipeline."""
