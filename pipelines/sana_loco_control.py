"""Sana with LoCO control: the stock pipeline with condition maps.

    base = "Efficient-Large-Model/Sana_1600M_1024px_diffusers"
    pipe = SanaLoCOControlPipeline.from_pretrained(base, dtype=torch.bfloat16)
    pipe.load_control_adapter("path/to/canny")
    image = pipe("a red cube", control={"canny": edges}, control_strength=0.8).images[0]

or, without this file on the path:

    pipe = DiffusionPipeline.from_pretrained(
        base, custom_pipeline=".../sana_loco_control.py", trust_remote_code=True
    )
"""

from __future__ import annotations

from diffusers import SanaPipeline

from loco_diffusion.control import ControlledPipeline


class SanaLoCOControlPipeline(ControlledPipeline, SanaPipeline):
    """SanaPipeline whose call takes condition maps; see ControlledPipeline."""
