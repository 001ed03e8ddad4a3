"""The registry and the four conditions that need no network."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import cv2
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from loco_diffusion.conditions import (
    Canny,
    Colorization,
    Deblur,
    Mask,
    condition_names,
    get_condition,
    random_rectangle,
    random_strokes,
    region_from_image,
    register_condition,
    registry,
)
from loco_diffusion.errors import UserError

SIZES = [(128, 128), (100, 75), (61, 130), (64, 192), (16, 16)]
BUILT_IN = ["canny", "depth", "mask", "colorization", "deblur"]


def shapes(size: tuple[int, int]) -> Image.Image:
    """A red disc and a blue box on a gray gradient."""
    width, height = size
    image = Image.fromarray(
        np.linspace(80, 160, width * height).reshape(height, width).astype(np.uint8)
    ).convert("RGB")
    draw = ImageDraw.Draw(image)
    draw.ellipse((width * 0.1, height * 0.2, width * 0.5, height * 0.7), fill=(220, 30, 20))
    draw.rectangle((width * 0.6, height * 0.4, width * 0.9, height * 0.9), fill=(20, 40, 230))
    return image


@dataclass(frozen=True)
class Posterize:
    """The condition of the registry's docstring."""

    bits: int = 2
    name: ClassVar[str] = "posterize"

    def extract(self, image: Image.Image, rng: np.random.Generator | None = None) -> Image.Image:
        return ImageOps.posterize(image, self.bits)


@pytest.fixture
def clean_registry() -> Iterator[None]:
    before = dict(registry._REGISTRY)
    yield
    registry._REGISTRY.clear()
    registry._REGISTRY.update(before)


def test_the_five_are_registered() -> None:
    assert condition_names()[:5] == BUILT_IN
    for name in BUILT_IN:
        assert get_condition(name).name == name


def test_unknown_condition_lists_those_there_are() -> None:
    with pytest.raises(UserError, match="'pose'.*canny, depth, mask, colorization, deblur"):
        get_condition("pose")


@pytest.mark.usefixtures("clean_registry")
def test_users_add_their_own() -> None:
    assert register_condition(Posterize()) is get_condition("posterize")
    assert condition_names() == [*BUILT_IN, "posterize"]
    register_condition(Posterize())  # an equal one again, as when a module is reloaded
    with pytest.raises(UserError, match="already named"):
        register_condition(Posterize(bits=3))


@pytest.mark.parametrize("bad", ["", "Canny", "two words", "a=b", "../x"])
def test_bad_names_are_refused(bad: str) -> None:
    @dataclass(frozen=True)
    class Nameless(Posterize):
        name: ClassVar[str] = bad

    with pytest.raises(UserError, match="name a condition"):
        register_condition(Nameless())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["canny", "mask", "colorization", "deblur"])
def test_maps_have_the_picture_size_and_repeat(name: str, size: tuple[int, int]) -> None:
    image, condition = shapes(size), get_condition(name)
    before = image.tobytes()
    first = condition.extract(image)
    assert first.mode == "RGB" and first.size == size
    assert first.tobytes() == condition.extract(image).tobytes() and image.tobytes() == before
    drawn = [condition.extract(image, np.random.default_rng(7)).tobytes() for _ in range(2)]
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("size", SIZES)
def test_canny_is_binary_and_that_of_opencv(size: tuple[int, int]) -> None:
    image = shapes(size)
    edges = np.asarray(Canny().extract(image))
    assert set(np.unique(edges)) == {0, 255}
    assert (edges[..., :1] == edges).all()
    expected = cv2.Canny(np.asarray(image), 100, 200)
    inside = np.s_[2:-2, 2:-2]  # padding may move edges at the very border
    assert (edges[..., 0][inside] == expected[inside]).mean() > 0.995
    if size[0] % 64 == size[1] % 64 == 0:
        assert (edges[..., 0] == expected).all()


def test_canny_of_a_flat_picture_is_black() -> None:
    assert np.asarray(Canny().extract(Image.new("RGB", (70, 50), "teal"))).max() == 0


def test_colorization_is_pillows_gray() -> None:
    image = shapes((100, 75))
    assert Colorization().extract(image).tobytes() == image.convert("L").convert("RGB").tobytes()


def test_deblur_radius_scales_with_the_short_side() -> None:
    image = shapes((256, 128))
    expected = image.filter(ImageFilter.GaussianBlur(1.25))
    assert Deblur().extract(image).tobytes() == expected.tobytes()
    fixed = Deblur(training_radii=(3.0, 3.0)).extract(image, np.random.default_rng(0))
    assert fixed.tobytes() == image.filter(ImageFilter.GaussianBlur(0.75)).tobytes()
    rng = np.random.default_rng(0)
    assert len({Deblur().extract(image, rng).tobytes() for _ in range(5)}) == 5


@pytest.mark.parametrize("size", SIZES)
def test_mask_hides_its_region_and_nothing_else(size: tuple[int, int]) -> None:
    image = shapes(size)
    for seed in (None, 0, 1):
        generators = [None if seed is None else np.random.default_rng(seed) for _ in range(2)]
        hidden = Mask().region(*size, generators[0])
        masked = np.asarray(Mask().extract(image, generators[1]))
        assert hidden.shape == (size[1], size[0]) and hidden.dtype == bool
        assert (masked[hidden] == 0).all() and (masked[~hidden] == np.asarray(image)[~hidden]).all()


def test_central_region() -> None:
    hidden = Mask().region(8, 4)
    assert hidden.sum() == 8 and hidden[1:3, 2:6].all()


def test_users_bring_their_own_mask() -> None:
    image, drawing = shapes((40, 30)), Image.new("RGB", (40, 30))
    drawing.paste((255, 255, 255), (0, 0, 10, 10))
    hidden = region_from_image(drawing)
    assert hidden.sum() == 100
    masked = np.asarray(Mask().apply(image, hidden))
    assert masked[:10, :10].max() == 0 and (masked[10:] == np.asarray(image)[10:]).all()
    with pytest.raises(UserError, match="30x40 px and the picture 40x30 px"):
        Mask().apply(image, hidden.T)


@pytest.mark.parametrize("size", [(128, 128), (2, 2), (2, 300), (17, 5)])
def test_random_rectangles(size: tuple[int, int]) -> None:
    width, height = size
    rng = np.random.default_rng(0)
    areas = []
    for _ in range(200):
        hidden = random_rectangle(width, height, rng)
        rows, columns = np.flatnonzero(hidden.any(1)), np.flatnonzero(hidden.any(0))
        assert hidden.shape == (height, width)
        assert hidden[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()  # one solid rectangle
        areas.append(hidden.mean())
    assert min(areas) >= 0.05 and max(areas) <= 0.95
    if size == (128, 128):
        assert len(set(areas)) > 150
    with pytest.raises(ValueError, match="at least 2 px"):
        random_rectangle(1, 50, rng)


@pytest.mark.parametrize("size", [(128, 96), (2, 2), (2, 300), (17, 5)])
def test_random_strokes(size: tuple[int, int]) -> None:
    width, height = size
    rng, solid, seen = np.random.default_rng(0), 0, set()
    for _ in range(50):
        hidden = random_strokes(width, height, rng)
        rows, columns = np.flatnonzero(hidden.any(1)), np.flatnonzero(hidden.any(0))
        solid += hidden[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        assert hidden.shape == (height, width) and 0.05 <= hidden.mean() <= 0.95
        seen.add(hidden.tobytes())
    if size == (128, 96):
        assert len(seen) == 50 and solid < 5  # strokes are no rectangles
    assert np.array_equal(*(random_strokes(width, height, np.random.default_rng(3)) for _ in range(2)))
    with pytest.raises(ValueError, match="at least 2 px"):
        random_strokes(50, 1, rng)


def test_masks_are_of_the_shapes_that_training_asks_for() -> None:
    def region(mask: Mask, seed: int) -> np.ndarray:
        return mask.region(40, 30, np.random.default_rng(seed))

    for seed in range(5):
        rectangle = region(Mask(), seed)
        assert np.array_equal(rectangle, random_rectangle(40, 30, np.random.default_rng(seed)))
        assert np.array_equal(region(Mask(training_inverted=1.0), seed), ~rectangle)
        strokes = random_strokes(40, 30, np.random.default_rng(seed))
        assert np.array_equal(region(Mask(("strokes",)), seed), strokes)
    both = Mask(("rectangle", "strokes"), training_inverted=0.5)
    corners = [region(both, seed)[[0, 0, -1, -1], [0, -1, 0, -1]].sum() for seed in range(60)]
    assert 15 < sum(hidden >= 3 for hidden in corners) < 45  # about half hide all but a region
    assert np.array_equal(both.region(8, 4), Mask().region(8, 4))  # use does not change with training


def test_import_is_light() -> None:
    code = "import sys, loco_diffusion.conditions; print(set(sys.argv) & set(sys.modules))"
    heavy = ["controlnet_aux", "gradio", "datasets"]
    result = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
