"""Adapter folders merged into one control as the adapters do together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from control_helpers import add_trained, condition_map, draw
from diffusers import FluxPipeline
from peft import LoraConfig

from loco_diffusion import Controller
from loco_diffusion.adapters.combine import Combination
from loco_diffusion.adapters.peft_folder import PeftFolder
from loco_diffusion.control import EncoderConfig, adapter_folder
from loco_diffusion.control.adapter_folder import AdapterFolder, BaseDescription
from loco_diffusion.control.merging import merge_folders
from loco_diffusion.errors import UserError


@pytest.fixture
def saved(flux: FluxPipeline, tmp_path: Path) -> list[AdapterFolder]:
    """Two adapters for edges, in folders "one" and "two", whose encoders differ in width."""
    controller = Controller(flux)
    contents = []
    for seed, name in enumerate(("one", "two")):
        add_trained(controller, name, seed, EncoderConfig(hidden_size=8 * (1 + seed)), side="both")
        content = adapter_folder.read(controller.save_adapter(tmp_path / name, name))
        content = replace(content, control=content.control.model_copy(update={"condition": "edges"}))
        adapter_folder.write(tmp_path / name, content)
        contents.append(content)
        controller.delete_adapter(name)
    return contents


def test_a_composed_adapter_controls_as_both_together(
    flux: FluxPipeline, saved: list[AdapterFolder], tmp_path: Path
) -> None:
    strengths = {"one": 0.7, "two": -0.4}
    merged = merge_folders(saved, "compose", list(strengths.values()))
    assert isinstance(merged, AdapterFolder)
    assert merged.control.condition == "edges" and merged.control.encoder.hidden_size == 24
    adapter_folder.write(tmp_path / "merged", merged)
    controller = Controller(flux)
    for name in (*strengths, "merged"):
        controller.load_adapter(tmp_path / name, name)
    image = condition_map()
    with controller(one=image, two=image, strength=strengths):
        expected = draw(flux)
    with controller(merged=image):
        torch.testing.assert_close(draw(flux), expected, atol=1e-4, rtol=1e-4)
    with controller(one=image, strength=0.7):
        assert not torch.allclose(draw(flux), expected, atol=1e-2)


@pytest.mark.parametrize("how", ["compose", "lie"])
def test_an_adapter_without_encoder_stays_without(saved: list[AdapterFolder], how: Combination) -> None:
    plain = [PeftFolder(content.method, content.adapter) for content in saved]
    merged = merge_folders(plain, how, [1.0, 1.0])
    assert type(merged) is PeftFolder
    with_encoder = merge_folders(saved, how, [1.0, 1.0])
    assert all(torch.equal(merged.adapter[name], with_encoder.adapter[name]) for name in merged.adapter)


def changed(content: AdapterFolder, **changes: Any) -> AdapterFolder:
    return replace(content, control=content.control.model_copy(update=changes))


def test_what_does_not_belong_together_is_refused(saved: list[AdapterFolder]) -> None:
    first, second = saved
    base = BaseDescription(denoiser="FluxTransformer2DModel", config={"num_layers": 19}, name_or_path="dev")
    for other, message in (
        (changed(second, condition="depth"), "different conditions .edges and depth."),
        (changed(second, base=base), "different base models .*dev"),
        (changed(second, encoder=EncoderConfig("latents")), "read different things .pixels and latents."),
        (PeftFolder(second.method, second.adapter), "Only some of the adapters have a condition encoder"),
        (replace(second, method=LoraConfig(r=1)), "these are LoCO and Lora"),
        (replace(second, encoder={}), "does not match its configuration"),
    ):
        with pytest.raises(UserError, match=message):
            merge_folders([first, other], "compose", [1.0, 1.0])
