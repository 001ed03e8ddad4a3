"""Adapters on disk: what is saved comes back, and what is damaged or foreign is refused in one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from control_helpers import add_trained, condition_map, draw, randomise
from diffusers import FluxPipeline
from peft import LoraConfig, OFTConfig, PeftModel
from safetensors.torch import load_file, save_file

from loco_diffusion import Controller, LoCOConfig
from loco_diffusion.control import EncoderConfig, adapter_folder
from loco_diffusion.control.adapter_folder import FILES, check_denoiser, check_target
from loco_diffusion.control.identity import sample_weights
from loco_diffusion.errors import UserError


@pytest.fixture
def saved(flux: FluxPipeline, tmp_path: Path) -> Path:
    controller = Controller(flux)
    add_trained(controller, "canny")
    return controller.save_adapter(tmp_path / "canny", "canny")


def controlled(pipe: FluxPipeline, controller: Controller, name: str = "canny") -> torch.Tensor:
    with controller({name: condition_map()}):
        return draw(pipe)


@pytest.mark.parametrize("source", ["pixels", "latents"])
def test_a_saved_adapter_gives_the_same_picture(
    make_flux: Callable[..., FluxPipeline], tmp_path: Path, source: str
) -> None:
    pipe = make_flux()
    controller = Controller(pipe)
    settings = EncoderConfig(input=source, hidden_size=8)  # type: ignore[arg-type]
    add_trained(controller, "edges", encoder=settings)
    expected = controlled(pipe, controller, "edges")
    folder = controller.save_adapter(tmp_path / "a" / "edges", "edges")
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert [path.name for path in folder.parent.iterdir()] == ["edges"]

    pipe = make_flux()
    stock = draw(pipe)
    controller = Controller(pipe)
    assert controller.load_adapter(folder) == "edges"
    assert controller.load_adapter(folder, "again") == "again"
    assert controller.adapters["again"].condition == "edges"
    assert controller.adapters["edges"].encoder == settings
    assert not any(p.requires_grad for p in pipe.transformer.parameters())
    assert torch.equal(draw(pipe), stock)
    for name in ("edges", "again"):
        assert torch.equal(controlled(pipe, controller, name), expected)
    assert all(p.requires_grad for p in controller.trainable_parameters("edges")["adapter"])


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["to_q", "proj_mlp"]),
        OFTConfig(oft_block_size=8, target_modules=["to_q"]),
    ],
)
def test_other_methods(
    make_flux: Callable[..., FluxPipeline], tmp_path: Path, config: LoraConfig | OFTConfig
) -> None:
    pipe = make_flux()
    controller = Controller(pipe)
    controller.add_adapter("canny", config)
    randomise(controller, "canny")
    expected = controlled(pipe, controller)
    add_trained(controller, "depth")  # wraps the layers of the first one
    assert torch.equal(controlled(pipe, controller), expected)
    controller.save_adapter(tmp_path / "canny", "canny")
    controller.save_adapter(tmp_path / "depth", "depth")
    depth = controlled(pipe, controller, "depth")

    pipe = make_flux()
    controller = Controller(pipe)
    for name in ("depth", "canny"):
        controller.load_adapter(tmp_path / name)
    assert torch.equal(controlled(pipe, controller), expected)
    assert torch.equal(controlled(pipe, controller, "depth"), depth)


def test_peft_reads_the_folder(make_flux: Callable[..., FluxPipeline], saved: Path) -> None:
    model = PeftModel.from_pretrained(make_flux().transformer, str(saved))
    weights = {
        name.replace(".default", ""): parameter
        for name, parameter in model.named_parameters()
        if ".loco_" in name
    }
    stored = load_file(saved / "adapter_model.safetensors")
    assert weights.keys() == stored.keys()
    assert all(torch.equal(weights[name], stored[name]) for name in stored)


def test_saving_again_replaces_the_adapter_and_nothing_else(flux: FluxPipeline, tmp_path: Path) -> None:
    controller = Controller(flux)
    add_trained(controller, "canny")
    folder = tmp_path / "canny"
    folder.mkdir()
    controller.save_adapter(folder, "canny")
    before = load_file(folder / "control_encoder.safetensors")
    randomise(controller, "canny", seed=5)
    controller.save_adapter(str(folder), "canny")
    after = load_file(folder / "control_encoder.safetensors")
    assert not torch.equal(before["input_layer.weight"], after["input_layer.weight"])

    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="notes.txt"):
        controller.save_adapter(folder, "canny")
    assert (folder / "notes.txt").read_text() == "mine"
    file = tmp_path / "file"
    file.write_text("mine")
    for target in (file, file / "below"):
        with pytest.raises(UserError, match="choose"):
            controller.save_adapter(target, "canny")
    with pytest.raises(UserError, match="no adapter 'depth'"):
        controller.save_adapter(tmp_path / "depth", "depth")
    flux.transformer.transformer_blocks[0].attn.to_q.loco_v["canny"].data[0, 0, 0] = float("nan")
    with pytest.raises(UserError, match="NaN"):
        controller.save_adapter(tmp_path / "broken", "canny")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["canny", "file"]
    check_target(tmp_path / "new" / "folder")
    assert not (tmp_path / "new").exists()


def test_a_local_path_is_not_stored(flux_folder: Path, tmp_path: Path) -> None:
    pipe = FluxPipeline.from_pretrained(flux_folder)
    controller = Controller(pipe)
    controller.add_adapter("canny", LoCOConfig(r=2))
    folder = controller.save_adapter(tmp_path / "canny", "canny")
    for file in FILES:
        assert str(flux_folder).encode() not in (folder / file).read_bytes()
    assert (
        json.loads((folder / "control_config.json").read_text())["base"]["name_or_path"] == flux_folder.name
    )


# Refusals.


def edit(file: str, **changes: object) -> Callable[[Path], None]:
    """A change of values in one of the JSON files; None deletes one."""

    def apply(folder: Path) -> None:
        content = json.loads((folder / file).read_text()) | changes
        content = {key: value for key, value in content.items() if value is not None}
        (folder / file).write_text(json.dumps(content))

    return apply


def edit_weights(file: str, change: Callable[[dict[str, torch.Tensor], str], None]) -> Callable[[Path], None]:
    """A change of the first tensor of a weight file, or of the file's dict."""

    def apply(folder: Path) -> None:
        weights = load_file(folder / file)
        change(weights, next(iter(weights)))
        save_file(weights, folder / file)

    return apply


def overwrite(file: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes(content) and None


def set_nan(weights: dict[str, torch.Tensor], name: str) -> None:
    weights[name].view(-1)[0] = float("nan")


def set_infinite(weights: dict[str, torch.Tensor], name: str) -> None:
    weights[name].view(-1)[0] = float("inf")


def drop(weights: dict[str, torch.Tensor], name: str) -> None:
    del weights[name]


def rename(weights: dict[str, torch.Tensor], name: str) -> None:
    weights[f"{name}.more"] = weights.pop(name)


def add(weights: dict[str, torch.Tensor], name: str) -> None:
    weights[f"{name}_more"] = torch.zeros(1)


def reshape(weights: dict[str, torch.Tensor], name: str) -> None:
    weights[name] = torch.zeros(3, 3)


BASE = {"denoiser": "FluxTransformer2DModel", "config": {}, "name_or_path": "owner/model"}
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    **{
        f"no {file}": ((lambda f: lambda folder: (folder / f).unlink())(file), f"it has no {file}")
        for file in FILES
    },
    "empty control config": (overwrite("control_config.json", b""), "control_config.json is broken"),
    "binary control config": (overwrite("control_config.json", b"\xff\xfe"), "control_config.json is broken"),
    "list as control config": (overwrite("control_config.json", b"[]"), "no JSON object"),
    "newer format": (edit("control_config.json", format=2), "newer version"),
    "odd format": (edit("control_config.json", format="x"), "control_config.json is broken"),
    "unknown route": (edit("control_config.json", route="tokens"), "control_config.json is broken"),
    "unknown entry": (edit("control_config.json", more=1), "more: Extra inputs"),
    "no condition": (edit("control_config.json", condition=None), "condition: Field required"),
    "bad encoder": (edit("control_config.json", encoder={"input": "edges"}), "control_config.json is broken"),
    "other encoder": (
        edit("control_config.json", encoder={"input": "latents"}),
        "encoder in .* does not match",
    ),
    "other denoiser": (
        edit("control_config.json", base=BASE | {"denoiser": "SD3Transformer2DModel"}),
        "trained for a model with a SD3Transformer2DModel .*, this pipeline has a FluxTransformer2DModel",
    ),
    "no numbers": (
        edit("control_config.json", base=BASE),
        r"in_channels None.*\(owner/model\).*in_channels 64",
    ),
    "truncated config": (
        overwrite("adapter_config.json", b'{"peft_type": "LO'),
        "adapter_config.json is broken",
    ),
    "unknown method": (edit("adapter_config.json", peft_type="MAGIC"), "unknown adapter method 'MAGIC'"),
    "no method": (edit("adapter_config.json", peft_type=None), "unknown adapter method None"),
    "bad value": (edit("adapter_config.json", r=-1), "LoCOConfig.r must be"),
    "other rank": (edit("adapter_config.json", r=1), "do not match its configuration"),
    "no such layers": (edit("adapter_config.json", target_modules=["nothing"]), "does not fit the model"),
    "bias": (edit("adapter_config.json", bias="all"), "would change the base"),
    "prompt method": (
        overwrite("adapter_config.json", b'{"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 2}'),
        "trains prompts",
    ),
    "truncated weights": (overwrite("adapter_model.safetensors", b"\0" * 9), "safetensors is broken"),
    "NaN": (edit_weights("adapter_model.safetensors", set_nan), "NaN or infinite"),
    "infinite": (edit_weights("adapter_model.safetensors", set_infinite), "NaN or infinite"),
    "no weights at all": (
        edit_weights("adapter_model.safetensors", lambda weights, name: weights.clear()),
        "is missing",
    ),
    "missing key": (edit_weights("adapter_model.safetensors", drop), "is missing"),
    "renamed key": (edit_weights("adapter_model.safetensors", rename), "do not match its configuration"),
    "unexpected key": (edit_weights("adapter_model.safetensors", add), "is unexpected"),
    "other shape": (edit_weights("adapter_model.safetensors", reshape), "is of another shape"),
    "NaN in encoder": (edit_weights("control_encoder.safetensors", set_nan), "NaN or infinite"),
    "missing in encoder": (edit_weights("control_encoder.safetensors", drop), "encoder in .* does not match"),
    "unexpected in encoder": (
        edit_weights("control_encoder.safetensors", add),
        "encoder in .* does not match",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_adapters_are_refused(
    make_flux: Callable[..., FluxPipeline], saved: Path, damage: str
) -> None:
    apply, message = DAMAGES[damage]
    apply(saved)
    pipe = make_flux()
    names = list(pipe.transformer.state_dict())
    controller = Controller(pipe)
    with pytest.raises(UserError, match=message) as caught:
        controller.load_adapter(saved)
    assert "\n" not in str(caught.value)
    assert list(pipe.transformer.state_dict()) == names and not controller.adapters
    assert not hasattr(pipe.transformer, "peft_config")
    add_trained(controller, "canny")


def test_another_base_is_refused(make_flux: Callable[..., FluxPipeline], saved: Path) -> None:
    with pytest.raises(
        UserError, match="trained for a model with num_layers 1, this pipeline has num_layers 2"
    ):
        Controller(make_flux(num_layers=2)).load_adapter(saved)
    distilled = make_flux(guidance_embeds=True)  # or not is no matter
    distilled.transformer.load_state_dict(make_flux().transformer.state_dict(), strict=False)
    Controller(distilled).load_adapter(saved)


def test_a_base_of_other_weights_is_refused_and_a_descendant_is_not(
    make_flux: Callable[..., FluxPipeline], saved: Path
) -> None:
    other = make_flux()
    randomise_base(other, share=1.0)
    with pytest.raises(
        UserError, match="those of this model have nothing in common with them; load the base"
    ):
        Controller(other).load_adapter(saved)
    assert not hasattr(other.transformer, "peft_config")
    with pytest.raises(UserError, match="nothing in common"):
        check_denoiser(saved, adapter_folder.read(saved).control.base, other.transformer)
    descendant = make_flux()
    randomise_base(descendant, share=0.3)
    descendant.to(torch.bfloat16)
    controller = Controller(descendant)
    assert controller.load_adapter(saved) == "canny"
    add_trained(controller, "depth")
    again = controller.save_adapter(saved.parent / "again", "canny")
    Controller(make_flux()).load_adapter(again)
    edit(
        "control_config.json",
        base=BASE | {"config": json.loads((saved / "control_config.json").read_text())["base"]["config"]},
    )(saved)
    Controller(other).load_adapter(saved)  # an adapter of an earlier version, which tells no weights


def randomise_base(pipe: FluxPipeline, share: float) -> None:
    """Mix the denoiser's weights with unrelated ones of the same size."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * parameter.std(unbiased=False)
            parameter.mul_(1 - share).add_(noise, alpha=share)


def test_the_base_is_described_without_its_adapters(flux: FluxPipeline) -> None:
    before = sample_weights(flux.transformer)
    assert len(before) == 16 and all(len(values) == 16 for values in before.values())
    controller = Controller(flux)
    for name in ("canny", "depth"):
        add_trained(controller, name)
    controller.add_adapter("blur", LoraConfig(r=2, target_modules=["to_q"]))
    assert sample_weights(flux.transformer) == before


def test_the_commit_of_a_base_from_the_hub_is_kept(
    flux: FluxPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "cache" / "models--owner--tiny-flux"
    flux.save_pretrained(cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache.parent))
    pipe = FluxPipeline.from_pretrained("owner/tiny-flux", cache_dir=cache.parent, local_files_only=True)
    controller = Controller(pipe)
    add_trained(controller, "canny")
    base = adapter_folder.read(controller.save_adapter(tmp_path / "canny", "canny")).control.base
    assert (base.name_or_path, base.revision) == ("owner/tiny-flux", commit)


def test_documents_lie_beside_the_adapter(flux: FluxPipeline, tmp_path: Path) -> None:
    controller = Controller(flux)
    add_trained(controller, "canny")
    folder = controller.save_adapter(tmp_path / "canny", "canny", {"README.md": b"# Canny"})
    assert (folder / "README.md").read_text() == "# Canny"
    versions = adapter_folder.read(folder).control.versions
    assert torch.__version__.startswith(versions["torch"]) and "peft" in versions
    controller.save_adapter(folder, "canny")  # the card was of the adapter that it replaces
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)


def test_missing_adapters_are_refused(flux: FluxPipeline, saved: Path) -> None:
    controller = Controller(flux)
    for path, message in (
        (saved.parent / "nothing", "There is no adapter folder"),
        (saved / FILES[0], "is a file"),
        ("a" * 5000, "There is no adapter folder"),
        ("no/such\0folder", "There is no adapter folder"),
        ("owner/no-such-adapter", "owner/no-such-adapter is no folder here and could not be downloaded"),
    ):
        with pytest.raises(UserError, match=message):
            controller.load_adapter(path)
    controller.load_adapter(saved, "edges")
    with pytest.raises(UserError, match="already is an adapter 'edges'"):
        controller.load_adapter(saved, "edges")
