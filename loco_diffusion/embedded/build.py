"""Rebuild what the package ships: `python -m loco_diffusion.embedded.build STAGE`.

Stages, in the order they need one another: vae, decoder, base, unet, depth, classifier, adapters, unet-adapters,
example. Each can be stopped at any moment and started again; it goes on from its last checkpoint. An accelerator is
used where there is one.
`--keep` takes a stopped training to another machine: it writes the weights of its last checkpoint into the folder
`unfinished`, from which the stage then goes on.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from loco_diffusion.embedded import (
    EXAMPLE_PICTURE,
    EXAMPLE_PROMPT,
    WEIGHTS,
    packaged_base,
)
from loco_diffusion.embedded.base import build_base
from loco_diffusion.embedded.classifier import build_classifier
from loco_diffusion.embedded.depth import build_depth
from loco_diffusion.embedded.loop import keep_unfinished
from loco_diffusion.embedded.unet_base import build_unet_base
from loco_diffusion.embedded.vae import build_vae, refine_decoder
from loco_diffusion.quickstart import CONDITIONS

STEPS = {"vae": 3000, "decoder": 5600, "base": 11400, "unet": 5000, "depth": 1200, "classifier": 3600}
EXAMPLE_SEED = 20_000_033


class Stage(str, Enum):
    vae = "vae"
    decoder = "decoder"
    base = "base"
    unet = "unet"
    depth = "depth"
    classifier = "classifier"
    adapters = "adapters"
    unet_adapters = "unet-adapters"
    example = "example"


def main(
    stage: Stage,
    runs: Annotated[Path, typer.Option(help="Checkpoints and rendered scenes.")] = Path("runs/embedded"),
    out: Annotated[Path, typer.Option(help="Where the finished weights go.")] = WEIGHTS,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, if not the recipe's own.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Only keep the last checkpoint's weights.")] = False,
    compiled: Annotated[
        bool,
        typer.Option("--compile", help="Compile the blocks of a base, for which a C++ compiler is needed."),
    ] = False,
) -> None:
    """Build one part of the packaged world."""
    if keep:
        sys.stdout.write(f"Wrote {keep_unfinished(runs / stage.value)}\n")
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    count = steps or STEPS.get(stage.value, 0)
    if stage is Stage.vae:
        vae = build_vae(count, runs, device)
        _replace(runs / "vae" / "final", vae.save_pretrained)
    elif stage is Stage.decoder:
        refined = refine_decoder(count, _built_vae(runs, "vae"), runs, device)
        _replace(runs / "decoder" / "final", refined.save_pretrained)
    elif stage is Stage.base:
        base = build_base(count, _built_vae(runs), runs, device, compiled)
        _replace(out / "packaged-dit", base.to("cpu", torch.float16).save_pretrained)
    elif stage is Stage.unet:
        unet_base = build_unet_base(count, _built_vae(runs), runs, device, compiled)
        _replace(out / "packaged-unet", unet_base.to("cpu", torch.float16).save_pretrained)
    elif stage is Stage.depth:
        network, processor = build_depth(count, runs, device)
        _replace(out / "depth", network.to("cpu", torch.float16).save_pretrained, processor.save_pretrained)
    elif stage is Stage.classifier:
        classifier = build_classifier(count, runs, device)
        _replace(out / "classifier", classifier.to("cpu", torch.float16).save_pretrained)
    elif stage is Stage.adapters:
        _build_adapters("packaged-dit", runs, out, compiled)
    elif stage is Stage.unet_adapters:
        _build_adapters("packaged-unet", runs, out, compiled)
    else:
        _draw_example()


def _built_vae(runs: Path, *stages: str) -> AutoencoderKL:
    """The VAE of the last of these stages, by default of any, that has been through; else the packaged one."""
    built = [runs / stage / "final" for stage in stages or ("decoder", "vae")]
    source = next((folder for folder in built if folder.exists()), packaged_base("packaged-dit") / "vae")
    vae = AutoencoderKL.from_pretrained(source)
    vae.register_to_config(_name_or_path="")  # else the folder of this machine would be packaged
    return vae


def _replace(folder: Path, *writers: Callable[[Path], object]) -> None:
    """Write a folder under another name and put it in its place when it is whole."""
    unfinished = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for write in writers:
        write(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(unfinished, folder)


def _build_adapters(base: str, runs: Path, out: Path, compiled: bool) -> None:
    """Train all adapters of a packaged base."""
    from loco_diffusion.training.config import load_config
    from loco_diffusion.training.packaged import find_config
    from loco_diffusion.training.trainer import train

    folder = f"{base}-adapters"
    for condition in CONDITIONS:
        name = f"embedded-{condition}" if base == "packaged-dit" else f"embedded-unet-{condition}"
        changes = {
            "output": str(runs / folder / condition),
            "base": base if out == WEIGHTS else str(out / base),
            "torch_compile": compiled,
        }
        trained = train(load_config(find_config(name)).model_copy(update=changes), resume="latest")
        _replace(out / folder / condition, partial(_copy_in_half_precision, trained))


def _copy_in_half_precision(adapter: Path, folder: Path) -> None:
    """Copy an adapter folder; loading makes its weights float32 again."""
    for path in adapter.iterdir():
        if path.suffix == ".safetensors":
            tensors = {name: tensor.half() for name, tensor in load_file(path).items()}
            save_file(tensors, folder / path.name, metadata={"format": "pt"})
        else:
            shutil.copy(path, folder)


def _draw_example() -> None:
    """The picture and prompt that quickstart and the demo begin with: a scene that no training has seen."""
    from loco_diffusion.data.render import render
    from loco_diffusion.data.scenes import sample_scene
    from loco_diffusion.images import save_image, to_pil

    scene = sample_scene(EXAMPLE_SEED)
    EXAMPLE_PICTURE.parent.mkdir(exist_ok=True)
    save_image(to_pil(render([scene]).image[0]), EXAMPLE_PICTURE)
    EXAMPLE_PROMPT.write_text(scene.caption + "\n")


if __name__ == "__main__":
    typer.run(main)
