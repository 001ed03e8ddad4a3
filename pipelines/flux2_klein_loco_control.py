"""FLUX.2 klein with LoCO control: the stock pipeline with condition maps.

    pipe = Flux2KleinLoCOControlPipeline.from_pretrained(
        "black-forest-labs/FLUX.2-klein-base-9B", dtype=torch.bfloat16
    )
    pipe.load_control_adapter("path/to/canny")
    image = pipe(prompt="a red cube", control={"canny": edges}, control_strength=0.8).images[0]

or, without this file on the path:

    pipe = DiffusionPipeline.from_pretrained(
        "black-forest-labs/FLUX.2-klein-base-9B",
        custom_pipeline=".../flux2_klein_loco_control.py",
        trust_remote_code=True,
    )
"""

from __future__ import annotations

from diffusers import Flux2KleinPipeline

from loco_diffusion.control import ControlledPipeline


class Flux2KleinLoCOControlPipeline(ControlledPipeline, Flux2KleinPipeline):
    """Flux2KleinPipeline whose call takes condition maps; see ControlledPipeline."""
