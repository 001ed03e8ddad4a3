"""FLUX.1 with LoCO control: the stock pipeline with condition maps.

    pipe = FluxLoCOControlPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", dtype=torch.bfloat16)
    pipe.load_control_adapter("path/to/canny")
    image = pipe("a red cube", control={"canny": edges}, control_strength=0.8).images[0]

or, without this file on the path:

    pipe = DiffusionPipeline.from_pretrained(
        "black-forest-labs/FLUX.1-dev", custom_pipeline=".../flux_loco_control.py", trust_remote_code=True
    )
"""

from __future__ import annotations

from diffusers import FluxPipeline

from loco_diffusion.control import ControlledPipeline


class FluxLoCOControlPipeline(ControlledPipeline, FluxPipeline):
    """FluxPipeline whose call takes condition maps; see ControlledPipeline."""
