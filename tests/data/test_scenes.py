from __future__ import annotations

import math

import pytest
import torch

from loco_diffusion.data.render import FAR, NEAR, render
from loco_diffusion.data.scenes import (
    COLORS,
    KINDS,
    MAX_OBJECTS,
    TEST_SEEDS,
    TRAIN_SEEDS,
    VALIDATION_SEEDS,
    Scene,
    Solid,
    sample_scene,
)


def scene_of(*solids: Solid, camera=(0.0, -8.0, 1.0), target=(0.0, 0.0, 1.0)) -> Scene:
    return Scene(
        solids=solids,
        pattern="plain",
        ground="gray",
        ground_turn=0.0,
        tile=1.0,
        sky="blue",
        light=(0.0, -0.6, 0.8),
        camera=camera,
        target=target,
        fov=math.radians(40),
    )


def solid(kind: str, x: float = 0.0, y: float = 0.0) -> Solid:
    return Solid(kind=kind, color="red", material="matte", size="medium", x=x, y=y, yaw=0.0)


def test_a_scene_depends_on_its_seed_alone() -> None:
    assert sample_scene(7) == sample_scene(7)
    together = render([sample_scene(seed) for seed in range(6)], 64)
    alone = render([sample_scene(3)], 64)
    torch.testing.assert_close(together.image[3], alone.image[0], rtol=0, atol=2e-6)
    torch.testing.assert_close(together.depth[3], alone.depth[0], rtol=0, atol=1e-6)


def test_seed_ranges_do_not_overlap() -> None:
    ranges = TRAIN_SEEDS, VALIDATION_SEEDS, TEST_SEEDS
    assert all(a.stop <= b.start for a, b in zip(ranges, ranges[1:], strict=False))


def test_captions_tell_what_is_there_from_left_to_right() -> None:
    scene = scene_of(solid("cone", x=-1.0), solid("box", x=1.0))
    assert scene.caption == (
        "a medium matte red cone and a medium matte red box on a plain gray ground under a blue sky"
    )


@pytest.mark.parametrize("seed", range(40))
def test_scenes_are_well_formed(seed: int) -> None:
    scene = sample_scene(seed)
    assert 1 <= len(scene.solids) <= MAX_OBJECTS
    assert list(scene.solids) == sorted(scene.solids, key=lambda s: s.x)
    for number, one in enumerate(scene.solids):
        for other in scene.solids[number + 1 :]:
            assert math.hypot(one.x - other.x, one.y - other.y) > one.radius + other.radius


def test_every_solid_is_visible_in_nearly_all_scenes() -> None:
    scenes = [sample_scene(seed) for seed in range(60)]
    masks = render(scenes, 64).masks.flatten(2).sum(-1)
    hidden = sum(int(masks[i, j] == 0) for i, s in enumerate(scenes) for j in range(len(s.solids)))
    assert hidden == 0
    assert all(masks[i, len(s.solids) :].sum() == 0 for i, s in enumerate(scenes))


def test_sphere_depth_is_exact() -> None:
    """A ray straight at a sphere's centre travels the distance to the centre less the radius."""
    ball = solid("sphere")
    height = ball.radius  # of its centre
    scene = scene_of(ball, camera=(0.0, -8.0, height), target=(0.0, 0.0, height))
    depth = render([scene], (65, 65)).depth[0, 32, 32]
    length = 8.0 - ball.radius
    assert depth.item() == pytest.approx((1 / length - 1 / FAR) / (1 / NEAR - 1 / FAR), abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_silhouettes_have_the_expected_width(kind: str) -> None:
    """Near its foot each solid is as wide as its shape says, in pixels of a far, narrow camera."""
    thing = solid(kind)
    scene = scene_of(thing, camera=(0.0, -400.0, 1.0), target=(0.0, 0.0, 1.0))
    scene = Scene(**{**scene.__dict__, "fov": 2 * math.atan(2.0 / 400.0)})  # 4 units across
    mask = render([scene], 129).masks[0, 0]
    widest = int(mask.sum(-1).max())
    half_width = {"sphere": 1.0, "box": 0.85, "cylinder": 0.8, "cone": 1.0}[kind] * thing.radius
    assert widest == pytest.approx(2 * half_width / 4 * 129, abs=2)


def test_colors_reach_the_picture() -> None:
    picture = render([scene_of(solid("sphere"))], 64)
    mean = picture.image[0][:, picture.masks[0, 0]].mean(-1)
    assert mean[0] > 2 * mean[1] and mean[0] > 2 * mean[2] and len(COLORS) >= 8


def test_non_square_pictures() -> None:
    picture = render([sample_scene(0)], (48, 80))
    assert picture.image.shape == (1, 3, 48, 80) and picture.masks.shape == (1, MAX_OBJECTS, 48, 80)
    assert picture.image.min() >= 0 and picture.image.max() <= 1
