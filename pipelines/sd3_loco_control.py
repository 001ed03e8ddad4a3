"""Stable Diffusion 3 and 3.5 with LoCO control: the stock pipeline with condition maps.

    pipe = SD3LoCOControlPipeline.from_pretrained("stabilityai/stable-diffusion-3.5-medium", dtype=torch.bfloat16)
    pipe.load_control_adapter("path/to/canny")
    image = pipe("a red cube", control={"canny": edges}, control_strength=0.8).images[0]

or, without this file on the path:

    pipe = DiffusionPipeline.from_pretrained(
        "stabilityai/stable-diffusion-3.5-medium", custom_pipeline=".../sd3_loco_control.py", trust_remote_code=True
    )
"""

from __future__ import annotations

from diffusers import StableDiffusion3Pipeline

from loco_diffusion.control import ControlledPipeline


class SD3LoCOControlPipeline(ControlledPipeline, StableDiffusion3Pipeline):
    """StableDiffusion3Pipeline whose call takes condition maps; see ControlledPipeline."""
