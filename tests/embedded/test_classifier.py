"""The scene classifier's recipe: its labels are what the renderer drew, and reading them back gives the scene."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loco_diffusion.data.render import Rendering, _camera_rays, horizon, render
from loco_diffusion.data.scenes import (
    COLORS,
    GROUNDS,
    KINDS,
    MAX_OBJECTS,
    PATTERNS,
    SKIES,
    Scene,
    sample_scene,
    to_tensors,
)
from loco_diffusion.embedded import classifier
from loco_diffusion.embedded.classifier import Labels, labels_of, loss_of, mirrored
from loco_diffusion.embedded.scene_classifier import SKY_ROWS, STRIDE, SceneClassifier, sightings, truth

CELLS = 128 // STRIDE


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [sample_scene(seed) for seed in range(16)]


@pytest.fixture(scope="module")
def drawn(scenes: list[Scene]) -> Rendering:
    return render(scenes)


def perfect_logits(labels: Labels) -> tuple[torch.Tensor, ...]:
    """What a network without error would say."""
    count = len(labels.ground)
    centers = torch.full((count, CELLS, CELLS), -20.0)
    kinds, colors = (
        torch.zeros(count, len(KINDS), CELLS, CELLS),
        torch.zeros(count, len(COLORS), CELLS, CELLS),
    )
    nearness, nearest = classifier._nearness(labels, (CELLS, CELLS))
    centers[nearness == 1] = 20
    for logits, named in ((kinds, labels.kind), (colors, labels.color)):
        name = named.gather(1, nearest.flatten(1)).view_as(nearest).clamp(min=0)
        logits.scatter_(1, name[:, None], 50.0)
    whole = ((labels.ground, len(GROUNDS)), (labels.pattern, len(PATTERNS)), (labels.sky, len(SKIES) + 1))
    told = [50.0 * torch.nn.functional.one_hot(number, options).float() for number, options in whole]
    return centers, kinds, colors, *told


def test_labels_stand_on_their_solids(scenes: list[Scene], drawn: Rendering) -> None:
    places = labels_of(scenes).place
    inside = [
        bool(mask[int(row), int(column)])
        for scene, place, masks in zip(scenes, places.tolist(), drawn.masks, strict=True)
        for (column, row, _), mask in zip(place[: len(scene.solids)], masks, strict=False)
    ]
    assert sum(inside) >= 0.95 * len(inside)  # another solid may stand in front of a middle


def test_the_sky_is_in_view_where_rays_do_not_fall(scenes: list[Scene]) -> None:
    pixels = torch.tensor([[[64.0, 0.0], [64.0, SKY_ROWS]]]).expand(len(scenes), -1, -1)
    climb = _camera_rays(to_tensors(scenes), pixels, 128, 128)[1][2]
    for scene, one, (at_top, below) in zip(scenes, truth(scenes), climb.tolist(), strict=True):
        assert one.sky == (scene.sky if below >= 0 else None)
        assert at_top > below
    rows = horizon(to_tensors(scenes))
    level = torch.stack([torch.full_like(rows, 64), rows], dim=-1)[:, None]
    torch.testing.assert_close(
        _camera_rays(to_tensors(scenes), level, 128, 128)[1][2],
        torch.zeros(len(scenes), 1),
        rtol=0,
        atol=1e-5,
    )


def test_perfect_logits_read_as_the_truth_and_cost_nothing(scenes: list[Scene]) -> None:
    labels = labels_of(scenes)
    logits = perfect_logits(labels)
    assert sightings(*logits) == truth(scenes)
    assert loss_of(logits, labels) < 1e-3
    worse = logits[0], logits[1].roll(1, dims=1), *logits[2:]
    assert loss_of(worse, labels) > 10


def test_mirrored_labels_read_in_the_opposite_order(scenes: list[Scene], drawn: Rendering) -> None:
    pictures, labels = mirrored(drawn.image, labels_of(scenes))
    assert torch.equal(pictures.flip(3), drawn.image)
    for seen, real in zip(sightings(*perfect_logits(labels)), truth(scenes), strict=True):
        assert seen.solids == real.solids[::-1]
        assert (seen.ground, seen.pattern, seen.sky) == (real.ground, real.pattern, real.sky)


def test_degraded_pictures_resemble_the_pictures(drawn: Rendering) -> None:
    torch.manual_seed(0)
    worn = classifier.degraded(drawn.image)
    error = (worn - drawn.image).square().mean((1, 2, 3)).sqrt()
    assert worn.min() >= 0 and worn.max() <= 1
    assert error.min() > 0 and error.max() < 0.15 and error.std() > 0.005


def test_two_steps_of_the_recipe_make_a_classifier_that_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drawn: Rendering
) -> None:
    monkeypatch.setattr("loco_diffusion.embedded.pictures._SHARD", 8)
    monkeypatch.setattr("loco_diffusion.embedded.loop.UNFINISHED", tmp_path)
    monkeypatch.setattr(classifier, "SCENES", 8)
    monkeypatch.setattr(classifier, "BATCH", 4)
    network = classifier.build_classifier(2, tmp_path, "cpu")
    network.save_pretrained(tmp_path / "classifier")
    again = SceneClassifier.from_pretrained(tmp_path / "classifier").eval()
    for one, other in zip(network(drawn.image), again(drawn.image), strict=True):
        torch.testing.assert_close(one, other)  # the recipe's own is channels-last
    assert all(len(seen.solids) <= MAX_OBJECTS for seen in again.classify(drawn.image))
