"""Runs on every kind of data: a resumed one equals an uninterrupted one, a cached one an uncached one."""

from __future__ import annotations

import json
import shutil
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from training.two_processes import launch

from loco_diffusion.training.checkpoints import list_checkpoints
from loco_diffusion.training.config import TrainingConfig
from loco_diffusion.training.journal import read_log
from loco_diffusion.training.trainer import train

BUCKETS = {"size": 64, "max_aspect_ratio": 2, "aspect_step": 16}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine pictures of three shapes with maps, as a folder, as two tars and as three parquet files."""
    folder = tmp_path_factory.mktemp("pictures")
    rng, rows = np.random.default_rng(0), []
    for number in range(9):
        width, height = [(64, 64), (80, 48), (52, 90)][number % 3]
        picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        picture.save(folder / f"{number}.png")
        picture.convert("L").convert("RGB").save(folder / f"{number}.map.png")
        (folder / f"{number}.txt").write_text(f"{number} words")
        rows.append({"file_name": f"{number}.png", "text": f"{number} words", "map": f"{number}.map.png"})
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    for number in range(2):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for sample in range(5 * number, min(9, 5 * number + 5)):
                for member in ("png", "map.png", "txt"):
                    tar.add(folder / f"{sample}.{member}", f"{sample}.{member}")
    features = datasets.Features(
        {"image": datasets.Image(), "map": datasets.Image(), "text": datasets.Value("string")}
    )
    values = {
        "image": [str(folder / row["file_name"]) for row in rows],
        "map": [str(folder / row["map"]) for row in rows],
        "text": [row["text"] for row in rows],
    }
    whole = datasets.Dataset.from_dict(values, features=features)
    (folder / "parquet").mkdir()
    for number in range(3):
        part = whole.shard(3, number, contiguous=True)
        part.to_parquet(str(folder / "parquet" / f"{number}.parquet"))
    return folder


@pytest.fixture(autouse=True)
def _no_pause_after_an_epoch_of_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` gives the threads of pyarrow five seconds to end."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


@pytest.fixture
def make(make: Any) -> Any:
    """As that of all tests of training; every step's loss is logged."""
    return partial(make, log_every=1)


def _weights(config: TrainingConfig) -> dict[str, torch.Tensor]:
    files = sorted((Path(config.output) / "adapter").glob("*.safetensors"))
    return {f"{file.stem}.{name}": tensor for file in files for name, tensor in load_file(file).items()}


def _losses(config: TrainingConfig) -> list[float]:
    lines = [json.loads(line) for line in (Path(config.output) / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


SOURCES = {
    "folder": ({"source": "folder", "path": "."}, {"map_field": "map"}),
    "tars": ({"source": "tars", "path": "*.tar", "image_member": "png"}, {"map_member": "map.png"}),
    "dataset": ({"source": "dataset", "name": "parquet"}, {"map_column": "map"}),
    "stream": ({"source": "dataset", "name": "parquet", "streaming": True}, {"map_column": "map"}),
}


def _data(pictures: Path, source: str, with_maps: bool = False, **fields: Any) -> dict[str, Any]:
    data, maps = SOURCES[source]
    where = {name: str(pictures / data[name]) for name in ("path", "name") if name in data}
    return {**data, **where, **(maps if with_maps else {}), **BUCKETS, **fields}


@pytest.mark.parametrize(
    ("source", "fields", "framing"),
    [
        ("folder", {"condition": "mask"}, {"random_crop": True, "random_flip": True, "size": 48}),
        ("tars", {"condition": "colorization", "accumulation": 2}, {"with_maps": True, "random_flip": True}),
        ("dataset", {"cache_folder": "cache", "tokens": {}}, {"with_maps": True}),
        ("stream", {"condition": "deblur"}, {}),
        ("stream", {"condition": "depth"}, {"with_maps": True, "random_crop": True, "max_aspect_ratio": 1}),
    ],
)
def test_resumed_equals_uninterrupted(
    make: Any, pictures: Path, tmp_path: Path, source: str, fields: dict[str, Any], framing: dict[str, Any]
) -> None:
    if "cache_folder" in fields:
        fields = {**fields, "cache_folder": str(tmp_path / "cache")}
    config = make(**fields, data=_data(pictures, source, **framing))
    train(config)
    expected, losses = _weights(config), _losses(config)
    for kill_after in (3, 1):
        shutil.rmtree(Path(config.output) / "adapter")
        for checkpoint in list_checkpoints(Path(config.output) / "checkpoints")[kill_after:]:
            shutil.rmtree(checkpoint)
        train(config, resume="latest")
        assert _losses(config) == losses
        assert all(torch.equal(tensor, expected[name]) for name, tensor in _weights(config).items())


def test_every_source_gives_the_same_training(make: Any, pictures: Path) -> None:
    """All but a stream, whose order is its own."""
    runs = [
        make(source, condition="colorization", data=_data(pictures, source, with_maps=source == "tars"))
        for source in ("folder", "tars", "dataset")
    ]
    for config in runs:
        train(config)
    for config in runs[1:]:  # given maps are those that would be extracted, but for a rounding when resized
        assert _losses(config) == pytest.approx(_losses(runs[0]), rel=1e-4)


def test_cached_equals_uncached_and_a_second_run_reuses_the_cache(
    make: Any, pictures: Path, tmp_path: Path
) -> None:
    data = _data(pictures, "folder")
    computed = make("computed", data=data, cache_gigabytes=0)
    first, second = (
        make(name, data=data, cache_folder=str(tmp_path / "cache")) for name in ("first", "second")
    )
    train(computed)
    train(first)
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.safetensors")}
    train(second)
    assert len(times) == 7  # text, and latents and maps of three sizes
    assert times == {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.safetensors")}
    assert _losses(first) == _losses(second) == pytest.approx(_losses(computed), rel=1e-5)


@pytest.mark.slow
def test_two_processes_share_data_and_cache(make: Any, pictures: Path, tmp_path: Path) -> None:
    config = make(data=_data(pictures, "tars"), cache_folder=str(tmp_path / "cache"))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    launch("-m", "loco_diffusion.cli", "train", str(tmp_path / "run.yaml"))
    assert read_log(tmp_path / "run" / "log.jsonl")[0]["processes"] == 2
    assert len(_losses(config)) == 4 and all(np.isfinite(_losses(config)))
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 7 and not list(
        (tmp_path / "cache").rglob("*.partial")
    )
