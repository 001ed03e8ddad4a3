"""The demo: a picture, what to keep of it, a prompt, and the new picture with and without control.

    python app/demo.py
    python app/demo.py --model black-forest-labs/FLUX.1-dev --adapter canny=path/to/canny

The page loads nothing from elsewhere: no fonts, no scripts, no telemetry.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any

import gradio as gr
import typer
from PIL import Image

from loco_diffusion.bases import is_packaged
from loco_diffusion.conditions import condition_names, get_condition
from loco_diffusion.console import quiet_libraries, run_app
from loco_diffusion.control_options import check_prompt, parse_pairs
from loco_diffusion.data.render import render
from loco_diffusion.data.scenes import TEST_SEEDS, sample_scene
from loco_diffusion.embedded import EXAMPLE_PICTURE, EXAMPLE_PROMPT
from loco_diffusion.errors import UserError
from loco_diffusion.generation import Session, open_session
from loco_diffusion.images import fit, load_image, to_pil

MAX_SEED = 2**31 - 1
MAX_STRENGTH = 1.5
MAX_STEPS = 50
MAX_GUIDANCE = 10.0
SCENES = 4
"""How many held-out scenes are among the examples."""

WORDS = {
    "canny": "Edges",
    "depth": "Depth",
    "mask": "Surroundings",
    "colorization": "Light and shade",
    "deblur": "Blurred shapes",
}
"""What a condition keeps of a picture, for people who do not know its name."""

INTRO = """# Redraw a picture

Choose a picture, tick what to keep of it, and describe what you want to see."""

PLACEHOLDER = "a large glossy red sphere on a checkered gray ground under a blue sky"

STYLE = """
.gradio-container, .gradio-container > .main { width: 100%; max-width: 1120px !important; margin: 0 auto; }
#picture img { width: 100%; height: 100%; object-fit: contain; }
#examples .gallery-item, #examples .container, #examples img { width: 60px; height: 60px; }
#maps .grid-wrap { min-height: 0; height: auto; max-height: none; }
#compare { position: relative; }
#compare:has(img)::before, #compare:has(img)::after {
    position: absolute; bottom: 16px; z-index: 100; padding: 2px 10px; border-radius: 99px;
    background: rgba(0, 0, 0, .6); color: white; font-size: 13px; pointer-events: none;
}
#compare:has(img)::before { content: "without control"; left: 16px; }
#compare:has(img)::after { content: "with control"; right: 16px; }
"""


class Demo:
    """The page's event handlers, around one loaded model.

    An upload arrives as the browser's record of it (`preprocess=False`) and not as gradio's reading of the
    file, so that `load_image` judges every picture; gradio has checked that the path is an upload.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.conditions = list(session.controller.adapters)

    def show_maps(self, upload: dict[str, Any] | None, picked: list[str]) -> list[Any]:
        """The gallery of maps, then each condition's strength slider, which is seen when it is picked."""
        try:
            maps = self._maps(upload, picked) if upload else {}
        except UserError as error:
            gr.Warning(str(error))
            maps = {}
        sliders = [gr.update(visible=name in picked) for name in self.conditions]
        return [[(picture, _word(name)) for name, picture in maps.items()], *sliders]

    def generate(
        self,
        upload: dict[str, Any] | None,
        picked: list[str],
        prompt: str,
        seed: float | None,
        steps: float | None,
        guidance: float | None,
        *strengths: float,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  (how gradio hands it over)
    ) -> Any:
        """The pictures without and with control, from the same noise; nothing new after a user's error."""
        try:
            strength = dict(zip(self.conditions, strengths, strict=True))
            return self._draw(
                upload, {n: strength[n] for n in picked}, prompt, (seed, steps, guidance), progress
            )
        except UserError as error:
            gr.Warning(str(error))
            return gr.skip()

    def _draw(
        self,
        upload: dict[str, Any] | None,
        strength: Mapping[str, float],
        prompt: str,
        numbers: tuple[float | None, float | None, float | None],
        progress: gr.Progress,
    ) -> tuple[Image.Image, Image.Image]:
        if upload is None:
            raise UserError("There is no picture yet; upload one or click an example.")
        if not strength:
            raise UserError("Nothing is kept of the picture; tick at least one box.")
        check_prompt(prompt)
        seed, steps, guidance = numbers
        if seed is None or steps is None or guidance is None:
            raise UserError("A number in the settings is empty; fill it in.")
        if not 0 <= seed <= MAX_SEED:
            raise UserError(f"The seed must be from 0 to {MAX_SEED}, got {seed:g}.")
        self.session.check_prompt_length(prompt)
        maps = self._maps(upload, list(strength))
        sampling = self.session.sampling(steps=int(steps), guidance=guidance)

        def report(before: int, title: str, step: int, total: int) -> None:
            progress((before + step, 2 * total), desc=title, unit="steps")

        draw = partial(self.session.generate, [prompt], [int(seed)], sampling)
        (without,) = draw(on_step=partial(report, 0, "Without control"))
        (controlled,) = draw(
            maps=maps, strength=strength, on_step=partial(report, sampling.steps, "With control")
        )
        return without, controlled

    def _maps(self, upload: dict[str, Any], picked: Sequence[str]) -> dict[str, Image.Image]:
        path = upload["path"]
        try:
            picture = load_image(path)
        except UserError as error:  # the user knows the file by its own name
            raise UserError(str(error).replace(path, upload.get("orig_name") or "The picture")) from error
        fitted = fit(picture, self.session.defaults.width, self.session.defaults.height)
        adapters = self.session.controller.adapters
        return {
            name: adapters[name].make_condition().extract(fitted)
            for name in self.conditions
            if name in picked
        }


def build(session: Session) -> gr.Blocks:
    """The page around a model with its adapters; the adapters' conditions are what can be picked."""
    demo = Demo(session)
    with gr.Blocks(title="LoCO diffusion", analytics_enabled=False) as page:
        gr.Markdown(INTRO)
        with gr.Row():
            with gr.Column(scale=4, min_width=320):
                picture = gr.Image(
                    label="Picture", sources=["upload"], buttons=[], height=220, elem_id="picture"
                )
                samples = examples()
                shelf = gr.Dataset(
                    components=[gr.Image(visible=False)],
                    samples=[[image] for image, _ in samples],
                    type="index",
                    label="Examples",
                    elem_id="examples",
                )
                picked, strengths = _condition_inputs(demo.conditions)
                prompt = gr.Textbox(label="What you want to see", lines=2, placeholder=PLACEHOLDER)
                button = gr.Button("Generate", variant="primary", size="lg")
                numbers = _settings(session)
            with gr.Column(scale=5, min_width=320):
                compare = gr.ImageSlider(
                    label="Result", interactive=False, max_height=560, format="png", elem_id="compare"
                )
                maps = gr.Gallery(
                    label="Kept of the picture",
                    columns=3,
                    object_fit="contain",
                    interactive=False,
                    buttons=["download", "fullscreen"],
                    format="png",
                    elem_id="maps",
                )
        gr.on(
            [picture.change, picked.change],
            demo.show_maps,
            [picture, picked],
            [maps, *strengths],
            preprocess=False,
            show_progress="minimal",
            show_progress_on=maps,
            api_visibility="private",
        )
        shelf.click(lambda index: samples[index], shelf, [picture, prompt], api_visibility="private")
        button.click(
            demo.generate,
            [picture, picked, prompt, *numbers, *strengths],
            compare,
            preprocess=False,
            concurrency_limit=1,
            api_visibility="private",
        )
    return page


def examples() -> list[tuple[Image.Image, str]]:
    """Pictures with prompts: the packaged example and held-out scenes."""
    scenes = [sample_scene(seed) for seed in TEST_SEEDS[:SCENES]]
    drawn = [to_pil(image) for image in render(scenes, 256).image]
    packaged = (load_image(EXAMPLE_PICTURE), EXAMPLE_PROMPT.read_text(encoding="utf-8").strip())
    return [packaged, *((image, scene.caption) for image, scene in zip(drawn, scenes, strict=True))]


def _condition_inputs(conditions: Sequence[str]) -> tuple[gr.CheckboxGroup, list[gr.Slider]]:
    first = conditions[:1]
    picked = gr.CheckboxGroup([(_word(n), n) for n in conditions], value=first, label="Keep of the picture")
    strengths = [
        gr.Slider(0, MAX_STRENGTH, 1, step=0.05, label=_strength_label(name), visible=name in first)
        for name in conditions
    ]
    return picked, strengths


def _settings(session: Session) -> tuple[gr.Number, gr.Slider, gr.Slider]:
    with gr.Accordion("Settings", open=False):
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED)
        another = gr.Button("Another seed", size="sm")
        steps = gr.Slider(1, MAX_STEPS, session.defaults.steps, step=1, label="Steps")
        guidance = gr.Slider(
            0, MAX_GUIDANCE, session.defaults.guidance, step=0.1, label="Guidance by the prompt"
        )
    another.click(lambda: random.randint(0, MAX_SEED), None, seed, api_visibility="private")
    return seed, steps, guidance


def _word(condition: str) -> str:
    return WORDS.get(condition, condition)


def _strength_label(condition: str) -> str:
    """With the name that the command line and the papers use, where it is another word."""
    word = _word(condition)
    return f"Strength: {word}" if word.lower() == condition else f"Strength: {word} ({condition})"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[
        str | None,
        typer.Option(metavar="DIR_OR_HUB_ID", help="Base model; default: the packaged UNet."),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CONDITION=DIR_OR_HUB_ID", help="May be repeated; default: the packaged adapters."
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to serve at; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 7860,
) -> None:
    """Serve the demo: redraw a picture under conditions, with and without control."""
    adapters = _adapters(model, adapter or [])
    print("Loading the model ...", flush=True)
    quiet_libraries()
    session = open_session(model)
    session.load_adapters(adapters)
    _serve(build(session), host, port)


def _adapters(model: str | None, given: Sequence[str]) -> dict[str, str | None]:
    """What `Session.load_adapters` takes; packaged bases have packaged adapters where none is given."""
    sources: dict[str, str | None] = dict.fromkeys(condition_names()) if is_packaged(model) else {}
    sources |= parse_pairs("--adapter", given)
    if not sources:
        raise UserError(f"The packaged adapters do not fit {model}; add --adapter CONDITION=DIR_OR_HUB_ID.")
    for condition in sources:
        get_condition(condition)
    return sources


def _serve(page: gr.Blocks, host: str, port: int) -> None:
    theme = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    try:
        page.launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            ssr_mode=False,
            footer_links=[],
            theme=theme,
            css=STYLE,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise UserError(f"The demo cannot be served at {host}:{port}; choose another --port.") from error
    print(f"The demo is ready at {page.local_url} (end it with Ctrl-C).", flush=True)
    page.block_thread()


if __name__ == "__main__":
    raise SystemExit(run_app(app, "demo.py"))
