"""FLUX.2 with LoCO control: the stock pipeline with condition maps.

    pipe = Flux2LoCOControlPipeline.from_pretrained("black-forest-labs/FLUX.2-dev", dtype=torch.bfloat16)
    pipe.load_control_adapter("path/to/canny")
    image = pipe(prompt="a red cube", control={"canny": edges}, control_strength=0.8).images[0]

or, without this file on the path:

    pipe = DiffusionPipeline.from_pretrained(
        "black-forest-labs/FLUX.2-dev", custom_pipeline=".../flux2_loco_control.py", trust_remote_code=True
    )
"""

from __future__ import annotations

from diffusers import Flux2Pipeline

from loco_diffusion.control import ControlledPipeline


class Flux2LoCOControlPipeline(ControlledPipeline, Flux2Pipeline):
    """Flux2Pipeline whose call takes condition maps; see ControlledPipeline."""
