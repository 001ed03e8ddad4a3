"""What the script says of a base: on two pictures and two steps, and the accuracy of made-up sightings."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from loco_diffusion.conditions import get_condition
from loco_diffusion.data.render import render
from loco_diffusion.data.scenes import TEST_SEEDS, sample_scene
from loco_diffusion.embedded.scene_classifier import Sighting
from loco_diffusion.generation import open_session
from loco_diffusion.images import to_pil, to_tensor
from loco_diffusion.metrics.functional import edge_f1, pixel_mse

EVAL = Path(__file__).parents[2] / "eval"
sys.path.insert(0, str(EVAL))
import base_quality  # noqa: E402
from prompt_accuracy import TITLES, PromptAccuracy, matches  # noqa: E402

RED, BLUE, GREEN = ("box", "red"), ("cone", "blue"), ("sphere", "green")


def test_solids_are_assigned_so_that_most_is_right() -> None:
    right, wrong = (True, True), (False, False)
    assert matches([BLUE, RED], [RED, BLUE]) == [right, right]
    assert matches([GREEN, BLUE, RED], [RED]) == [right]
    assert matches([], [RED, BLUE]) == [wrong, wrong]
    assert matches([RED], [RED, RED]) in ([right, wrong], [wrong, right])
    # Two solids half right or one wholly: as many answers, but one solid is what was asked for.
    assert sorted(matches([("box", "blue"), RED], [RED, ("cone", "blue")])) == [(False, True), right]
    assert matches([("box", "blue")], [RED]) == [(True, False)]


def test_accuracy_is_the_share_of_right_answers() -> None:
    accuracy = PromptAccuracy()
    wanted = Sighting((RED, BLUE), "gray", "plain", "night")
    accuracy.update(wanted, wanted)
    accuracy.update(Sighting((("box", "green"),), "gray", "striped", "dawn"), wanted)
    accuracy.update(Sighting((RED, BLUE, GREEN), "teal", "plain", None), wanted, sky_counts=False)
    shares = accuracy.compute()
    expected = {
        "color": 4 / 6,
        "kind": 5 / 6,
        "both": 4 / 6,
        "count": 1 / 3,
        "ground": 1 / 3,
        "ground_color": 2 / 3,
        "pattern": 2 / 3,
        "sky": 1 / 2,
        "mean": (4 / 6 + 5 / 6 + 1 / 3 + 1 / 2) / 4,
        "sky_in_view": 2 / 3,
    }
    assert shares == pytest.approx(expected)


def test_a_sky_that_is_never_judged_has_no_share() -> None:
    accuracy = PromptAccuracy()
    wanted = Sighting((RED,), "gray", "plain", "night")
    accuracy.update(Sighting((RED,), "gray", "plain", None), wanted, sky_counts=False)
    assert accuracy.compute()["sky"] is None and accuracy.compute()["mean"] == 1


def test_what_is_written_is_what_was_drawn(tmp_path: Path) -> None:
    arguments = ["--count", "2", "--steps", "2", "--guidance", "1", "--out", str(tmp_path)]
    assert base_quality.main(arguments) == 0
    folder = tmp_path / "packaged-unet"
    assert {path.name for path in folder.iterdir()} == {"README.md", "quality.json", "pictures.png"}
    result = json.loads((folder / "quality.json").read_text())
    assert result["run_info"]["settings"] == {"pictures": 2, "steps": 2, "guidance": 1.0, "seed": 42}
    scenes = [sample_scene(seed) for seed in TEST_SEEDS[:2]]
    originals = [to_pil(picture) for picture in render(scenes).image]
    decoded = open_session().reconstruct(originals)

    def maps(name: str, pictures: list[Image.Image]) -> torch.Tensor:
        return torch.stack([to_tensor(get_condition(name).extract(picture)) for picture in pictures])

    scores = result["scores"]
    edges = edge_f1(maps("canny", decoded), maps("canny", originals)).mean().item()
    assert scores["vae"]["f1"] == pytest.approx(edges, abs=1e-3)
    floor = pixel_mse(maps("depth", decoded), maps("depth", originals)).mean().item()
    assert scores["depth"]["round_trip"] == pytest.approx(floor, rel=1e-2)
    assert 0 < scores["depth"]["network"] < 1000
    for source in base_quality.SOURCES:
        assert set(scores[source]) == {*TITLES, "mean", "sky_in_view"}
    assert Image.open(folder / "pictures.png").width > 6 * 128
    text = (folder / "README.md").read_text()
    assert f"2. {scenes[1].caption}" in text and "## Bars" in text and "2 steps with guidance 1" in text
    assert str(tmp_path) not in text + (folder / "quality.json").read_text()


def test_a_missing_base_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert base_quality.main(["--base", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    captured = capfd.readouterr()
    assert captured.err.count("\n") == 1 and "There is no model folder" in captured.err
    assert not (tmp_path / "out").exists()
