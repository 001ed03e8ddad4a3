"""Sources of training pictures: good ones give pictures and captions, bad ones say what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from loco_diffusion.data.render import render
from loco_diffusion.data.scenes import sample_scene
from loco_diffusion.data.sources import FolderSource, Record, SceneSource
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
    picture = source[3].picture()
    assert picture.size == source[3].size() == (32, 32)
    assert picture == source[3].picture() and picture != source[4].picture()
    drawn = render([sample_scene(3)], 32).image[0]
    assert np.array_equal(np.asarray(picture), (drawn * 255).round().byte().permute(1, 2, 0).numpy())
    assert source[1].caption == sample_scene(1).caption
    assert len(source) == 5 and source[0].map() is None


def test_folder_reads_pictures_and_captions(folder: Path) -> None:
    source = FolderSource(folder)
    assert [source[index].caption for index in range(len(source))] == ["dark", "bright"]
    for index, size, value in ((0, (40, 20), 10), (1, (32, 32), 200)):
        assert source[index].picture() == _picture(*size, value) and source[index].size() == size
        assert source[index].map() is None


def test_folder_reads_maps(folder: Path) -> None:
    _picture(80, 40, 7).save(folder / "map.png")
    line = {"file_name": "a.png", "text": "dark", "edges": "map.png"}
    (folder / "metadata.jsonl").write_text(json.dumps(line))
    assert FolderSource(folder, "edges")[0].map() == _picture(80, 40, 7)
    with pytest.raises(UserError, match='needs the text field "depth"'):
        FolderSource(folder, "depth")
    (folder / "map.png").unlink()
    with pytest.raises(UserError, match=r"names 'map.png', which does not exist"):
        FolderSource(folder, "edges")


def test_identities_change_with_the_part_that_changed(folder: Path) -> None:
    def identities() -> list[str]:
        return [FolderSource(folder).identity(part) for part in ("pictures", "captions", "maps")]

    first = identities()
    assert identities() == first
    text = (folder / "metadata.jsonl").read_text()
    (folder / "metadata.jsonl").write_text(text.replace("dark", "darker"))
    assert [a == b for a, b in zip(identities(), first, strict=True)] == [True, False, True]
    _picture(41, 20, 10).save(folder / "a.png")
    assert [a == b for a, b in zip(identities(), first, strict=True)] == [False, False, True]


def test_sizes_are_upright(folder: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # turned by a quarter
    _picture(40, 20, 10).save(folder / "a.jpg", exif=exif)
    (folder / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": ""}')
    record = FolderSource(folder)[0]
    assert record.size() == record.picture().size == (20, 40)


def test_a_picture_that_cannot_be_read_is_named() -> None:
    def unplugged() -> bytes:
        raise OSError(5, "Input/output error")

    for record, message in (
        (Record("Picture 3", "", unplugged), r"Picture 3 cannot be read \(Input/output error\)"),
        (Record("Picture 3", "", lambda: None), "Picture 3 is missing; remove its row"),
        (Record("Picture 3", "", lambda: b"no picture"), "Picture 3 is damaged"),
    ):
        for read in (record.picture, record.size):
            with pytest.raises(UserError, match=message):
                read()
    with pytest.raises(UserError, match="The map of picture 3 is missing"):
        Record("Picture 3", "", lambda: None, lambda: None).map()


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
        FolderSource(folder)


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist; check its path"):
        FolderSource(tmp_path / "nowhere")


def test_damaged_picture_is_named(folder: Path) -> None:
    (folder / "a.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"a\.png is damaged"):
        FolderSource(folder)[0].picture()
