"""The command line: loco-diffusion generate | train | export | merge | info | quickstart.

Heavy libraries are imported inside the commands, so that help and usage errors come at once. Every error that
the user can mend is one line on standard error and exit status 2.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from loco_diffusion.cli_adapters import export, merge
from loco_diffusion.cli_info import info
from loco_diffusion.console import note, progress_bars, quiet_libraries, run_app, say
from loco_diffusion.control_options import check_prompt, parse_adapters, parse_controls, parse_strengths
from loco_diffusion.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

    from loco_diffusion.generation import Session

app = typer.Typer(
    add_completion=False,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `loco-diffusion` with the given arguments, by default the process's; returns the exit status."""
    return run_app(app, "loco-diffusion", arguments)


@app.callback()
def _program(context: typer.Context) -> None:
    """Draw pictures that follow edges, depth, masks, grays or blurs, with orthogonal adapters for frozen
    diffusion models.

    Begin with [bold]loco-diffusion quickstart[/bold].
    """
    if context.invoked_subcommand is None:
        context.get_help()
        raise typer.Exit()


@app.command()
def generate(
    prompt: Annotated[str, typer.Option(help="What to draw.")],
    control: Annotated[
        list[str] | None,
        typer.Option(metavar="CONDITION=PATH", help="Picture to extract a condition from. Repeatable."),
    ] = None,
    control_image: Annotated[
        list[str] | None, typer.Option(metavar="CONDITION=PATH", help="Ready condition map. Repeatable.")
    ] = None,
    strength: Annotated[
        list[str] | None,
        typer.Option(metavar="CONDITION=NUMBER", help="0 is no control, 1 (default) as trained. Repeatable."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="DIR_OR_HUB_ID", help="Base model; default: packaged-unet."),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CONDITION=DIR_OR_HUB_ID", help="Adapter; default: the packaged one. Repeatable."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Picture file to write: png, jpg, webp, bmp or tif.")] = Path(
        "out.png"
    ),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps; default: the model's.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; default: the model's.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the noise.")] = 0,
    width: Annotated[int | None, typer.Option(help="In pixels; default: the model's.")] = None,
    height: Annotated[int | None, typer.Option(help="In pixels; default: the model's.")] = None,
) -> None:
    """Draw a picture that follows condition maps.

    CONDITION is canny, depth, mask, colorization or deblur; several work together. Pictures of another shape
    are cropped around their centre. For example:

    loco-diffusion generate --prompt "a red cube" --control canny=photo.jpg --strength canny=0.8
    """
    from loco_diffusion.conditions import get_condition
    from loco_diffusion.generation import fit_map
    from loco_diffusion.images import fit, load_image

    pictures, ready = parse_controls(control or [], control_image or [])
    conditions = [*pictures, *ready]
    strengths = parse_strengths(strength or [], conditions)
    adapters = parse_adapters(adapter or [], conditions, model)
    check_prompt(prompt)
    for condition in conditions:
        get_condition(condition)
    _check_output(out, overwrite)
    loaded = {condition: load_image(path) for condition, path in (pictures | ready).items()}
    with progress_bars() as progress:
        session = _open_session(progress, model, adapters)
        sampling = session.sampling(width, height, steps, guidance)
        if (width or sampling.width, height or sampling.height) != (sampling.width, sampling.height):
            note(
                f"The sides must be multiples of {session.token_pixels} px; "
                f"drawing {sampling.width}x{sampling.height}."
            )
        session.check_prompt_length(prompt)
        size = (sampling.width, sampling.height)
        adapters_of = session.controller.adapters
        maps = {c: adapters_of[c].make_condition().extract(fit(loaded[c], *size)) for c in pictures}
        maps |= {c: fit_map(loaded[c], c, *size) for c in ready}
        bar = progress.add_task("Drawing", total=sampling.steps)
        picture = session.generate(
            [prompt],
            [seed],
            sampling,
            maps=maps,
            strength=strengths,
            on_step=lambda step, total: progress.update(bar, completed=step),
        )[0]
    _save(picture, out)


@app.command()
def train(
    config: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG.yaml",
            help="What to train, see --fields; or a packaged one, such as flux1-dev-canny.",
        ),
    ],
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="latest|DIR",
            help='Continue: "latest" from the newest checkpoint of the output, if there is one; else the '
            "checkpoint's folder.",
        ),
    ] = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Repository of the Hugging Face Hub that gets the adapter."),
    ] = None,
    fields: Annotated[
        bool,
        typer.Option(
            "--fields",
            is_eager=True,
            callback=lambda given: _show_fields() if given else None,
            help="Show what CONFIG.yaml may say, and exit.",
        ),
    ] = False,
) -> None:
    """Train an adapter for a condition.

    For several devices: accelerate launch --multi_gpu -m loco_diffusion.cli train CONFIG.yaml
    """
    from loco_diffusion.training.config import load_config
    from loco_diffusion.training.packaged import find_config
    from loco_diffusion.training.trainer import train as run_training

    quiet_libraries()
    folder = run_training(load_config(find_config(config)), resume, push_to_hub)
    say(f"Wrote {folder}")
    say(f"See {folder.parent / 'report.html'} for curves and pictures")
    if push_to_hub is not None:
        say(f"Pushed it to {push_to_hub}")


for command in (export, merge, info):
    app.command()(command)


@app.command()
def quickstart(
    image: Annotated[
        Path | None, typer.Option(help="Your own picture, a photo too; default: a packaged scene.")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="What it shows; default: the scene's caption, none for your own picture."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Picture file to write; default: quickstart.png or the next free name."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps; default: the model's.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the noise.")] = 0,
) -> None:
    """Redraw a picture under each of five conditions, with control and without, and compare.

    Everything comes with the package: nothing is downloaded. Writes one picture with all of them.
    """
    from loco_diffusion.embedded import EXAMPLE_PICTURE, EXAMPLE_PROMPT
    from loco_diffusion.images import load_image
    from loco_diffusion.quickstart import CONDITIONS, compare, comparison_grid

    out = out or _free_name("quickstart")
    _check_output(out, overwrite)
    if prompt is not None:
        check_prompt(prompt)
    picture = load_image(EXAMPLE_PICTURE if image is None else image)
    if prompt is None:
        prompt = EXAMPLE_PROMPT.read_text(encoding="utf-8").strip() if image is None else ""
    with progress_bars() as progress:
        session = _open_session(progress, None, dict.fromkeys(CONDITIONS))
        sampling = session.sampling(steps=steps)
        session.check_prompt_length(prompt)
        bar = progress.add_task("Drawing", total=(1 + len(CONDITIONS)) * sampling.steps)

        def report(title: str, step: int, total: int) -> None:
            progress.update(bar, advance=1, description=f"Drawing: {title}")

        comparisons = compare(session, picture, prompt, seed, sampling, report)
    table = Table("task", "score", "better", "with control", "without control")
    for c in comparisons:
        better = "higher" if c.score.higher_is_better else "lower"
        table.add_row(c.condition, c.score.title, better, f"{c.with_control:.4g}", f"{c.without_control:.4g}")
    say(f"prompt: {prompt or 'none, the conditions alone decide'}")
    Console().print(table)
    _save(comparison_grid(picture, comparisons), out)


def _check_output(out: Path, overwrite: bool) -> None:
    from loco_diffusion.images import check_output

    if check_output(out).exists() and not overwrite:
        raise UserError(f"{out} exists; choose another --out, or replace it with --overwrite.")


def _free_name(stem: str) -> Path:
    names = (Path(f"{stem}{number}.png") for number in ("", *(f"-{n}" for n in range(2, 10_000))))
    return next(name for name in names if not name.exists())


def _open_session(progress: Progress, model: str | None, adapters: dict[str, str | None]) -> Session:
    task = progress.add_task("Loading the model", total=1)
    from loco_diffusion.generation import open_session

    quiet_libraries()
    session = open_session(model)
    session.load_adapters(adapters)
    progress.update(task, completed=1)
    return session


def _save(picture: Image.Image, out: Path) -> None:
    from loco_diffusion.images import save_image

    save_image(picture, out)
    say(f"Wrote {out} ({picture.width}x{picture.height} px)")


def _show_fields() -> None:
    from loco_diffusion.training.config import config_help

    typer.echo(config_help())
    raise typer.Exit()


if __name__ == "__main__":
    sys.exit(main())
