"""Qwen-Image with LoCO control: the stock pipeline with condition maps.

    pipe = QwenImageLoCOControlPipeline.from_pretrained("Qwen/Qwen-Image", dtype=torch.bfloat16)
    pipe.load_control_adapter("path/to/canny")
    image = pipe("a red cube", control={"canny": edges}, control_strength=0.8).images[0]

or, without this file on the path:

    pipe = DiffusionPipeline.from_pretrained(
        "Qwen/Qwen-Image", custom_pipeline=".../qwenimage_loco_control.py", trust_remote_code=True
    )
"""

from __future__ import annotations

from diffusers import QwenImagePipeline

from loco_diffusion.control import ControlledPipeline


class QwenImageLoCOControlPipeline(ControlledPipeline, QwenImagePipeline):
    """QwenImagePipeline whose call takes condition maps; see ControlledPipeline."""
