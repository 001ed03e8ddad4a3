"""Packaged configurations: each builds everything at tiny size and takes two steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_pipelines import TINY

from loco_diffusion.control import Controller
from loco_diffusion.errors import UserError
from loco_diffusion.training.config import TrainingConfig, load_config, make_config
from loco_diffusion.training.packaged import find_config, packaged_configs
from loco_diffusion.training.trainer import train

FAMILIES = {
    "flux1": "flux",
    "embedded": "flux",
    "embedded-unet": "sd",
    "sd35": "sd3",
    "sdxl": "sdxl",
    "sd15": "sd",
}  # by the beginnings of names


def _beginning(name: str) -> str:
    return max((beginning for beginning in FAMILIES if name.startswith(beginning)), key=len)


def _tiny(name: str, base: Path, size: int, output: Path) -> TrainingConfig:
    """The configuration with a tiny base, tiny pictures and sizes that suit them; all else is its own."""
    fields = load_config(find_config(name)).model_dump(mode="json")
    fields["adapter"]["options"] |= {"r": 1, "num_rotations": 2}
    changes: dict[str, Any] = {
        "base": str(base),
        "output": str(output),
        "data": {"source": "scenes", "count": 3, "size": size},
        "condition_options": {},  # which name networks of the hub
        "steps": 2,
        "batch_size": 2,
        "accumulation": min(2, fields["accumulation"]),
        "warmup_steps": 0,
        "log_every": 1,
    }
    return make_config(fields | changes)


@pytest.mark.parametrize("name", packaged_configs())
def test_two_tiny_steps(
    name: str, make_flux: Callable[..., Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    tiny = TINY[FAMILIES[_beginning(name)]]
    pipe = make_flux(guidance_embeds=True) if name.startswith("flux1") else tiny.build()
    pipe.save_pretrained(tmp_path / "base")
    folder = train(_tiny(name, tmp_path / "base", tiny.side, tmp_path / "run"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2]
    assert 0 < steps[0]["adapter_changed"] < steps[1]["adapter_changed"]
    assert Controller(pipe).load_adapter(folder) == load_config(find_config(name)).condition


def test_every_setting_that_is_asked_for_has_its_file() -> None:
    configs = {name: load_config(path) for name, path in packaged_configs().items()}
    flux = [config for name, config in configs.items() if name.startswith("flux1-dev-")]
    assert {c.condition for c in flux} == {"canny", "depth", "mask", "colorization", "deblur"}
    assert {c.base for c in flux} == {"black-forest-labs/FLUX.1-dev"} and {c.data.size for c in flux} == {512}
    assert {_beginning(name) for name in configs} == FAMILIES.keys()
    for name, config in configs.items():
        assert config.condition == name.rpartition("-")[2]


def test_names_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config("sdxl-canny").name == "sdxl-canny.yaml"
    (tmp_path / "sdxl-canny").write_text("condition: canny")
    assert find_config("sdxl-canny") == Path("sdxl-canny")  # of the user, who comes first
    with pytest.raises(
        UserError, match="no configuration sdxl-cany; give a YAML file, or one of .*sdxl-canny"
    ):
        find_config("sdxl-cany")
