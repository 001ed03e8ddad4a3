"""The first run: every condition of a picture, with control and without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops

from loco_diffusion import LoCOConfig, embedded
from loco_diffusion.cli import main
from loco_diffusion.control import EncoderConfig
from loco_diffusion.data.scenes import TEST_SEEDS, sample_scene
from loco_diffusion.embedded import EXAMPLE_PICTURE, EXAMPLE_PROMPT
from loco_diffusion.errors import UserError
from loco_diffusion.generation import Session, fit_map, open_session
from loco_diffusion.grid import picture_grid
from loco_diffusion.quickstart import CONDITIONS, compare, comparison_grid


@pytest.fixture(scope="module")
def session() -> Session:
    """The packaged base with adapters that change pictures a little."""
    session = open_session()
    for condition in CONDITIONS:
        config = LoCOConfig(r=1, num_rotations=1)
        session.controller.add_adapter(condition, config, encoder=EncoderConfig(hidden_size=8))
        for parameter in session.controller.trainable_parameters(condition)["encoder"]:
            torch.nn.init.normal_(parameter, std=0.3)
    return session


@pytest.fixture(scope="module")
def weights(session: Session, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the package ships, with the adapters of `session`."""
    folder = tmp_path_factory.mktemp("weights")
    for part in ("packaged-unet", "depth"):
        (folder / part).symlink_to(embedded.WEIGHTS / part)
    for condition in CONDITIONS:
        session.controller.save_adapter(folder / "packaged-unet-adapters" / condition, condition)
    return folder


def test_compares_five_conditions_of_one_picture(session: Session) -> None:
    picture = Image.open(EXAMPLE_PICTURE)
    steps: list[tuple[str, int, int]] = []
    comparisons = compare(
        session,
        picture,
        EXAMPLE_PROMPT.read_text().strip(),
        sampling=session.sampling(steps=2),
        on_step=lambda *step: steps.append(step),
    )
    assert [c.condition for c in comparisons] == list(CONDITIONS)
    assert len({c.free.tobytes() for c in comparisons}) == 1
    assert len({c.controlled.tobytes() for c in comparisons} | {comparisons[0].free.tobytes()}) == 6
    assert [c.score.higher_is_better for c in comparisons] == [True, False, False, False, False]
    assert all(c.with_control >= 0 and c.without_control >= 0 for c in comparisons)
    assert steps[:3] == [("without control", 1, 2), ("without control", 2, 2), ("canny", 1, 2)]
    assert len(steps) == 12

    grid = comparison_grid(picture, comparisons)
    assert grid.width > 4 * 256 and grid.height > 5 * 256


def test_the_example_is_a_held_out_scene_that_the_base_can_read(session: Session) -> None:
    captions = {sample_scene(seed).caption for seed in TEST_SEEDS[:64]}
    prompt = EXAMPLE_PROMPT.read_text().strip()
    assert prompt in captions
    session.check_prompt_length(prompt)
    with pytest.raises(UserError, match="shorten it"):
        session.check_prompt_length(prompt * 3)
    assert Image.open(EXAMPLE_PICTURE).size == (128, 128)


def test_the_command_draws_a_photo_and_never_overwrites(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(embedded, "WEIGHTS", weights)
    monkeypatch.chdir(tmp_path)
    Image.radial_gradient("L").resize((300, 200)).save("photo.jpg")
    Path("quickstart.png").write_bytes(b"mine")
    assert main(["quickstart", "--image", "photo.jpg", "--steps", "1"]) == 0
    shown = capfd.readouterr()
    assert shown.err == ""
    for words in ("prompt: none", "with control", "without control", "edge F1", *CONDITIONS):
        assert words in shown.out
    assert Path("quickstart.png").read_bytes() == b"mine"
    assert Image.open("quickstart-2.png").height > 5 * 256
    assert main(["quickstart", "--out", "quickstart.png"]) == 2
    assert "--overwrite" in capfd.readouterr().err


def test_the_packaged_adapters_follow_the_example() -> None:
    session = open_session()
    session.load_adapters(dict.fromkeys(CONDITIONS))
    picture, prompt = Image.open(EXAMPLE_PICTURE), EXAMPLE_PROMPT.read_text().strip()
    for c in compare(session, picture, prompt, sampling=session.sampling(steps=8)):
        better = (
            c.with_control > c.without_control
            if c.score.higher_is_better
            else c.with_control < c.without_control
        )
        assert better, f"{c.condition}: {c.with_control:.4g} with control, {c.without_control:.4g} without"


def test_a_grid_shows_the_pictures_in_their_places() -> None:
    colors = [["red", "lime"], ["blue", "yellow"]]
    pictures = [[Image.new("RGB", (16, 8), color) for color in row] for row in colors]
    grid = picture_grid(pictures, ["one", "two\nlines"], ["left", "right"], side=32)
    positions = [[grid.getpixel((grid.width - x, grid.height - y)) for x in (60, 20)] for y in (40, 12)]
    assert positions == [[Image.new("RGB", (1, 1), c).getpixel((0, 0)) for c in row] for row in colors]


def test_a_ready_map_is_cropped_to_the_shape_before_it_is_resized() -> None:
    wide = Image.new("RGB", (64, 32))
    wide.paste("white", (31, 0, 33, 32))  # a line down the middle
    fitted = fit_map(wide, "canny", 16, 16)
    assert fitted.size == (16, 16)
    assert sorted(fitted.getcolors()) == [(32, (255, 255, 255)), (256 - 32, (0, 0, 0))]
    square = Image.new("RGB", (16, 16), "red")
    assert ImageChops.difference(fit_map(square, "depth", 16, 16), square).getbbox() is None
