"""What the package ships: it is whole, small, finite, and its control works."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxPipeline
from safetensors import safe_open

from loco_diffusion.bases import load_base
from loco_diffusion.cli_adapters import load_on_base
from loco_diffusion.conditions import get_condition
from loco_diffusion.control.adapter_folder import read_any
from loco_diffusion.data.render import render
from loco_diffusion.data.scenes import TEST_SEEDS, sample_scene
from loco_diffusion.embedded import (
    EXAMPLE_PICTURE,
    EXAMPLE_PROMPT,
    PACKAGED_BASES,
    WEIGHTS,
    load_packaged_classifier,
    load_packaged_pipeline,
    packaged_adapter,
    packaged_base,
)
from loco_diffusion.embedded.scene_classifier import truth
from loco_diffusion.errors import UserError
from loco_diffusion.generation import Session, open_session
from loco_diffusion.images import load_image, to_pil, to_tensor
from loco_diffusion.metrics.functional import edge_f1, pixel_mse
from loco_diffusion.quickstart import CONDITIONS


@pytest.fixture(scope="module")
def pipe() -> FluxPipeline:
    return load_packaged_pipeline()


def test_weights_are_small_finite_and_safetensors_only() -> None:
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 85e6  # two bases of 28 MB, ten adapters
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".yaml", ".png", ".md"}
    for path in (path for path in files if path.suffix == ".safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                assert torch.isfinite(file.get_tensor(name).float()).all(), f"{path.name}: {name}"


def test_the_example_is_there() -> None:
    assert load_image(EXAMPLE_PICTURE).size == (128, 128)
    assert "ground under a" in EXAMPLE_PROMPT.read_text()


def test_an_unknown_packaged_adapter_is_refused() -> None:
    with pytest.raises(UserError, match="pose"):
        packaged_adapter("pose", "packaged-dit")


def test_packaged_bases_have_names(pipe: FluxPipeline) -> None:
    named = load_base("packaged-dit", torch.float32)
    assert torch.equal(named.transformer.proj_out.weight, pipe.transformer.proj_out.weight)
    session = open_session("packaged-dit")
    assert session.pipe.dtype == torch.float32 and session.defaults.width == 128


@pytest.mark.parametrize("base", PACKAGED_BASES)
def test_an_adapter_finds_its_packaged_base(base: str) -> None:
    folder = packaged_adapter("canny", base)
    _, denoiser = load_on_base(folder, read_any(folder), None)
    assert denoiser.config["_name_or_path"] == str(packaged_base(base))


def test_the_classifier_knows_scenes_it_has_never_seen() -> None:
    scenes = [sample_scene(seed) for seed in TEST_SEEDS[:64]]
    seen = load_packaged_classifier().classify(render(scenes).image)
    pairs = list(zip(seen, truth(scenes), strict=True))
    for part in ("ground", "pattern", "sky"):
        assert sum(getattr(one, part) == getattr(real, part) for one, real in pairs) >= 61, part
    assert sum(one.solids == real.solids for one, real in pairs) >= 56


def test_the_vae_keeps_pictures(pipe: FluxPipeline) -> None:
    pictures = render([sample_scene(seed) for seed in TEST_SEEDS[:8]]).image
    with torch.no_grad():
        latents = pipe.vae.encode(pictures * 2 - 1).latent_dist.mode()
        decoded = (pipe.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    psnr = -10 * torch.log10((decoded - pictures).square().mean((1, 2, 3)))
    assert psnr.mean() > 28


def test_depth_maps_resemble_the_scenes_own_depth() -> None:
    scenes = render([sample_scene(seed) for seed in TEST_SEEDS[:32]])
    maps = [to_tensor(get_condition("depth").extract(to_pil(image)))[0] for image in scenes.image]
    pairs = zip(maps, scenes.depth, strict=True)
    agreement = [torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] for a, b in pairs]
    assert torch.stack(agreement).min() > 0.95


@pytest.fixture(scope="module", params=PACKAGED_BASES)
def session(request: pytest.FixtureRequest) -> Session:
    return open_session(request.param)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_every_adapter_brings_pictures_nearer_to_its_condition(session: Session, condition: str) -> None:
    scenes = [sample_scene(seed) for seed in TEST_SEEDS[:4]]
    inputs = [to_pil(picture) for picture in render(scenes).image]
    builder = get_condition(condition)
    maps = [builder.extract(image) for image in inputs]
    session.load_adapters({condition: None})
    captions, sampling = [scene.caption for scene in scenes], session.sampling(steps=6, guidance=1.0)
    try:
        free = session.generate(captions, range(4), sampling)
        controlled = session.generate(captions, range(4), sampling, maps={condition: maps})
    finally:
        session.controller.delete_adapter(condition)
    wanted = torch.stack([to_tensor(m) for m in maps])
    if condition == "mask":  # compared on what the mask shows
        shown = (wanted.amax(1, keepdim=True) > 0).float()
        errors = [
            ((torch.stack([to_tensor(p) for p in drawn]) - wanted) * shown).square().mean()
            for drawn in (controlled, free)
        ]
        assert errors[0] < errors[1]
        return
    followed, ignored = (torch.stack([to_tensor(builder.extract(p)) for p in d]) for d in (controlled, free))
    if condition == "canny":
        assert edge_f1(followed, wanted).mean() > edge_f1(ignored, wanted).mean()
    else:
        assert pixel_mse(followed, wanted).mean() < pixel_mse(ignored, wanted).mean()


def test_bases_that_are_not_packaged_are_named() -> None:
    with pytest.raises(
        UserError, match="my/base is no packaged base; choose from packaged-dit, packaged-unet"
    ):
        packaged_adapter("canny", "my/base")
