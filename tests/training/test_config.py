"""Configurations: the packaged ones are valid, and every mistake is one sentence that names the field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import loco_diffusion
from loco_diffusion.conditions import Canny, Mask
from loco_diffusion.errors import UserError
from loco_diffusion.training.config import TrainingConfig, config_help, load_config, make_config

ADAPTERS = Path(loco_diffusion.__file__).parent / "embedded" / "adapters"
MINIMAL = {"condition": "canny", "output": "runs/x", "steps": 3}


@pytest.mark.parametrize("condition", ["canny", "depth", "mask", "colorization", "deblur"])
def test_packaged_configs_are_valid(condition: str) -> None:
    config = load_config(ADAPTERS / f"{condition}.yaml")
    assert (config.condition, config.base, config.data.source) == (condition, "packaged-dit", "scenes")


def test_yaml_pitfalls_are_understood(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    # YAML 1.1 reads `no` as false and 1e-3 as text.
    path.write_text("condition: depth\noutput: out\nsteps: 3\nlr: 1e-3\nmixed_precision: no\n")
    config = load_config(path)
    assert config.mixed_precision == "no" and config.lr == 1e-3


def test_options_reach_the_condition() -> None:
    fields = {
        "condition": "mask",
        "condition_options": {"training_shapes": ["strokes"], "training_inverted": 1},
    }
    assert make_config({**MINIMAL, **fields}).make_condition() == Mask(("strokes",), 1.0)
    assert make_config(MINIMAL).make_condition() == Canny()


def test_every_field_has_its_help() -> None:
    text = config_help()
    for name in TrainingConfig.model_fields:
        line = next(line for line in text.splitlines() if line.startswith(f"{name}: "))
        assert TrainingConfig.model_fields[name].description in line


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stepz": 3}, "field stepz is not known; did you mean steps."),
        ({"steps": 0}, "field steps: input should be greater than or equal to 1, got 0"),
        ({"condition": "cany"}, "field condition: There is no condition 'cany'; choose one of canny,"),
        ({"data": {"source": "scenes", "cout": 2}}, "field data.cout is not known; did you mean count"),
        ({"data": {"source": "folder"}}, "field data.path is missing"),
        (
            {"data": {"source": "tars", "path": "x", "splt": 1}},
            "field data.splt is not known; choose from size,",
        ),
        ({"data": {"source": "folder", "path": "x", "max_aspect_ratio": 2, "size": 64}}, "lower aspect_step"),
        (
            {"data": {"source": "dataset", "name": "x", "streaming": True}, "cache_folder": "x"},
            "is not cached",
        ),
        ({"condition_options": {"lo": 1}}, "Canny has no option 'lo'; did you mean low"),
        ({"condition_options": {"low": "few"}}, "option low: "),
        (
            {"condition": "mask", "condition_options": {"training_shapes": ["star"]}},
            "field condition_options: option training_shapes: ",
        ),
        ({"condition": "mask", "condition_options": {"training_shapes": []}}, "training_shapes must be of"),
        ({"condition": "mask", "condition_options": {"training_inverted": 2}}, r"must be in [0, 1], not 2"),
        (
            {"condition": "deblur", "condition_options": {"training_radii": [3, 1]}},
            "must rise from at least 0",
        ),
        ({"data": {"source": "web"}}, "field data: input tag 'web'"),
        ({"lr": float("nan")}, "field lr: input should be a finite number"),
        ({"adapter": {"method": "locoo"}}, "no adapter method 'locoo'; did you mean loco"),
        ({"adapter": {"options": {"rank": 4}}}, "LoCOConfig has no option 'rank'; choose from "),
        ({"adapter": {"options": {"r": "four"}}}, "field adapter: option r: "),
        ({"adapter": {"options": {"num_rotations": 0}}}, "LoCOConfig.num_rotations must be"),
        ({"adapter": {"options": {"target_modules": ["to_q"]}}}, "target_modules belongs beside options"),
        ({"adapter": {"method": "lora", "options": {"num_rotations": 4}}}, "LoraConfig has no option"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        make_config({**MINIMAL, **fields}, "run.yaml")
    assert str(caught.value).startswith("run.yaml: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read (No such file or directory)"),
        ("steps: [1", "is malformed in line"),
        ("- 1\n- 2\n", "is no list of `field: value` lines"),
        ("", "is no list of `field: value` lines"),
        ("a: !!python/object/apply:os.getcwd []\n", "is malformed"),
        ("steps: 3\noutput: x\n", "field condition is missing; add it"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert str(path) in str(caught.value) and message in str(caught.value)
    assert "\n" not in str(caught.value)
