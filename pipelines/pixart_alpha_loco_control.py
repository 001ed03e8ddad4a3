"""PixArt-alpha with LoCO control: the stock pipeline with condition maps.

    pipe = PixArtAlphaLoCOControlPipeline.from_pretrained("PixArt-alpha/PixArt-XL-2-1024-MS", dtype=torch.bfloat16)
    pipe.load_control_adapter("path/to/canny")
    image = pipe("a red cube", control={"canny": edges}, control_strength=0.8).images[0]

or, without this file on the path:

    pipe = DiffusionPipeline.from_pretrained(
        "PixArt-alpha/PixArt-XL-2-1024-MS", custom_pipeline=".../pixart_alpha_loco_control.py", trust_remote_code=True
    )
"""

from __future__ import annotations

from diffusers import PixArtAlphaPipeline

from loco_diffusion.control import ControlledPipeline


class PixArtAlphaLoCOControlPipeline(ControlledPipeline, PixArtAlphaPipeline):
    """PixArtAlphaPipeline whose call takes condition maps; see ControlledPipeline."""
