"""Crops, flips and sizes: exact, the same for picture and map, and every bucket as wide as it says."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageOps

from loco_diffusion.data.framing import Frame, Framing, bucket_sizes
from loco_diffusion.images import fit

CONDITIONS = ("canny", "mask", "depth")


def _noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(1, 256, (height, width, 3), dtype=np.uint8))


def test_centre_frames_are_fitted_pictures() -> None:
    for size in ((70, 33), (33, 70), (40, 40), (32, 24)):
        image = _noise(*size)
        frame = Framing(((32, 24),)).frame(size, 0, np.random.default_rng(0))
        assert frame.apply(image) == fit(image, 32, 24)


@pytest.mark.parametrize("size", [(70, 24), (32, 60), (32, 24)])
def test_random_crops_and_flips_keep_pixels_of_picture_and_map(size: tuple[int, int]) -> None:
    image, rng = _noise(*size), np.random.default_rng(0)
    pixels, seen = np.asarray(image), set()
    for _ in range(60):
        frame = Framing(((32, 24),), random_crop=True, random_flip=True).frame(size, 0, rng)
        left, upper = (int(edge) for edge in frame.box[:2])
        expected = pixels[upper : upper + 24, left : left + 32]
        expected = expected[:, ::-1] if frame.flip else expected
        assert np.array_equal(np.asarray(frame.apply(image)), expected)
        for condition in CONDITIONS:
            assert np.array_equal(np.asarray(frame.apply_to_map(image, condition)), expected)
        seen.add((left, upper, frame.flip))
    assert {flip for *_, flip in seen} == {False, True}
    assert len(seen) > 30 or size == (32, 24)
    assert max(left for left, *_ in seen) <= size[0] - 32 and max(u for _, u, _ in seen) <= size[1] - 24


def test_maps_of_another_resolution_show_the_same_part() -> None:
    small = _noise(35, 12)
    large = small.resize((70, 24), Image.Resampling.NEAREST)
    frame = Framing(((32, 24),), random_crop=True).frame((70, 24), 0, np.random.default_rng(3))
    left = int(frame.box[0]) // 2 * 2
    even = Frame((left, 0, left + 32, 24), (70, 24), (32, 24))
    shown = np.asarray(even.apply(large))
    assert np.array_equal(np.asarray(even.apply_to_map(small, "canny")), shown)
    assert np.array_equal(np.asarray(even.apply_to_map(small.resize((140, 48), 0), "canny")), shown)


def test_resized_edges_stay_black_and_white_and_are_not_lost() -> None:
    edges = np.zeros((96, 128, 3), dtype=np.uint8)
    edges[:, 50] = 255
    frame = Framing(((32, 24),)).frame((128, 96), 0, np.random.default_rng(0))
    found = np.asarray(frame.apply_to_map(Image.fromarray(edges), "canny"))
    assert set(np.unique(found)) == {0, 255} and (found[:, 12] == 255).all() and found.mean() < 20
    flipped = Frame(frame.box, frame.picture, frame.size, flip=True)
    assert flipped.apply_to_map(Image.fromarray(edges), "canny") == ImageOps.mirror(Image.fromarray(found))


@pytest.mark.parametrize(("size", "ratio", "step"), [(512, 2.0, 64), (1024, 3.0, 32), (64, 2.0, 16)])
def test_buckets_are_large_and_not_too_long(size: int, ratio: float, step: int) -> None:
    sizes = bucket_sizes(size, ratio, step)
    assert sizes[0] == (size, size) and len(set(sizes)) == len(sizes) > 2
    for width, height in sizes:
        assert width % step == height % step == 0 and width * height <= size * size
        assert max(width, height) <= ratio * min(width, height) and (height, width) in sizes
        assert (max(width, height) + step) * min(width, height) > size * size or width == height
    framing = Framing(sizes)
    assert all(framing.bucket((3 * w, 3 * h)) == number for number, (w, h) in enumerate(sizes))
    assert sizes[framing.bucket((100, 99))] == (size, size)
    assert bucket_sizes(size, 1.0, step) == ((size, size),)
