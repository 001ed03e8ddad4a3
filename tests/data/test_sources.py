"""Sources of training pictures: good ones give pictures and captions, bad ones say what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from loco_diffusion.data.scenes import sample_scene
from loco_diffusion.data.sources import DatasetSource, FolderSource, SceneSource
from loco_diffusion.errors import UserError


def _picture(width: int, height: int, value: int) -> Image.Image:
    return Image.fromarray(np.full((height, width, 3), value, dtype=np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    _picture(40, 20, 10).save(tmp_path / "a.png")
    _picture(32, 32, 200).save(tmp_path / "sub" / "b.png")
    lines = [{"file_name": "a.png", "text": "dark"}, {"file_name": "sub/b.png", "text": "bright"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    return tmp_path


def test_scenes_are_the_training_scenes() -> None:
    source = SceneSource(5, 32)
    picture = source.picture(3)
    assert picture.shape == (3, 32, 32) and picture.dtype == torch.uint8
    assert torch.equal(picture, source.picture(3)) and not torch.equal(picture, source.picture(4))
    assert source.caption(1) == sample_scene(1).caption
    assert len(source) == 5


def test_folder_fits_pictures_and_reads_captions(folder: Path) -> None:
    source = FolderSource(folder, 16)
    assert len(source) == 2
    assert [source.caption(0), source.caption(1)] == ["dark", "bright"]
    for index, value in enumerate((10, 200)):
        assert torch.equal(source.picture(index), torch.full((3, 16, 16), value, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "metadata.jsonl cannot be read"),
        ("", "lists no pictures"),
        ("{oops", "Line 1 of .* is not valid JSON"),
        ('["a.png"]', "Line 1 of .* is not an object"),
        ('{"file_name": "a.png"}', 'needs the text field "text"'),
        ('{"file_name": "c.png", "text": "?"}', "'c.png', which does not exist"),
    ],
)
def test_bad_metadata_is_refused(folder: Path, text: str | None, message: str) -> None:
    (folder / "metadata.jsonl").unlink()
    if text is not None:
        (folder / "metadata.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        FolderSource(folder, 16)


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not exist; check data\.path"):
        FolderSource(tmp_path / "nowhere", 16)


def test_damaged_picture_is_named(folder: Path) -> None:
    (folder / "a.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"a\.png is damaged"):
        FolderSource(folder, 16).picture(0)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    images = [_picture(24, 16, value) for value in (0, 100, 255)]
    features = datasets.Features(
        {"image": datasets.Image(), "text": datasets.Value("string"), "all": [datasets.Value("string")]}
    )
    captions = [["x", "y"], ["z"], ["w"]]
    data = datasets.Dataset.from_dict(
        {"image": images, "text": ["a", "b", None], "all": captions}, features=features
    )
    data.save_to_disk(str(tmp_path / "set"))
    return tmp_path / "set"


def test_saved_dataset(saved: Path) -> None:
    source = DatasetSource(str(saved), "train", "image", "text", 16)
    assert len(source) == 3
    for index, value in enumerate((0, 100, 255)):
        assert torch.equal(source.picture(index), torch.full((3, 16, 16), value, dtype=torch.uint8))
    assert [source.caption(0), source.caption(1)] == ["a", "b"]
    assert DatasetSource(str(saved), "train", "image", "all", 16).caption(0) == "x"


def test_dataset_of_a_picture_folder(folder: Path) -> None:
    source = DatasetSource(str(folder), "train", "image", "text", 16)
    assert {source.caption(0), source.caption(1)} == {"bright", "dark"}
    assert source.picture(0).shape == (3, 16, 16)


@pytest.mark.parametrize(
    ("split", "image", "caption", "message"),
    [
        ("test", "image", "text", "split 'test' .* cannot be loaded"),
        ("train", "picture", "text", r"no column 'picture'; choose one of its columns \(image, text, all\)"),
        ("train", "all", "text", "'all' .* holds no pictures"),
    ],
)
def test_bad_dataset_settings_are_refused(
    saved: Path, split: str, image: str, caption: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        DatasetSource(str(saved), split, image, caption, 16)


def test_missing_caption_is_refused(saved: Path) -> None:
    with pytest.raises(UserError, match="Caption 2 .* is no text"):
        DatasetSource(str(saved), "train", "image", "text", 16).caption(2)


def test_missing_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be loaded"):
        DatasetSource(str(tmp_path / "nowhere"), "train", "image", "text", 16)
