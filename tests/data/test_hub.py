"""Data sets of the library `datasets`, as a whole and as a stream."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from loco_diffusion.data.hub import Columns, DatasetSource, StreamSource
from loco_diffusion.errors import UserError

Open = Callable[..., Any]


def _picture(value: int, width: int = 24, height: int = 16) -> Image.Image:
    return Image.fromarray(np.full((height, width, 3), value, dtype=np.uint8))


@pytest.fixture(autouse=True)
def _no_pause_after_an_epoch_of_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` gives the threads of pyarrow five seconds to end."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Three rows, saved by `save_to_disk`."""
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "text": datasets.Value("string"),
            "all": [datasets.Value("string")],
            "edges": datasets.Image(),
        }
    )
    values = {
        "image": [_picture(value) for value in (0, 100, 255)],
        "text": ["a", "b", None],
        "all": [["x", "y"], ["z"], ["w"]],
        "edges": [_picture(1, 48, 32), None, _picture(3, 48, 32)],
    }
    datasets.Dataset.from_dict(values, features=features).save_to_disk(str(tmp_path / "set"))
    return tmp_path / "set"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Twenty rows in four parquet files."""
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    values = {"image": [_picture(v) for v in range(20)], "text": [str(value) for value in range(20)]}
    rows = datasets.Dataset.from_dict(values, features=features)
    (tmp_path / "shards").mkdir()
    for number in range(4):
        rows.shard(4, number, contiguous=True).to_parquet(str(tmp_path / "shards" / f"{number}.parquet"))
    return tmp_path / "shards"


def _first(source: DatasetSource | StreamSource) -> Any:
    return source[0] if isinstance(source, DatasetSource) else next(source.records(0, 0))


def test_rows_give_pictures_captions_and_maps(saved: Path) -> None:
    source = DatasetSource(str(saved), "train", Columns(map="edges"))
    assert len(source) == 3
    for index, value in enumerate((0, 100, 255)):
        record = DatasetSource(str(saved), "train", Columns(caption="all"))[index]
        assert record.picture() == _picture(value) and record.size() == (24, 16) and record.map() is None
    assert [source[0].caption, source[1].caption] == ["a", "b"]
    assert DatasetSource(str(saved), "train", Columns(caption="all"))[0].caption == "x"
    assert source[0].map() == _picture(1, 48, 32)
    with pytest.raises(UserError, match="The map of picture 1 of the data set .* is missing"):
        source[1].map()


def test_identity_is_that_of_the_data(saved: Path, shards: Path) -> None:
    source = DatasetSource(str(saved), "train", Columns())
    assert source.identity("pictures") == DatasetSource(str(saved), "train", Columns()).identity("pictures")
    assert source.identity("pictures") != source.identity("captions")
    other = DatasetSource(str(shards), "train", Columns())
    assert other.identity("pictures") == DatasetSource(str(shards), "train", Columns()).identity("pictures")
    assert other.identity("pictures") != source.identity("pictures")


@pytest.mark.parametrize("source", [DatasetSource, StreamSource])
def test_folders_of_pictures_and_lists_of_paths(tmp_path: Path, source: Open) -> None:
    pictures, listed = tmp_path / "pictures", tmp_path / "listed"
    for folder in (pictures, listed):
        folder.mkdir()
    _picture(9).save(pictures / "a.png")
    (pictures / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "nine"}')
    (listed / "train.jsonl").write_text(json.dumps({"image": str(pictures / "a.png"), "text": "nine"}))
    for folder in (pictures, listed):
        record = _first(source(str(folder), "train", Columns()))
        assert record.picture() == _picture(9) and record.caption == "nine" and record.size() == (24, 16)


def test_a_stream_has_every_row_once_in_an_order_of_its_own_for_each_epoch(shards: Path, saved: Path) -> None:
    source = StreamSource(str(shards), "train", Columns())
    orders = {
        (seed, epoch): [record.caption for record in source.records(seed, epoch)]
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    }
    assert all(sorted(order, key=int) == [str(value) for value in range(20)] for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 3
    again = StreamSource(str(shards), "train", Columns())
    assert [record.caption for record in islice(again.records(0, 1), 5)] == orders[0, 1][:5]
    for record in source.records(0, 0):
        assert record.picture() == _picture(int(record.caption))
    streamed = StreamSource(str(saved), "train", Columns(caption="all", map="edges"))
    assert {record.caption for record in streamed.records(0, 0)} == {"x", "z", "w"}


@pytest.mark.parametrize("source", [DatasetSource, StreamSource])
@pytest.mark.parametrize(
    ("split", "columns", "message"),
    [
        ("test", Columns(), "split 'test' .* cannot be loaded"),
        ("train", Columns("picture"), r"no column 'picture'; choose one of its columns \(image, text, all"),
        ("train", Columns("all"), "'all' .* holds no pictures"),
        ("train", Columns(map="all"), "'all' .* holds no pictures"),
        ("train", Columns(map="depth"), "no column 'depth'"),
    ],
)
def test_bad_settings_are_refused(
    saved: Path, source: Open, split: str, columns: Columns, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        source(str(saved), split, columns)


def test_missing_caption_is_refused(saved: Path) -> None:
    with pytest.raises(UserError, match="Caption 2 .* is no text"):
        DatasetSource(str(saved), "train", Columns())[2]
    with pytest.raises(UserError, match="Caption . .* is no text"):
        list(StreamSource(str(saved), "train", Columns()).records(0, 0))


@pytest.mark.parametrize("source", [DatasetSource, StreamSource])
def test_missing_dataset_is_refused(tmp_path: Path, source: Open) -> None:
    with pytest.raises(UserError, match="cannot be loaded"):
        source(str(tmp_path / "nowhere"), "train", Columns())
