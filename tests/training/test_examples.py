"""Training examples: what is cached equals what is computed, random conditions stay random, maps fit pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from rich.progress import Progress
from torch import Tensor

from loco_diffusion.control.family import family_of
from loco_diffusion.errors import UserError
from loco_diffusion.training.build import build_source
from loco_diffusion.training.config import make_config
from loco_diffusion.training.examples import Batch, Examples, Loaded
from loco_diffusion.training.preparation import prepare

SCENES = {"source": "scenes", "count": 6, "size": 32}


@pytest.fixture
def make(flux: FluxPipeline) -> Callable[..., Examples]:
    """A function that makes examples, of six 32-px scenes if nothing else is said, and prepares them."""

    def examples(condition: str, process: tuple[int, int] = (0, 1), **fields: Any) -> Examples:
        defaults = {"output": "unused", "steps": 1, "batch_size": 3, "data": SCENES}
        config = make_config({"condition": condition, **defaults, **fields})
        made = Examples(
            config,
            build_source(config.data),
            config.make_condition(),
            family_of(flux),
            flux,
            torch.device("cpu"),
            process,
        )
        with Progress(disable=True) as progress:
            prepare(made, progress)
        return made

    return examples


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven pictures of three shapes, with maps that are their negatives."""
    rng, lines = np.random.default_rng(0), []
    for number, size in enumerate([(64, 64), (90, 60), (60, 96), (64, 70), (80, 48), (48, 80), (70, 64)]):
        picture = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
        picture.save(tmp_path / f"{number}.png")
        picture.point(lambda value: 255 - value).save(tmp_path / f"{number}-map.png")
        lines.append({"file_name": f"{number}.png", "text": f"{number} words", "map": f"{number}-map.png"})
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return tmp_path


def _buckets(folder: Path, **fields: Any) -> dict[str, Any]:
    shape = {"size": 64, "max_aspect_ratio": 2, "aspect_step": 16}
    return {"source": "folder", "path": str(folder), **shape, **fields}


def _batch(examples: Examples, number: int) -> Batch:
    return examples.encode(examples.load(number))


def _assert_equal(one: Batch, other: Batch) -> None:
    for name in ("keep", "sigmas", "noise"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    torch.testing.assert_close(one.maps.tokens, other.maps.tokens)
    assert one.maps.input == other.maps.input and one.maps.grid == other.maps.grid
    torch.testing.assert_close(one.latents, other.latents)
    torch.testing.assert_close(one.text, other.text)


def _maps(loaded: Loaded) -> Tensor:
    assert isinstance(loaded.maps, Tensor)
    return loaded.maps


@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
@pytest.mark.parametrize("input", ["pixels", "latents"])
@pytest.mark.parametrize("condition", ["canny", "deblur"])
def test_cached_equals_computed(
    make: Callable[..., Examples], condition: str, input: str, on_disk: bool, tmp_path: Path
) -> None:
    fields = {"encoder": {"input": input}, "cache_gigabytes": 0}
    where = {"cache_folder": str(tmp_path)} if on_disk else {"cache_gigabytes": 1}
    cached, computed = make(condition, **{**fields, **where}), make(condition, **fields)
    assert cached.cached and not computed.cached
    assert len(computed.models) == 3
    vae = input == "latents" and condition == "deblur"  # the blur is drawn anew
    assert cached.models == ([cached.pipe.vae] if vae else [])
    for number in (3, 0):
        batches = [_batch(examples, number) for examples in (cached, computed)]
        _assert_equal(*batches)
        assert batches[0].maps.input == input and len(batches[0].maps) == 3


@pytest.mark.parametrize("fields", [{}, {"tokens": {"stride": 2}}, {"condition": "mask"}])
def test_cached_equals_computed_in_every_bucket(
    make: Callable[..., Examples], folder: Path, tmp_path: Path, fields: dict[str, Any]
) -> None:
    step = {"aspect_step": 32, "size": 128} if "tokens" in fields else {}
    fields = {"condition": "canny", "data": _buckets(folder, **step), **fields}
    disk, memory = make(**fields, cache_folder=str(tmp_path / "cache")), make(**fields)
    computed = make(**fields, cache_gigabytes=0)
    shapes = set()
    for number in range(7):  # a cycle
        batch = _batch(computed, number)
        shapes.add(batch.latents.shape[2:])
        assert batch.noise.shape == batch.latents.shape
        _assert_equal(_batch(disk, number), batch)
        _assert_equal(_batch(memory, number), batch)
    assert len(shapes) == 3


def test_a_second_run_reads_what_the_first_has_kept(
    make: Callable[..., Examples], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields: dict[str, Any] = {"data": _buckets(folder), "cache_folder": str(tmp_path / "cache")}
    expected = _batch(make("canny", **fields), 0)
    files = sorted((tmp_path / "cache").rglob("*.safetensors"))
    times = [file.stat().st_mtime_ns for file in files]
    assert {file.parent.name.split("-")[0] for file in files} == {"text", "latents", "maps"}
    assert all(json.loads((file.parent / "depends_on.json").read_text()) for file in files)
    files[0].unlink()  # as if the first run had been killed before it came to this one
    _assert_equal(_batch(make("canny", **fields), 0), expected)
    again = sorted((tmp_path / "cache").rglob("*.safetensors"))
    assert again == files and [file.stat().st_mtime_ns for file in files[1:]] == times[1:]
    make("colorization", seed=1, batch_size=1, **fields)  # another condition: only its maps are new
    assert len(list((tmp_path / "cache").iterdir())) == 4
    assert [file.stat().st_mtime_ns for file in files[1:]] == times[1:]


@pytest.mark.parametrize(
    ("change", "kinds"),
    [
        ({"condition_options": {"low": 50}}, ["maps"]),
        ({"encoder": {"input": "latents"}}, ["tokens"]),
        ({"max_aspect_ratio": 1}, ["latents", "maps"]),
        ({"vae": 1}, ["latents"]),
        ({"text_encoder": 1}, ["text"]),
        ({"caption": 1}, ["text"]),
        ({"picture": 1}, ["latents", "maps"]),
    ],
    ids=lambda value: "" if isinstance(value, list) else next(iter(value)),
)
def test_caches_depend_on_what_they_come_from(
    make: Callable[..., Examples],
    folder: Path,
    tmp_path: Path,
    flux: FluxPipeline,
    change: dict[str, Any],
    kinds: list[str],
) -> None:
    cache = tmp_path / "cache"
    fields: dict[str, Any] = {"data": _buckets(folder), "cache_folder": str(cache)}
    make("canny", **fields)
    before = set(cache.iterdir())
    name = next(iter(change))
    if name in ("vae", "text_encoder"):
        with torch.no_grad():
            next(getattr(flux, name).parameters()).add_(1e-3)
    elif name == "caption":
        lines = (folder / "metadata.jsonl").read_text()
        (folder / "metadata.jsonl").write_text(lines.replace("3 words", "4 words"))
    elif name == "picture":
        Image.new("RGB", (64, 70)).save(folder / "3.png")
    elif name == "max_aspect_ratio":
        fields["data"] |= change
    else:
        fields |= change
    make("canny", **fields)
    assert sorted(path.name.split("-")[0] for path in set(cache.iterdir()) - before) == kinds


def test_damaged_caches_are_named(make: Callable[..., Examples], tmp_path: Path) -> None:
    make("canny", cache_folder=str(tmp_path))
    file = next(tmp_path.glob("latents-*/*.safetensors"))
    file.write_bytes(b"short")
    examples = make("canny", cache_folder=str(tmp_path))
    with pytest.raises(UserError, match=r"latents-.*chunk-000000.safetensors cannot be read .* delete it"):
        examples.load(0)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"The cache .*file.text-\w+ cannot be written"):
        make("canny", cache_folder=str(tmp_path / "file"))


def test_text_is_cached_where_pictures_are_drawn_anew(make: Callable[..., Examples], folder: Path) -> None:
    data = _buckets(folder, random_crop=True, random_flip=True)
    cached, computed = make("canny", data=data), make("canny", data=data, cache_gigabytes=0)
    assert cached.caches.text is not None and not cached.cached
    assert cached.models == [cached.pipe.vae]
    for number in range(4):
        _assert_equal(_batch(cached, number), _batch(computed, number))


def test_given_maps_are_cut_and_turned_with_their_pictures(
    make: Callable[..., Examples], folder: Path
) -> None:
    data = _buckets(folder, map_field="map", random_crop=True, random_flip=True)
    for condition in ("depth", "canny"):
        examples, seen = make(condition, data=data), set()
        for number in range(8):
            loaded = examples.load(number)
            assert loaded.pictures is not None and loaded.pictures.shape == _maps(loaded).shape
            kept = [  # pictures that are cut but not resized: nothing is rounded
                (picture, found)
                for picture, found in zip(loaded.pictures, _maps(loaded), strict=True)
                if torch.equal(picture, 255 - found)
            ]
            seen |= {picture.numpy().tobytes() for picture, _ in kept}
            difference = (loaded.pictures.int() + _maps(loaded).int() - 255).abs().float()
            assert condition == "canny" or difference.max() <= 1  # of resized ones
        assert len(seen) > 3  # some picture was seen in several ways


def test_given_maps_are_cached(make: Callable[..., Examples], folder: Path, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"data": _buckets(folder, map_field="map")}
    cached = make("mask", **fields, cache_folder=str(tmp_path / "cache"))
    computed = make("mask", **fields, cache_gigabytes=0)
    assert cached.map_kind == "maps"  # nothing is drawn
    for number in range(3):
        _assert_equal(_batch(cached, number), _batch(computed, number))


def test_random_conditions_are_drawn_in_every_batch(make: Callable[..., Examples]) -> None:
    def maps(condition: str, seed: int) -> Tensor:
        examples = make(condition, seed=seed, batch_size=6, **options.get(condition, {}))
        loaded = examples.load(0)
        order = examples.batches.batch(0)[1]
        return torch.stack([_maps(loaded)[order.index(index)] for index in range(6)])

    options = {"mask": {"condition_options": {"training_shapes": ["strokes"], "training_inverted": 0.5}}}
    for condition, random in (("mask", True), ("deblur", True), ("colorization", False)):
        assert torch.equal(maps(condition, 0), maps(condition, 1)) != random
        assert torch.equal(maps(condition, 0), maps(condition, 0))


def test_dropped_text_is_the_empty_prompt(make: Callable[..., Examples], flux: FluxPipeline) -> None:
    for cache in (0.0, 1.0):
        batch = _batch(
            make("canny", text_dropout=1.0, condition_dropout=1.0, cache_gigabytes=cache, batch_size=2), 0
        )
        expected = family_of(flux).encode_prompts(flux, ["", ""])
        torch.testing.assert_close(batch.text, expected)
        assert not batch.keep.any()


def test_processes_share_the_pictures(make: Callable[..., Examples]) -> None:
    batches = [make("canny", (number, 4)).batches for number in range(4)]
    shares = [{index for number in range(2) for index in one.batch(number)[1]} for one in batches]
    assert sorted(index for share in shares for index in share) == list(range(6))
    with pytest.raises(UserError, match="6 pictures are too few for 7 processes"):
        make("canny", (6, 7))


def test_processes_share_the_work_of_a_cache(
    make: Callable[..., Examples], folder: Path, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {"data": _buckets(folder), "cache_folder": str(tmp_path / "cache")}
    first = make("canny", (0, 2), **fields)
    files = set((tmp_path / "cache").rglob("*.safetensors"))
    second = make("canny", (1, 2), **fields)
    assert 0 < len(files) < len(list((tmp_path / "cache").rglob("*.safetensors")))
    for number in range(4):
        batches = []
        for process, cached in enumerate((first, second)):
            computed = make("canny", (process, 2), data=fields["data"], cache_gigabytes=0)
            batches.append(_batch(cached, number))
            _assert_equal(batches[-1], _batch(computed, number))
        assert batches[0].latents.shape == batches[1].latents.shape
        assert not torch.equal(batches[0].latents, batches[1].latents)


def test_a_condition_draws_for_every_picture_or_for_none(make: Callable[..., Examples]) -> None:
    examples = make("canny", cache_gigabytes=0)

    class Fickle:
        name = "canny"
        calls = 0

        def extract(self, image: Image.Image, rng: np.random.Generator | None = None) -> Image.Image:
            if rng is not None:
                rng.random()
            return image

    examples.condition = Fickle()
    examples.config = examples.config.model_copy(update={"cache_gigabytes": 1.0})
    with (
        Progress(disable=True) as progress,
        pytest.raises(UserError, match=r"draws random numbers for Scene \d, but not for every picture"),
    ):
        prepare(examples, progress)
