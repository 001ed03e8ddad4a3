"""What control costs: time and memory of a FLUX.1 or SD1.5 that follows pictures, beside one that does not.

    python benchmarks/control_cost.py
    python benchmarks/control_cost.py --device cuda --layers 19
    python benchmarks/control_cost.py --model sd15
    python benchmarks/control_cost.py --width 256 --tokens 64 --text-tokens 16 --repeats 2    # a trial
    python benchmarks/control_cost.py --model sd15 --width 32 --tokens 256 --repeats 1        # another

Random bfloat16 weights of FLUX.1's width, with as many single blocks as two for each double block; LoCO adapters
of the attention (r 4, 4 rotations). Measured are

- once: what is computed once for a picture, before the first step,
- step: one call of the denoiser without gradients,
- image: once + 28 steps,
- peak memory: of both, over what the process had before it built the model, each way in its own process.

ControlNet is diffusers' FluxControlNetModel with 5 double and 10 single blocks for FLUX.1's 19 and 38, as the
published ones have; with fewer layers its own time, but not its memory, is scaled to that share. FluxControl
concatenates the condition's channels to the picture's. SD1.5's ControlNet is diffusers' ControlNetModel, a copy of
half of the UNet. All ways run in turn within each repetition; ratios are medians over the repetitions.
Writes MODEL-DEVICE.json and .md into the folder control_cost, after each repetition and each peak.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple

import torch
import typer
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from memory import in_new_process, peak_over
from output import RESULTS, describe, write
from timing import milliseconds, paired_ratio
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from loco_diffusion import Controller, LoCOConfig
from loco_diffusion.console import quiet_libraries
from loco_diffusion.control import EncoderConfig, MapTokens, TokensConfig
from loco_diffusion.control.flux_positions import image_ids
from loco_diffusion.machine import describe_machine

PACKAGES = ("torch", "peft", "diffusers")
STEPS = 28
CONTROLNET_SHARE = 5 / 19


@dataclass(frozen=True)
class Settings:
    """The size of the measurement; `width` is that of the first blocks."""

    model: str
    width: int
    tokens: int
    text_tokens: int
    layers: int
    repeats: int
    device: str


class Way(NamedTuple):
    """A way to draw.

    Attributes:
        step: a call of the denoiser.
        enter: gives the context that steps run in; what entering it computes is computed once a picture.
        extra: runs in each step as well.
        share: of extra's time, that counts.
    """

    step: Callable[[], object]
    enter: Callable[[], AbstractContextManager[Any]] = nullcontext
    extra: Callable[[], object] | None = None
    share: float = 1.0


def main(
    model: Annotated[str, typer.Option(help="flux or sd15.")] = "flux",
    width: Annotated[int, typer.Option(help="Channels: a multiple of 128, or of 32 for sd15.")] = 0,
    tokens: Annotated[int, typer.Option(help="Image tokens, and as many of each condition; a square.")] = 0,
    text_tokens: Annotated[int, typer.Option(help="Text tokens.")] = 0,
    layers: Annotated[int, typer.Option(help="Double blocks of flux; FLUX.1 has 19.")] = 1,
    repeats: Annotated[int, typer.Option(help="Repetitions; medians count.")] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = RESULTS / "control_cost",
) -> None:
    """Measure the ways to control and write the numbers and a table. Sizes that are not given are the model's."""
    if model not in WAYS:
        raise typer.BadParameter(f"--model is one of {', '.join(WAYS)}, not {model}.")
    own = SIZES[model]
    settings = Settings(
        model, width or own[0], tokens or own[1], text_tokens or own[2], layers, repeats, device
    )
    quiet_libraries()
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{model}-{device}.json"
    results = {"settings": asdict(settings), "machine": describe_machine(device, PACKAGES)}
    save = partial(_save, path, results)
    rows = in_new_process(measure, settings, save)
    for row in rows:
        typer.echo(f"memory: {row['way']}")
        row["peak_bytes"] = in_new_process(peak_of, row["way"], settings)
        save(rows)
    typer.echo(f"Wrote {path} and {path.with_suffix('.md')}.")


def _save(path: Path, results: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    write({**results, "rows": rows}, path, to_markdown)


@torch.no_grad()
def measure(settings: Settings, save: Callable[[list[dict[str, Any]]], None]) -> list[dict[str, Any]]:
    """A row for each way; `save` gets them after each repetition."""
    ways = {name: build() for name, build in WAYS[settings.model](settings).items()}
    samples: dict[str, dict[str, list[float]]] = {
        name: {"once": [], "step": [], "image": []} for name in ways
    }
    for repetition in range(settings.repeats + 1):  # the first one warms up
        typer.echo(f"repetition {repetition} of {settings.repeats}")
        for name, way in ways.items():
            once, step = _time(way, settings.device)
            if repetition:
                for key, value in (("once", once), ("step", step), ("image", once + STEPS * step)):
                    samples[name][key].append(value)
        if repetition:
            rows = _rows(samples)
            save(rows)
    return rows


def _rows(samples: dict[str, dict[str, list[float]]]) -> list[dict[str, Any]]:
    reference = samples[BARE]["image"]
    return [
        {
            "way": name,
            **{f"{key}_ms": median(values) for key, values in times.items()},
            "ratio": paired_ratio(times["image"], reference),
            "samples_ms": times,
        }
        for name, times in samples.items()
    ]


def _time(way: Way, device: str) -> tuple[float, float]:
    """Milliseconds of what is computed once, and of a step."""
    with ExitStack() as stack:
        once = milliseconds(lambda: stack.enter_context(way.enter()), device)
        step = milliseconds(way.step, device)
        if way.extra is not None:
            step += way.share * milliseconds(way.extra, device)
    return once, step


@torch.no_grad()
def peak_of(name: str, settings: Settings) -> int:
    """The bytes that a model, what is computed once, and a step take at most."""
    quiet_libraries()
    with peak_over(settings.device) as peak:
        way = WAYS[settings.model](settings)[name]()
        peak.restart()
        for _ in range(2):
            with way.enter():
                way.step()
                if way.extra is not None:
                    way.extra()
    return peak.bytes


BARE = "no control"


def flux_ways(settings: Settings) -> dict[str, Callable[[], Way]]:
    """The ways to control FLUX.1."""
    make = partial(_random, device=settings.device)
    side = round(settings.tokens**0.5)
    inputs: dict[str, Any] = {
        "hidden_states": make(1, settings.tokens, 64),
        "encoder_hidden_states": make(1, settings.text_tokens, 4096),
        "pooled_projections": make(1, 768),
        "timestep": torch.tensor([0.5], device=settings.device, dtype=torch.bfloat16),
        "guidance": torch.tensor([3.5], device=settings.device, dtype=torch.bfloat16),
        "img_ids": image_ids(side, side, torch.zeros((), device=settings.device), 1),
        "txt_ids": torch.zeros(settings.text_tokens, 3, device=settings.device),
        "return_dict": False,
    }
    condition = MapTokens(make(1, settings.tokens, 64).float(), (side, side), "latents")
    build = partial(_frozen, settings=settings)
    base = cache(lambda: build(FluxTransformer2DModel))

    def make_pipe(transformer: nn.Module) -> FluxPipeline:
        return FluxPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, transformer)

    def step(transformer: nn.Module) -> Callable[[], object]:
        return partial(transformer, **inputs)

    controlled = partial(_controlled, base, make_pipe, step, condition)

    def control_net() -> Way:
        network = build(FluxControlNetModel)
        extra = partial(network, controlnet_cond=inputs["hidden_states"], **inputs)
        return Way(step(base()), extra=extra, share=CONTROLNET_SHARE)

    def concatenated() -> Way:
        both = {**inputs, "hidden_states": torch.cat([inputs["hidden_states"]] * 2, dim=2)}
        return Way(partial(build(FluxTransformer2DModel, in_channels=128, out_channels=64), **both))

    encoder, tokens = EncoderConfig(input="latents"), TokensConfig()
    return {
        BARE: lambda: Way(step(base())),
        "encoder route": partial(controlled, encoder=encoder),
        "encoder route, merged": partial(controlled, encoder=encoder, merged=True),
        "tokens route, 1 condition": partial(controlled, tokens=tokens),
        "tokens route, 1 condition at strength 0.5": partial(controlled, tokens=tokens, strength=0.5),
        "tokens route, 2 conditions": partial(controlled, 2, tokens=tokens),
        "tokens route, 3 conditions": partial(controlled, 3, tokens=tokens),
        "tokens route, joint": partial(controlled, tokens=TokensConfig(joint=True)),
        "ControlNet": control_net,
        "FluxControl (channels)": concatenated,
    }


def sd15_ways(settings: Settings) -> dict[str, Callable[[], Way]]:
    """The ways to control Stable Diffusion 1.5."""
    make = partial(_random, device=settings.device)
    side = round(settings.tokens**0.5)
    latents, text = make(1, 4, side, side), make(1, settings.text_tokens, 768)
    condition = MapTokens(make(1, settings.tokens, 4).float(), (side, side), "latents")
    half = MapTokens(make(1, settings.tokens // 4, 4).float(), (side // 2, side // 2), "latents")

    @cache
    def base() -> nn.Module:
        with torch.device(settings.device):
            # Its defaults are SD1.5's, but for the text.
            widths = tuple(settings.width * factor for factor in (1, 2, 4, 4))
            unet = UNet2DConditionModel(cross_attention_dim=768, block_out_channels=widths)
        return unet.to(torch.bfloat16).requires_grad_(False).eval()

    def make_pipe(unet: nn.Module) -> StableDiffusionPipeline:
        tokenizer = CLIPTokenizer(
            vocab={"<|startoftext|>": 0, "<|endoftext|>": 1}, merges=[], model_max_length=77
        )
        encoder = CLIPTextModel(CLIPTextConfig(vocab_size=2, hidden_size=768, num_hidden_layers=1))
        encoder = encoder.to(settings.device, torch.bfloat16)
        scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
        parts = None, encoder, tokenizer, unet, scheduler, None, None
        return StableDiffusionPipeline(*parts, requires_safety_checker=False)

    def step(unet: nn.Module) -> Callable[[], object]:
        return partial(unet, latents, 500, encoder_hidden_states=text, return_dict=False)

    def control_net() -> Way:
        network = ControlNetModel.from_unet(base()).to(torch.bfloat16).requires_grad_(False).eval()
        picture = make(1, 3, 8 * side, 8 * side)
        extra = partial(
            network, latents, 500, encoder_hidden_states=text, controlnet_cond=picture, return_dict=False
        )
        return Way(step(base()), extra=extra)

    controlled = partial(_controlled, base, make_pipe, step)
    encoder, tokens = EncoderConfig(input="latents"), TokensConfig()
    return {
        BARE: lambda: Way(step(base())),
        "encoder route": partial(controlled, condition, encoder=encoder),
        "encoder route, merged": partial(controlled, condition, encoder=encoder, merged=True),
        "tokens route, 1 condition": partial(controlled, condition, tokens=tokens),
        "tokens route, 1 condition at strength 0.5": partial(
            controlled, condition, tokens=tokens, strength=0.5
        ),
        "tokens route, 1 condition of a quarter of the tokens": partial(
            controlled, half, tokens=TokensConfig(stride=2)
        ),
        "ControlNet": control_net,
    }


WAYS = {"flux": flux_ways, "sd15": sd15_ways}
SIZES = {"flux": (3072, 1024, 512), "sd15": (320, 64 * 64, 77)}
"""Width, image tokens and text tokens."""


def _controlled(
    base: Callable[[], nn.Module],
    make_pipe: Callable[[nn.Module], Any],
    step: Callable[[nn.Module], Callable[[], object]],
    condition: MapTokens,
    count: int = 1,
    strength: float = 1.0,
    merged: bool = False,
    encoder: EncoderConfig | None = None,
    tokens: TokensConfig | None = None,
) -> Way:
    """Control by LoCO adapters and as many conditions, on the route whose settings are given."""
    denoiser = copy.deepcopy(base()) if merged else _sharing(base())
    controller = Controller(make_pipe(denoiser))
    names = [f"condition{number}" for number in range(count)]
    for name in names:
        config = LoCOConfig(r=4, num_rotations=4, side="input")
        controller.add_adapter(name, config, encoder=encoder, tokens=tokens)
    if merged:
        controller.fuse(names[0])

    def enter() -> AbstractContextManager[None]:
        controller.clear_cache()  # as for a new picture
        return controller(dict.fromkeys(names, condition), strength=strength)

    return Way(step(denoiser), enter)


def _frozen(kind: type, settings: Settings, **config: int) -> nn.Module:
    """A FLUX-like model of random weights."""
    with torch.device(settings.device):
        model: nn.Module = kind(
            num_attention_heads=settings.width // 128,
            guidance_embeds=True,
            num_layers=settings.layers,
            num_single_layers=2 * settings.layers,
            **config,
        )
    return model.to(torch.bfloat16).requires_grad_(False).eval()


def _sharing(base: nn.Module) -> nn.Module:
    """A copy with the same weights."""
    return copy.deepcopy(base, memo={id(p): p for p in base.parameters()})


def _random(*shape: int, device: str) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16)


def to_markdown(results: dict[str, Any]) -> str:
    """The results as a table."""
    settings = results["settings"]
    size = (
        f"Width {settings['width']}, {settings['text_tokens']} text, {settings['tokens']} image and as many "
        "condition tokens"
    )
    if settings["model"] == "flux":
        size += f", {settings['layers']} double and {2 * settings['layers']} single blocks"
    lines = [
        f"# What control costs: {settings['model']}",
        "",
        f"{size}; medians of {settings['repeats']} repetitions.",
        "",
        describe(results["machine"]),
        "",
        f"| way | once, ms | step, ms | image of {STEPS} steps, s | x no control | peak, MiB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in results["rows"]:
        peak = f"{row['peak_bytes'] / 2**20:.0f}" if "peak_bytes" in row else "not measured"
        lines.append(
            f"| {row['way']} | {row['once_ms']:.0f} | {row['step_ms']:.0f} | {row['image_ms'] / 1000:.1f} | "
            f"{row['ratio']:.3f} | {peak} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    typer.run(main)
