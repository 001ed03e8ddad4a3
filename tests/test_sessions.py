"""Sessions and the command line with every family, from folders of tiny pipelines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_pipelines import TINY, Tiny
from tiny_pipelines.controlled import randomise

from loco_diffusion import Controller, LoCOConfig
from loco_diffusion.cli import main
from loco_diffusion.control import EncoderConfig
from loco_diffusion.errors import UserError
from loco_diffusion.generation import Sampling, open_session
from loco_diffusion.images import to_pil
from loco_diffusion.training.config import make_config
from loco_diffusion.training.trainer import train


@pytest.fixture(scope="module", params=TINY.values(), ids=TINY)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return request.param


@pytest.fixture(scope="module")
def folder(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline in diffusers' format, and an adapter for canny in a folder beside it."""
    folder = tmp_path_factory.mktemp(tiny.name) / "base"
    pipe = tiny.build()
    pipe.save_pretrained(folder)
    controller = Controller(pipe)
    controller.add_adapter("canny", LoCOConfig(r=2, num_rotations=2), encoder=EncoderConfig(hidden_size=8))
    randomise(controller, "canny")
    controller.save_adapter(folder.parent / "canny", "canny")
    return folder


@pytest.fixture(scope="module")
def session(tiny: Tiny, folder: Path) -> Any:
    session = open_session(folder)
    tiny.settle(session.pipe)
    return session


def test_a_session_draws_what_the_pipeline_draws(tiny: Tiny, session: Any) -> None:
    defaults = session.defaults
    assert defaults.width % session.token_pixels == defaults.height % session.token_pixels == 0
    assert defaults.steps >= 1 and defaults.guidance >= 1
    free = session.generate(["a red cube"], [0], Sampling(tiny.side, 2 * tiny.side, 2, 1.0))[0]
    assert free.size == (tiny.side, 2 * tiny.side)
    length = {"max_sequence_length": session.controller.family.text_length(session.pipe)}
    read = {name: length[name] for name in tiny.call.keys() & length.keys()}  # as much of the prompt
    expected = tiny.draw(session.pipe, height=2 * tiny.side, output_type="pt", **read)
    assert free.tobytes() == to_pil(expected[0]).tobytes()
    guided = session.generate(["a red cube", ""], [0, 1], Sampling(tiny.side, 2 * tiny.side, 2, 3.0))
    assert guided[0].tobytes() != free.tobytes() and guided[0].tobytes() != guided[1].tobytes()


def test_pictures_through_the_vae(tiny: Tiny, session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [Image.linear_gradient("L").resize((2 * tiny.side, tiny.side)).convert("RGB")] * 2
    first, second = session.reconstruct(pictures)
    assert first.size == pictures[0].size and first.tobytes() == second.tobytes()
    family, pipe = session.controller.family, session.pipe
    step, results = pipe.scheduler.step, []
    monkeypatch.setattr(pipe.scheduler, "step", lambda *a, **k: results.append(step(*a, **k)) or results[-1])
    drawn = tiny.draw(pipe, height=2 * tiny.side, output_type="pt")
    latents = results[-1][0]
    if latents.ndim == 3:  # packed
        rows, columns = (side // session.token_pixels for side in drawn.shape[-2:])
        latents = family.unpack(latents, rows, columns)
    decoded = family.decode_latents(pipe, latents).clamp(0, 1)
    torch.testing.assert_close(decoded, drawn.float(), atol=0.02, rtol=0)  # bfloat16


def test_a_prompt_is_read_to_its_end_or_refused(tiny: Tiny, session: Any) -> None:
    session.check_prompt_length("a cube")
    with pytest.raises(UserError, match="shorten it"):
        session.check_prompt_length("cube " * session.controller.family.text_length(session.pipe))


def test_the_command_line_draws(
    tiny: Tiny, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    photo, out = tmp_path / "photo.png", tmp_path / "out.png"
    Image.radial_gradient("L").point(lambda value: 255 * (value > 90)).convert("RGB").save(photo)
    arguments = ["generate", "--prompt", "a red cube", "--model", str(folder), "--steps", "2"]
    arguments += ["--width", str(tiny.side), "--height", str(tiny.side)]
    assert main([*arguments, "--out", str(out)]) == 0
    free = Image.open(out).tobytes()
    control = ["--control", f"canny={photo}", "--adapter", f"canny={folder.parent / 'canny'}"]
    assert main([*arguments, *control, "--out", str(out), "--overwrite"]) == 0
    assert Image.open(out).size == (tiny.side, tiny.side) and Image.open(out).tobytes() != free
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("fields", [{}, {"tokens": {}}], ids=["encoder", "tokens"])
def test_every_family_is_trained(tiny: Tiny, folder: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    config = make_config(
        {
            "condition": "canny",
            "output": str(tmp_path / "run"),
            "base": str(folder),
            "data": {"source": "scenes", "count": 2, "size": tiny.side},
            "adapter": {"options": {"r": 1, "num_rotations": 2}},
            "steps": 2,
            "batch_size": 2,
            "log_every": 1,
            "validation": {"pictures": 1, "steps": 1},
            **fields,
        }
    )
    trained = Controller(tiny.build())
    trained.load_adapter(train(config))
    lines = map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines())
    first, last = (line for line in lines if "loss" in line)
    assert 0 < first["adapter_changed"] < last["adapter_changed"]
