"""Measure how good a base model of the scenes' world is: its VAE, and the pictures that it draws without control.

    python eval/base_quality.py
    python eval/base_quality.py --base packaged-unet
    python eval/base_quality.py --base runs/embedded/base --count 32 --steps 10 --out runs/quality

Writes README.md, quality.json and pictures.png into eval/results/<name of the base's folder>. What a picture shows
is told by the packaged scene classifier, whose own accuracy on the real scenes stands beside it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from benchmark import check_writable, describe_environment
from PIL import Image
from prompt_accuracy import TITLES, PromptAccuracy
from report import markdown_table, number, verdict
from rich.progress import Progress
from settings import FOLDER, Bar

from loco_diffusion.conditions import get_condition
from loco_diffusion.console import progress_bars, quiet_libraries, run_app, say
from loco_diffusion.data.render import render
from loco_diffusion.data.scenes import TEST_SEEDS, Scene, sample_scene
from loco_diffusion.embedded import DEFAULT_BASE, GUIDANCE, STEPS, load_packaged_classifier
from loco_diffusion.embedded.scene_classifier import truth
from loco_diffusion.files import write_text
from loco_diffusion.generation import PACKAGED_SIZE, Sampling, Session, open_session
from loco_diffusion.grid import picture_grid
from loco_diffusion.images import save_image, to_pil, to_tensor
from loco_diffusion.metrics import PixelMSE
from loco_diffusion.scoring import TaskScores

SEED = 42  # of the noise of the first picture; the next has 43
BATCH = 32
ROWS, COLUMNS = 4, 6  # of drawn pictures in the grid
SOURCES = {"scenes": "real scenes", "round_trips": "through the VAE", "drawn": "drawn from captions"}
BARS = (
    ("PSNR of the VAE round trip, dB", "vae", Bar(score="psnr", at_least=30)),
    ("edge F1 of the VAE round trip", "vae", Bar(score="f1", at_least=0.85)),
    ("prompt accuracy", "drawn", Bar(score="mean", at_least=0.9)),
    *(
        (f"classifier on real scenes: {TITLES[key]}", "scenes", Bar(score=key, at_least=0.98))
        for key in ("color", "kind", "ground", "sky")
    ),
)
Scores = dict[str, dict[str, float | None]]
Pictures = dict[str, list[Image.Image]]
"""By the keys of SOURCES."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run with the given arguments, by default the process's; returns the exit status."""
    return run_app(app, "base_quality.py", arguments)


@app.command()
def base_quality(
    base: Annotated[
        str, typer.Option(help="packaged-dit, packaged-unet, or a folder in diffusers' format.")
    ] = DEFAULT_BASE,
    count: Annotated[int, typer.Option(min=1, help="Held-out scenes.")] = 512,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = STEPS,
    guidance: Annotated[
        float, typer.Option(min=0, help="Scale of classifier-free guidance; 1 is none.")
    ] = GUIDANCE,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = FOLDER / "results",
) -> None:
    """Score the round trips of held-out scenes through a base's VAE, and pictures drawn from their captions."""
    quiet_libraries()
    session = open_session(base, torch.float32)
    folder = out / Path(session.pipe.name_or_path).name
    check_writable(folder)
    scenes = [sample_scene(seed) for seed in TEST_SEEDS[:count]]
    sampling = Sampling(PACKAGED_SIZE, PACKAGED_SIZE, steps, guidance)
    started = time.monotonic()
    with progress_bars() as progress:
        scores, shown = measure(session, scenes, sampling, progress)
    result = {
        "run_info": {
            "created_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "settings": {"pictures": count, "steps": steps, "guidance": guidance, "seed": SEED},
            "seconds": round(time.monotonic() - started, 1),
        },
        "scores": scores,
        "meta_info": describe_environment(session),
    }
    save_image(_grid(shown), folder / "pictures.png")
    write_text(folder / "quality.json", json.dumps(result, indent=2) + "\n")
    captions = [scene.caption for scene in scenes[: ROWS * COLUMNS]]
    say(f"Wrote {write_text(folder / 'README.md', _render(folder.name, result, captions))}")


def measure(
    session: Session, scenes: Sequence[Scene], sampling: Sampling, progress: Progress
) -> tuple[Scores, Pictures]:
    """Reconstruct scenes, draw pictures from their captions, and score both.

    Returns:
        All numbers, by what they are of; the first ROWS x COLUMNS pictures.
    """
    classifier = load_packaged_classifier()
    vae, depth, true_depth = TaskScores("canny"), TaskScores("depth"), PixelMSE()
    accuracy = {source: PromptAccuracy() for source in SOURCES}
    shown: Pictures = {source: [] for source in SOURCES}
    bar = progress.add_task("Pictures", total=len(scenes))
    for start in range(0, len(scenes), BATCH):
        batch = scenes[start : start + BATCH]
        rendering = render(batch, PACKAGED_SIZE)
        originals = [to_pil(picture) for picture in rendering.image]
        seeds = [SEED + start + number for number in range(len(batch))]
        pictures = {
            "scenes": originals,
            "round_trips": session.reconstruct(originals),
            "drawn": session.generate([scene.caption for scene in batch], seeds, sampling),
        }
        vae.update(pictures["round_trips"], originals)
        depth.update(pictures["round_trips"], originals)
        true_depth.update(_depth_maps(originals), _stretched(rendering.depth))
        for source, drawn in pictures.items():
            seen = classifier.classify(_stack(drawn))
            for one, scene, real in zip(seen, batch, truth(batch), strict=True):
                if source == "drawn":  # a caption does not tell whether the sky is in view
                    accuracy[source].update(one, replace(real, sky=scene.sky), one.sky is not None)
                else:
                    accuracy[source].update(one, real)
            shown[source] = (shown[source] + drawn)[: ROWS * COLUMNS]
        progress.update(bar, advance=len(batch))
    depths = {"network": float(true_depth.compute()), "round_trip": depth.compute()["mse"]}
    scores: Scores = {"vae": {**vae.compute()}, "depth": {**depths}}
    return scores | {source: accuracy[source].compute() for source in SOURCES}, shown


def _depth_maps(pictures: Sequence[Image.Image]) -> torch.Tensor:
    return _stack([get_condition("depth").extract(picture) for picture in pictures])


def _stretched(depth: torch.Tensor) -> torch.Tensor:
    """Scenes' own depth (B, H, W) as the depth condition has it: (B, 3, H, W), from 0 to 1 in every picture."""
    low, high = depth.amin((1, 2), keepdim=True), depth.amax((1, 2), keepdim=True)
    return ((depth - low) / (high - low))[:, None].expand(-1, 3, -1, -1)


def _stack(pictures: Sequence[Image.Image]) -> torch.Tensor:
    return torch.stack([to_tensor(picture) for picture in pictures])


def _grid(shown: Pictures) -> Image.Image:
    """Rows of real scenes, each above a row of what was drawn from their captions."""
    rows, labels = [], []
    for start in range(0, len(shown["scenes"]), COLUMNS):
        for source in ("scenes", "drawn"):
            row = shown[source][start : start + COLUMNS]
            rows.append(row + [Image.new("RGB", row[0].size, "white")] * (COLUMNS - len(row)))
            labels.append(f"{SOURCES[source]}\n{start + 1} to {start + len(row)}")
    return picture_grid(rows, labels, [str(column + 1) for column in range(COLUMNS)], side=PACKAGED_SIZE)


def _render(name: str, result: dict[str, Any], captions: Sequence[str]) -> str:
    settings, scores, system = result["run_info"]["settings"], result["scores"], result["meta_info"]
    bars = [["what", "value", "bar", "result"]]
    for title, part, bar in BARS:
        value = scores[part][bar.score]
        judged = "not judged" if value is None else verdict(bar, value)
        bars.append([title, number(value), f"≥ {bar.at_least:g}", judged])
    accuracy = [["", *SOURCES.values()]]
    for key, title in {**TITLES, "mean": "prompt accuracy"}.items():
        accuracy.append([title, *(number(scores[source][key]) for source in SOURCES)])
    versions = ", ".join(f"{package} {version}" for package, version in system["package_info"].items())
    machine = system["system_info"]
    parts = [
        f"# Quality of the base `{name}`",
        "Written by `python eval/base_quality.py`; do not edit.",
        f"{settings['pictures']} held-out scenes at {PACKAGED_SIZE} px, pictures of their captions in "
        f"{settings['steps']} steps with guidance {settings['guidance']:g}, seed {settings['seed']}.",
        "## Bars",
        markdown_table(bars),
        "## What the classifier sees",
        markdown_table(accuracy),
        "Each solid of a caption is assigned to another seen one so that most is right; one without a partner is "
        "wrong. Of drawn pictures the sky is judged only where the classifier sees one, in "
        f"{_percent(scores['drawn']['sky_in_view'])} of them, since a caption does not tell that it is in view; of "
        "the others it is judged always, none being in view as an answer of its own. Prompt accuracy is the mean of "
        "colours, kinds, ground and sky.",
        "## VAE and depth",
        markdown_table(
            [
                ["what", "value"],
                ["VAE round trip: PSNR, dB", number(scores["vae"]["psnr"])],
                ["VAE round trip: SSIM", number(scores["vae"]["ssim"])],
                ["VAE round trip: edge F1", number(scores["vae"]["f1"])],
                ["VAE round trip: edge F1, 1 px", number(scores["vae"]["f1_1px"])],
                ["depth network against the scenes' own depth: MSE", number(scores["depth"]["network"])],
                [
                    "depth of the VAE round trip against that of the scene: MSE",
                    number(scores["depth"]["round_trip"]),
                ],
            ]
        ),
        "Depth maps are stretched to 0..255 in each picture; the last row is the noise floor of the depth task.",
        "## Pictures",
        "![Real scenes, and pictures drawn from their captions](pictures.png)",
        "\n".join(f"{place}. {caption}" for place, caption in enumerate(captions, 1)),
        "## Run",
        f"{result['run_info']['seconds']:.0f} seconds on {machine['cpu']}, {machine['cpu_count']} CPUs, "
        f"{machine['device']}; Python {machine['python']}, {versions}.",
    ]
    return "\n\n".join(parts) + "\n"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


if __name__ == "__main__":
    sys.exit(main())
