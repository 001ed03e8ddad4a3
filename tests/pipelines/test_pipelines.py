"""The custom pipelines: what they add to the stock ones, that it is no more, and what diffusers asks of any."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tiny_pipelines import PIPELINES, TINY, Tiny
from tiny_pipelines.checks import has_unconditional_half
from tiny_pipelines.controlled import ROUTES, add, fresh, maps
from torch import Tensor

from loco_diffusion import Controller
from loco_diffusion.control import family_of, resize_map
from loco_diffusion.control.adapter import Route
from loco_diffusion.errors import UserError
from loco_diffusion.images import to_pil

FOLDER = Path(__file__).parents[2] / "pipelines"
sys.path.insert(0, str(FOLDER))
OWN = {"control", "control_strength", "control_start", "control_end", "control_unconditional"}
NAMES: dict[Route, str] = {"encoder": "canny", "tokens": "depth"}

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.fixture(params=PIPELINES.values(), ids=PIPELINES)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return request.param


@pytest.fixture
def stock(tiny: Tiny) -> Any:
    return fresh(tiny)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Tiny], Path]:
    """The folder of a family's stock pipeline, "pipe", and of an adapter of each route; read only."""
    made: dict[str, Path] = {}

    def make(tiny: Tiny) -> Path:
        if tiny.name not in made:
            pipe = fresh(tiny)
            made[tiny.name] = tmp_path_factory.mktemp(tiny.name)
            pipe.save_pretrained(made[tiny.name] / "pipe")
            controller = Controller(pipe)
            for route, name in NAMES.items():
                # Rounded outputs of Sana's linear attention are too far off for the bound of test_half_precision.
                add(controller, route, name, side="input")
                controller.save_adapter(made[tiny.name] / name, name)
        return made[tiny.name]

    return make


@pytest.fixture
def folder(tiny: Tiny, folders: Callable[[Tiny], Path]) -> Path:
    return folders(tiny)


def custom_class(tiny: Tiny) -> Any:
    """The one pipeline class of a family's file."""
    module = import_module(f"{tiny.name}_loco_control")
    (found,) = (
        value for value in vars(module).values() if getattr(value, "__module__", "") == module.__name__
    )
    return found


@pytest.fixture
def pipe(tiny: Tiny, stock: Any, folder: Path) -> Any:
    return loaded(custom_class(tiny).from_pipe(stock), folder)


def loaded(pipe: Any, folder: Path) -> Any:
    """The pipeline with an adapter of each route."""
    pipe.set_progress_bar_config(disable=True)
    for name in NAMES.values():
        assert pipe.load_control_adapter(str(folder / name)) == name
    return pipe


def control(tiny: Tiny, batch: int = 1, scale: tuple[int, int] = (1, 1)) -> dict[str, Tensor]:
    """Conditions of both routes."""
    return {name: maps(tiny, batch, seed, scale) for seed, name in enumerate(NAMES.values())}


def draw(tiny: Tiny, pipe: Any, **arguments: Any) -> Tensor:
    """Under the control of both routes."""
    return tiny.draw(pipe, **{"control": control(tiny), **arguments})


# What a pipeline adds to the stock one.


@pytest.mark.parametrize("route", ROUTES)
def test_without_control_it_is_the_stock_pipeline(tiny: Tiny, stock: Any, pipe: Any, route: Route) -> None:
    expected = tiny.draw(fresh(tiny))
    given = {NAMES[route]: maps(tiny)}
    assert torch.equal(tiny.draw(pipe), expected)
    assert torch.equal(tiny.draw(pipe, control={}), expected)
    assert torch.equal(tiny.draw(pipe, control=given, control_strength=0.0), expected)
    controlled = tiny.draw(pipe, control=given)
    assert not torch.equal(controlled, expected)
    weak = tiny.draw(pipe, control=given, control_strength={NAMES[route]: 0.5})
    late = tiny.draw(pipe, control=given, control_start=0.5)
    early = tiny.draw(pipe, control=given, control_end={NAMES[route]: 0.5})
    drawn = [expected, controlled, weak, late, early]
    assert not any(torch.equal(a, b) for number, a in enumerate(drawn) for b in drawn[:number])
    assert torch.equal(tiny.draw(pipe), expected)


@pytest.mark.parametrize("unconditional", [True, False])
def test_it_equals_the_controller(
    tiny: Tiny, stock: Any, pipe: Any, folder: Path, unconditional: bool
) -> None:
    """Also with guidance, several prompts and several pictures of each."""
    prompts, given = ["a", "b"], control(tiny, batch=2)
    arguments = {"prompt": prompts, "num_images_per_prompt": 2, **tiny.guided}
    expected = draw(
        tiny, pipe, control=given, control_strength=0.7, control_unconditional=unconditional, **arguments
    )
    assert len(expected) == 4
    other = fresh(tiny)
    controller = Controller(other)
    for name in NAMES.values():
        controller.load_adapter(folder / name)
    with controller(given, strength=0.7, unconditional=unconditional):
        assert torch.equal(tiny.draw(other, **arguments), expected)


def test_every_argument_of_the_stock_pipeline_is_there(tiny: Tiny, stock: Any) -> None:
    theirs = inspect.signature(type(stock).__call__).parameters
    ours = inspect.signature(custom_class(tiny).__call__).parameters
    assert set(ours) == {*theirs, *OWN}
    assert all(ours[name] == theirs[name] for name in theirs)
    assert inspect.signature(custom_class(tiny)) == inspect.signature(type(stock))


def test_size_follows_the_map_and_the_map_the_size(tiny: Tiny, pipe: Any) -> None:
    side, token = tiny.side, family_of(pipe).token_pixels(pipe)

    def size(given: Tensor, **arguments: Any) -> tuple[int, int]:
        arguments = {"height": None, "width": None, "output_type": "pt", "num_inference_steps": 1} | arguments
        height, width = tiny.draw(pipe, control={"canny": given, "depth": given}, **arguments).shape[-2:]
        return height, width

    wide = maps(tiny, scale=(1, 2))
    assert size(wide) == (side, 2 * side)
    assert size(to_pil(wide[0])) == (side, 2 * side)
    assert size(torch.nn.functional.pad(wide, (0, 1, 0, token - 1))) == (side, 2 * side)
    assert size(wide, height=2 * side) == (2 * side, 2 * side)
    assert size(wide, height=side + 1) == (side, 2 * side)
    line = torch.zeros_like(wide)
    line[..., 3] = 1
    resized = resize_map(line, "canny", side, side)
    assert torch.equal(tiny.draw(pipe, control={"canny": line}), tiny.draw(pipe, control={"canny": resized}))


@pytest.mark.parametrize("tiny", [TINY["flux"]], ids=["flux"])  # others refuse pictures that are so small
def test_a_map_smaller_than_a_token_is_enlarged(tiny: Tiny, pipe: Any) -> None:
    small = {name: given[..., :5, :5] for name, given in control(tiny).items()}
    token = family_of(pipe).token_pixels(pipe)
    drawn = draw(tiny, pipe, control=small, height=None, width=None, output_type="pt")
    assert drawn.shape == (1, 3, token, token)


@pytest.mark.parametrize("tiny", [TINY["pixart"], TINY["sana"]], ids=["pixart", "sana"])
def test_resolution_bins_are_off_with_maps_only(tiny: Tiny, pipe: Any) -> None:
    """The tiny models' training size is one that the stock pipelines have no bins for."""
    call = {"height": tiny.side, "width": tiny.side, "num_inference_steps": 1, "output_type": "latent"}
    assert pipe("a red cube", control=control(tiny), **call).images.isfinite().all()
    for binned in ({"control": control(tiny), "use_resolution_binning": True}, {"control": {}}):
        with pytest.raises(ValueError, match="Invalid sample size"):
            pipe("a red cube", **call, **binned)


def test_a_prompt_of_any_length_is_taken(tiny: Tiny, pipe: Any) -> None:
    for prompt in ("", "a very long prompt " * 50):
        drawn = pipe(prompt=prompt, control=control(tiny), num_inference_steps=1, output_type="pt")[0]
        assert torch.isfinite(drawn).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"control": {"mask": torch.zeros(1, 3, 8, 8)}}, "no adapter 'mask'; loaded are canny, depth"),
        ({"control": {"canny": "edges.png"}}, "PIL picture"),
        ({"control_strength": {"mask": 1.0}}, "strength for 'mask'"),
        ({"control": {"canny": torch.zeros(2, 3, 8, 8)}}, "2 condition maps for 1 pictures"),
        ({"control_end": 0.0}, "0 <= start < end <= 1"),
    ],
)
def test_unusable_control_is_refused(tiny: Tiny, pipe: Any, arguments: dict[str, Any], message: str) -> None:
    expected = tiny.draw(pipe)
    with pytest.raises(UserError, match=message):
        draw(tiny, pipe, **arguments)
    assert torch.equal(tiny.draw(pipe), expected)


# Loading and saving.


def load_class(tiny: Tiny, folder: Path) -> Any:
    return custom_class(tiny).from_pretrained(folder)


def load_stock_and_convert(tiny: Tiny, folder: Path) -> Any:
    return custom_class(tiny).from_pipe(DiffusionPipeline.from_pretrained(folder))


def load_custom(tiny: Tiny, folder: Path) -> Any:
    file = str(FOLDER / f"{tiny.name}_loco_control.py")
    return DiffusionPipeline.from_pretrained(folder, custom_pipeline=file, trust_remote_code=True)


def aligned(pipe: Any) -> Any:
    """Weights in memory of their own: a file's, which is not aligned, may change the last bit of sums."""
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            for tensor in (*part.parameters(), *part.buffers()):
                tensor.data = tensor.data.clone()
    return pipe


def files(folder: Path) -> dict[Path, bytes]:
    """The weights of every file, and the content of the list of components."""
    content = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    index = json.loads(content.pop(Path("model_index.json")))
    index.pop("_name_or_path", None)
    return (
        {name: data for name, data in content.items() if name.suffix == ".safetensors"}
        | {name: b"" for name in content if name.suffix != ".safetensors"}
        | {Path("model_index.json"): json.dumps(index, sort_keys=True).encode()}
    )


@pytest.mark.parametrize("load", [load_class, load_stock_and_convert, load_custom])
def test_every_way_of_loading_and_saving(
    tiny: Tiny,
    stock: Any,
    pipe: Any,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    load: Callable[[Tiny, Path], Any],
) -> None:
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    expected = draw(tiny, pipe)
    other = aligned(load(tiny, folder / "pipe"))
    loaded(other, folder)
    assert other.components.keys() == stock.components.keys()
    assert torch.equal(draw(tiny, other), expected)
    other.save_pretrained(tmp_path / "saved")
    assert files(tmp_path / "saved") == files(folder / "pipe")
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "saved")) is type(stock)
    assert torch.equal(draw(tiny, other), expected)  # saving has left it as it was
    other.controller.fuse("canny")
    with pytest.raises(UserError, match="'canny' is fused"):
        other.save_pretrained(tmp_path / "fused")


def test_prompts_are_encoded_without_the_rest_and_the_rest_works_without_that(
    tiny: Tiny, pipe: Any, folder: Path, tmp_path: Path
) -> None:
    """Also saved and loaded without these components. (The tokens route may need the empty prompt.)"""
    cls, family = custom_class(tiny), family_of(pipe)
    edges: dict[str, Any] = {"control": {"canny": maps(tiny)}}
    text = [name for name in pipe.components if name.startswith(("text_encoder", "tokenizer"))]
    rest = [name for name in pipe.components if name not in text]
    encoder = cls.from_pretrained(folder / "pipe", **dict.fromkeys(rest))
    with pytest.raises(UserError, match=f"{cls.__name__} cannot be controlled"):
        encoder.load_control_adapter(folder / "canny")
    encoder.save_pretrained(tmp_path / "encoder")
    encoder = cls.from_pretrained(tmp_path / "encoder", **dict.fromkeys(rest))
    tiny.settle(encoder)
    encoded = family.encode_prompts(encoder, ["a red cube"])
    arguments = inspect.signature(cls.__call__).parameters.keys()
    given = {name: tensor for name, tensor in encoded.items() if name in arguments}
    if "max_sequence_length" in arguments:
        edges["max_sequence_length"] = family.text_length(pipe)
    expected = tiny.draw(pipe, **edges)
    again = tiny.draw(pipe, None, **edges, **given)
    torch.testing.assert_close(again, expected, atol=1e-5, rtol=1e-5)
    without = loaded(cls.from_pretrained(folder / "pipe", **dict.fromkeys(text)), folder)
    without.save_pretrained(tmp_path / "rest")
    without = loaded(cls.from_pretrained(tmp_path / "rest", **dict.fromkeys(text)), folder)
    assert all(getattr(without, name) is None for name in text)
    alone = tiny.draw(without, None, **edges, **given)
    torch.testing.assert_close(alone, expected, atol=1e-5, rtol=1e-5)


def test_components_make_another_pipeline(tiny: Tiny, stock: Any, pipe: Any, folder: Path) -> None:
    """Of both kinds. Adapters belong to the pipeline that has loaded them."""
    expected, uncontrolled = draw(tiny, pipe), tiny.draw(pipe)
    for other in (
        type(stock)(**pipe.components),
        type(stock).from_pipe(pipe),
        type(pipe)(**pipe.components),
        type(pipe).from_pipe(pipe),
    ):
        other.set_progress_bar_config(disable=True)
        assert torch.equal(tiny.draw(other), uncontrolled)
    with pytest.raises(UserError, match="already is an adapter 'canny'"):
        other.load_control_adapter(folder / "canny")
    assert torch.equal(draw(tiny, pipe), expected)
    for name in NAMES.values():
        pipe.controller.delete_adapter(name)
    assert torch.equal(draw(tiny, loaded(other, folder)), expected)


# Numbers, devices.


def test_half_precision(tiny: Tiny, pipe: Any, folder: Path, tmp_path: Path) -> None:
    """Saved and loaded so, where adapters stay in float32, it draws the same."""
    pipe.to(dtype=torch.float16)
    expected = draw(tiny, pipe)
    assert torch.isfinite(expected).all() and not torch.equal(expected, tiny.draw(pipe))
    pipe.save_pretrained(tmp_path)
    half = loaded(type(pipe).from_pretrained(tmp_path, dtype=torch.float16), folder)
    assert half.controller.family.denoiser(half).dtype == torch.float16
    torch.testing.assert_close(draw(tiny, half), expected, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize(("prompts", "each"), [(2, 1), (2, 2)])
def test_a_picture_does_not_depend_on_its_batch(tiny: Tiny, pipe: Any, prompts: int, each: int) -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in range(prompts * each)]
    together = draw(
        tiny,
        pipe,
        prompt=["a red cube"] * prompts,
        control=control(tiny, batch=prompts),
        generator=generators,
        num_images_per_prompt=each,
    )
    assert len(together) == prompts * each
    given = {name: tensor[:1] for name, tensor in control(tiny, batch=prompts).items()}
    alone = draw(tiny, pipe, control=given, generator=[torch.Generator().manual_seed(0)])
    torch.testing.assert_close(together[:1], alone, atol=1e-4, rtol=1e-4)


def test_both_halves_of_guidance_are_controlled_unless_told_otherwise(tiny: Tiny, pipe: Any) -> None:
    if not has_unconditional_half(tiny, pipe, pipe.controller):
        pytest.skip("has no classifier-free guidance")
    drawn = [
        draw(tiny, pipe),
        draw(tiny, pipe, **tiny.guided),
        draw(tiny, pipe, control_unconditional=False, **tiny.guided),
        tiny.draw(pipe, **tiny.guided),
    ]
    assert all((a - b).abs().max() > 1e-4 for number, a in enumerate(drawn) for b in drawn[:number])
    torch.testing.assert_close(draw(tiny, pipe, control_unconditional=False), drawn[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_outputs_come_in_every_form(tiny: Tiny, pipe: Any, output_type: str) -> None:
    arguments = {**tiny.call, **tiny.free, "num_inference_steps": 1, "output_type": output_type}
    pictures = []
    for return_dict in (True, False):
        generator = torch.Generator().manual_seed(0)
        pictures.append(
            pipe(
                prompt="a red cube",
                control=control(tiny),
                generator=generator,
                return_dict=return_dict,
                **arguments,
            )[0]
        )
    first, second = pictures
    if output_type == "pil":
        assert isinstance(first[0], Image.Image) and first[0].size == (tiny.side, tiny.side)
        assert first[0].tobytes() == second[0].tobytes()
    else:
        assert (first == second).all() and len(first) == 1


def test_callbacks_see_and_change_what_they_ask_for(tiny: Tiny, pipe: Any) -> None:
    if "callback_on_step_end" not in inspect.signature(type(pipe).__call__).parameters:
        seen: list[int] = []  # PixArt has the older kind, which only sees
        expected = draw(tiny, pipe)
        drawn = draw(tiny, pipe, callback=lambda step, *_: seen.append(step), callback_steps=1)
        assert seen == [0, 1] and torch.equal(drawn, expected)
        return
    names = list(type(pipe)._callback_tensor_inputs)
    steps: list[int] = []

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        assert "latents" in tensors and set(tensors) <= set(names)
        steps.append(step)
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 1 else {}

    arguments: dict[str, Any] = {"callback_on_step_end": callback, **tiny.guided}
    arguments["callback_on_step_end_tensor_inputs"] = ["latents"]
    drawn = draw(tiny, pipe, **arguments)
    assert steps == [0, 1] and torch.equal(drawn, tiny.draw(pipe, **arguments))  # of zeros
    arguments["callback_on_step_end_tensor_inputs"] = ["nothing"]
    with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs"):
        draw(tiny, pipe, **arguments)


def test_offloading_twice(tiny: Tiny, pipe: Any) -> None:
    """On the CPU, which accelerate takes for a device like others."""
    expected = draw(tiny, pipe)
    for _ in range(2):
        pipe.enable_model_cpu_offload(device="cpu")
        assert torch.equal(draw(tiny, pipe), expected)
    pipe.remove_all_hooks()
    assert torch.equal(draw(tiny, pipe), expected)


@needs_cuda
@pytest.mark.parametrize("method", ["to", "enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_on_an_accelerator(tiny: Tiny, pipe: Any, method: str) -> None:
    """Twice, and back."""
    expected = draw(tiny, pipe)
    for _ in range(2):
        getattr(pipe, method)("cuda") if method == "to" else getattr(pipe, method)(device="cuda")
        torch.testing.assert_close(draw(tiny, pipe).cpu(), expected, atol=1e-3, rtol=1e-3)
    pipe.remove_all_hooks()
    pipe.to("cpu")
    torch.testing.assert_close(draw(tiny, pipe), expected, atol=1e-5, rtol=1e-5)
