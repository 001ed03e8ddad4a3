"""The recipes at tiny size: they resume exactly, and their closed-form starts do what they claim."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTokenizer, T5Tokenizer

from loco_diffusion.data.render import render
from loco_diffusion.data.scenes import COLORS, KINDS, sample_scene
from loco_diffusion.embedded import base, lessons, loop, text, vae
from loco_diffusion.embedded.pictures import rendered_scenes


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return render([sample_scene(seed) for seed in range(8)]).image * 2 - 1


@pytest.fixture(scope="module")
def started_vae(pictures: torch.Tensor) -> AutoencoderKL:
    torch.manual_seed(0)
    model = vae.untrained_vae()
    vae._start_as_patches(model, pictures)
    return model


@pytest.fixture(scope="module")
def tokenizers() -> tuple[CLIPTokenizer, T5Tokenizer]:
    return text.build_tokenizers()


def round_trip(model: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.decode(model.encode(pictures).latent_dist.mode()).sample


def test_the_untrained_vae_already_keeps_the_colors(
    started_vae: AutoencoderKL, pictures: torch.Tensor
) -> None:
    error = torch.nn.functional.avg_pool2d(round_trip(started_vae, pictures) - pictures, 16)
    spread = torch.nn.functional.avg_pool2d(pictures, 16).std()
    assert error.square().mean().sqrt() < 0.35 * spread


def test_the_untrained_latents_hold_more_than_the_mean_colors(
    started_vae: AutoencoderKL, pictures: torch.Tensor
) -> None:
    with torch.no_grad():
        latents = started_vae.encode(pictures).latent_dist.mode()
    patches = torch.nn.functional.pixel_unshuffle(pictures, 8)
    weight, bias = vae._least_squares(latents, patches)
    told = torch.einsum("nchw,dc->ndhw", latents, weight) + bias[:, None, None]
    means = torch.nn.functional.avg_pool2d(pictures, 8).repeat_interleave(64, dim=1)
    assert (told - patches).square().mean() < 0.25 * (means - patches).square().mean()


def test_evening_out_latents_changes_no_picture(started_vae: AutoencoderKL, pictures: torch.Tensor) -> None:
    before = round_trip(started_vae, pictures)
    vae._normalise_latents(started_vae, ((pictures + 1) * 127.5).to(torch.uint8))
    torch.testing.assert_close(round_trip(started_vae, pictures), before, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        latents = started_vae.encode(pictures).latent_dist.mode()
    normal = (latents - started_vae.config.shift_factor) * started_vae.config.scaling_factor
    assert normal.std() == pytest.approx(1, abs=0.05) and normal.mean() == pytest.approx(0, abs=0.05)


def test_tokenizers_read_captions_whole_and_survive_saving(
    tmp_path: Path, tokenizers: tuple[CLIPTokenizer, T5Tokenizer]
) -> None:
    clip, t5 = tokenizers
    captions = [sample_scene(seed).caption for seed in range(50)]
    assert max(len(t5(caption).input_ids) for caption in captions) <= text.TEXT_LENGTH
    words = captions[0].replace(",", " ,").split()
    assert len(t5(captions[0]).input_ids) == len(words) + 1
    assert len(clip(captions[0]).input_ids) == len(words) + 2
    for tokenizer in clip, t5:
        tokenizer.save_pretrained(tmp_path / type(tokenizer).__name__)
        again = type(tokenizer).from_pretrained(tmp_path / type(tokenizer).__name__)
        assert again(captions[0]).input_ids == tokenizer(captions[0]).input_ids
    assert t5.unk_token_id not in t5("Some Words of NO scene, 42!").input_ids


def test_capitals_mean_the_same(tokenizers: tuple[CLIPTokenizer, T5Tokenizer]) -> None:
    clip, t5 = tokenizers
    _, encoder = text.build_text_encoders(clip, t5)
    text.share_capitals(t5, encoder)
    table = encoder.get_input_embeddings()
    low, high = (t5(words, return_tensors="pt").input_ids for words in ("a red box", "A Red Box"))
    assert not torch.equal(low, high) and torch.equal(table(low), table(high))


def test_the_untrained_base_predicts_zero_velocity(started_vae: AutoencoderKL) -> None:
    pipe = base.untrained_pipeline(started_vae)
    clip_ids, t5_ids = base._tokens(pipe, ["a red sphere"])
    model = torch.nn.ModuleDict({"text_encoder": pipe.text_encoder, "text_encoder_2": pipe.text_encoder_2})
    clean = torch.zeros(1, 32, 4, 4)
    torch.manual_seed(3)
    nothing = torch.zeros(1, 4, len(KINDS) + len(COLORS) + 1)
    loss = base._loss(pipe.transformer, clean, base._read(model, clip_ids, t5_ids), nothing)
    torch.manual_seed(3)
    torch.testing.assert_close(loss, torch.randn_like(clean).square().mean())
    assert 8e6 < sum(p.numel() for p in pipe.transformer.parameters()) < 13e6


def test_solids_weigh_more_the_less_noise_there_is() -> None:
    error = torch.ones(2, 3, 4, 4)
    error[..., :2, :2] = 2  # one token of four
    layouts = torch.zeros(2, 4, len(KINDS) + len(COLORS) + 1)
    layouts[:, 0, 1] = 0.1
    noise, clean = torch.zeros(2), torch.ones(2)
    weight = 1 + lessons.SOLIDS_WEIGHT
    assert lessons.velocity_loss(error, noise, layouts).item() == pytest.approx(error.square().mean().item())
    assert lessons.velocity_loss(error, clean, layouts).item() == pytest.approx(
        (4 * weight + 3) / (weight + 3)
    )


def test_layouts_count_what_the_scenes_hold() -> None:
    scenes = [sample_scene(seed) for seed in range(3)]
    layouts = lessons.scene_layouts(scenes, 8).float()
    assert layouts.shape == (3, 64, len(KINDS) + len(COLORS) + 1)
    masks = render(scenes, 32).masks.float()
    for scene, layout, mask in zip(scenes, layouts, masks, strict=True):
        named = {KINDS.index(solid.kind) for solid in scene.solids}
        assert set(layout[:, : len(KINDS)].sum(0).nonzero().flatten().tolist()) <= named
        assert layout[:, : len(KINDS)].sum() / 64 == pytest.approx(
            float(mask.mean(dim=(1, 2)).sum()), abs=1e-3
        )


def test_a_resumed_recipe_equals_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0)

    class Stopped(Exception):
        pass

    def run(folder: Path, stop_at: int | None = None) -> torch.Tensor:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        optimizers = [
            torch.optim.Muon([model.weight], lr=1e-2),
            torch.optim.AdamW([model.bias], lr=1e-2),
        ]

        def loss_of_step(step: int) -> torch.Tensor:
            if step == stop_at:
                raise Stopped
            return model(torch.randn(5, 4)).square().mean()

        loop.train(folder, model, optimizers, loss_of_step, steps=12)
        return model.weight.detach()

    whole = run(tmp_path / "whole")
    with pytest.raises(Stopped):
        run(tmp_path / "parts", stop_at=7)
    assert torch.equal(run(tmp_path / "parts"), whole)


def test_a_kept_training_goes_on_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "UNFINISHED", tmp_path / "unfinished")

    def run(folder: Path, steps: int) -> tuple[torch.Tensor, list[int]]:
        torch.manual_seed(0)
        model, taken = torch.nn.Linear(4, 3), []

        def loss_of_step(step: int) -> torch.Tensor:
            taken.append(step)
            return model(torch.randn(5, 4)).square().mean()

        loop.train(folder, model, [torch.optim.AdamW(model.parameters(), lr=1e-2)], loss_of_step, steps)
        return model.weight.detach(), taken

    weight, _ = run(tmp_path / "here" / "toy", 3)
    assert loop.keep_unfinished(tmp_path / "here" / "toy").name == "step-00000003"
    again, taken = run(tmp_path / "there" / "toy", 3)
    assert not taken and torch.equal(again, weight.half().float())
    assert run(tmp_path / "there" / "toy", 5)[1] == [3, 4]


def test_rendered_scenes_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loco_diffusion.embedded.pictures._SHARD", 4)
    image, depth = rendered_scenes(range(0, 8), tmp_path)
    assert image.shape == (8, 3, 128, 128) and depth.shape == (8, 128, 128)
    expected = (render([sample_scene(5)]).image[0] * 255).round()
    assert (image[5].float() - expected).abs().max() <= 1
    monkeypatch.setattr("loco_diffusion.embedded.pictures.render", None)  # nothing is drawn a second time
    assert torch.equal(rendered_scenes(range(0, 8), tmp_path)[0], image)
