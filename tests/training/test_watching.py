"""What people see of a run: pictures, scores, angles, trackers, the report page, and the adapter's model card."""

from __future__ import annotations

import copy
import json
import os
import re
import runpy
import shutil
import signal
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from conftest import small_config
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from loco_diffusion.adapters.inspection import inspect
from loco_diffusion.conditions import Canny
from loco_diffusion.control import adapter_folder
from loco_diffusion.data.render import render
from loco_diffusion.data.scenes import VALIDATION_SEEDS, sample_scene
from loco_diffusion.embedded import packaged_adapter
from loco_diffusion.errors import UserError
from loco_diffusion.generation import Sampling, Session, open_session
from loco_diffusion.images import to_pil
from loco_diffusion.scoring import TaskScores
from loco_diffusion.training.card import snippet
from loco_diffusion.training.config import TrainingConfig, make_config
from loco_diffusion.training.held_out import split
from loco_diffusion.training.journal import read_log
from loco_diffusion.training.output import OutputFolder
from loco_diffusion.training.report import training_seconds, write_report
from loco_diffusion.training.settings import ValidationSettings
from loco_diffusion.training.trainer import train


def _config(flux_folder: Path, output: Path, **fields: Any) -> TrainingConfig:
    defaults = {
        "lr": 0.1,
        "encoder_lr": 0.1,
        "decay": 0.5,
        "log_every": 1,
        "validation": {"pictures": 3, "every": 2, "steps": 2, "guidance": 1.5, "seed": 5},
    }
    return small_config(flux_folder, output, **{**defaults, **fields})


@pytest.fixture(scope="module")
def run(flux_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingConfig:
    """A finished run, watched by three pictures and TensorBoard; read only."""
    config = _config(flux_folder, tmp_path_factory.mktemp("watched") / "run", log_with=["tensorboard"])
    train(config)
    return config


def _events(config: TrainingConfig, event: str) -> list[dict[str, Any]]:
    return [r for r in read_log(Path(config.output) / "log.jsonl") if r.get("event") == event]


def test_validation_changes_nothing_that_is_learnt(
    run: TrainingConfig, flux_folder: Path, tmp_path: Path
) -> None:
    blind = _config(flux_folder, tmp_path / "blind", validation={"pictures": 0, "every": 99})
    train(blind)
    for file in ("adapter_model.safetensors", "control_encoder.safetensors"):
        watched, unwatched = (load_file(Path(c.output) / "adapter" / file) for c in (run, blind))
        assert all(torch.equal(watched[name], unwatched[name]) for name in watched)
    assert _events(blind, "validation")[0]["scores"] == {} and not (tmp_path / "blind" / "samples").exists()
    assert (tmp_path / "blind" / "report.html").is_file()


def test_a_signal_while_pictures_are_drawn_loses_nothing(
    run: TrainingConfig, flux_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = _config(flux_folder, tmp_path / "stopped")
    draw = Session.generate

    def interrupted(self: Session, *arguments: Any, **options: Any) -> list[Image.Image]:
        if options["maps"]:  # those without control are drawn before the first step
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(self, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Session, "generate", interrupted)
        train(stopped)
    output = Path(stopped.output)
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-00000002"]
    assert not (output / "samples").exists()
    train(stopped, resume="latest")
    for file in ("adapter_model.safetensors", "control_encoder.safetensors"):
        uninterrupted, resumed = (load_file(Path(c.output) / "adapter" / file) for c in (run, stopped))
        assert all(torch.equal(uninterrupted[name], resumed[name]) for name in uninterrupted)


def test_scores_are_those_of_the_saved_adapter(run: TrainingConfig, flux_folder: Path) -> None:
    scenes = [sample_scene(seed) for seed in VALIDATION_SEEDS[:3]]
    originals = [to_pil(picture) for picture in render(scenes, 32).image]
    session = open_session(flux_folder)
    session.pipe.to(torch.float32)
    session.load_adapters({"canny": Path(run.output) / "adapter"})
    from loco_diffusion.conditions import get_condition

    maps = {"canny": [get_condition("canny").extract(original) for original in originals]}
    sampling = Sampling(32, 32, steps=2, guidance=1.5)
    captions = [scene.caption for scene in scenes]
    reference = _events(run, "reference")[0]
    for wanted, found in (
        (maps, _events(run, "validation")[-1]["scores"]),
        (None, reference["without_control"]),
    ):
        scores = TaskScores("canny")
        scores.update(session.generate(captions, [5, 6, 7], sampling, maps=wanted), originals)
        assert found == pytest.approx(scores.compute(), abs=0.02)  # open_session rounds weights to bfloat16
    assert reference["vae"]["psnr"] > 0
    grid = Image.open(Path(run.output) / "samples" / "step-00000004.png")
    assert grid.width > 4 * 256 and grid.height > 3 * 256
    assert len(list((Path(run.output) / "samples").iterdir())) == 2


def test_angles_are_those_of_the_saved_adapter(run: TrainingConfig) -> None:
    first, last = _events(run, "validation")
    assert (first["step"], last["step"]) == (2, 4)
    content = adapter_folder.read(Path(run.output) / "adapter")
    inspection = inspect(content.method, content.adapter)
    assert inspection is not None
    assert last["angle_max"] == pytest.approx(max(max(angles) for angles in inspection.spectra.values()))
    assert last["angle_max"] >= last["angle_mean"] > first["angle_mean"] > 0
    assert last["orthogonality_error"] < 1e-6


def test_start_and_reports_tell_norms(run: TrainingConfig) -> None:
    start = _events(run, "start")[0]
    assert start["norms"]["encoder"] > 0 and start["base"] > start["trainable"]["adapter"] > 0
    reports = [r for r in read_log(Path(run.output) / "log.jsonl") if "loss" in r]
    assert [r["step"] for r in reports] == [1, 2, 3, 4]
    assert 0 < reports[0]["adapter_changed"] < reports[-1]["adapter_changed"]
    assert training_seconds(run, reports) == pytest.approx(sum(2 / r["images_per_second"] for r in reports))


def test_tensorboard_shows_numbers_and_pictures(run: TrainingConfig) -> None:
    folder = next((Path(run.output) / "trackers").glob("*/events*")).parent
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0}).Reload()
    losses = {event.step: event.value for event in events.Scalars("train/loss")}
    logged = {r["step"]: r["loss"] for r in read_log(Path(run.output) / "log.jsonl") if "loss" in r}
    assert losses == pytest.approx(logged)
    assert [event.step for event in events.Scalars("validation/f1")] == [2, 4]
    shown = events.Images("validation/pictures")[-1]
    assert (shown.width, shown.height) == Image.open(Path(run.output) / "samples" / "step-00000004.png").size


class _Sources(HTMLParser):
    """Everything that a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found += [str(value) for name, value in attributes if name in ("src", "href")]


def test_the_report_page_is_whole_and_loads_nothing(run: TrainingConfig) -> None:
    page = (Path(run.output) / "report.html").read_text()
    sources = _Sources()
    sources.feed(page)
    kinds = [source.partition(";")[0] for source in sources.found]
    assert kinds.count("data:image/webp") == 2 and kinds.count("data:image/svg+xml") == 11
    assert set(kinds) == {"data:image/webp", "data:image/svg+xml"}
    assert "edge F1" in page and "without control" in page and "num_rotations: 2" in page


def test_what_configurations_say_is_escaped(run: TrainingConfig, tmp_path: Path) -> None:
    odd = run.model_copy(update={"base": "<script>alert(1)</script>"})
    records = read_log(Path(run.output) / "log.jsonl")
    page = write_report(OutputFolder(tmp_path), odd, records[:2]).read_text()  # before the first step
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)" in page


def test_the_card_tells_all_and_its_program_runs(
    run: TrainingConfig, flux_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(run.output) / "adapter"
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "peft" and {"canny", "loco", "loco-diffusion"} <= set(card.data.tags)
    score = _events(run, "validation")[-1]["scores"]["f1"]
    assert f"| edge F1 | higher | {score:.4g} |" in card.text
    grid = Path(run.output) / "samples" / "step-00000004.png"
    assert "(samples.png)" in card.text and (folder / "samples.png").read_bytes() == grid.read_bytes()
    kept = yaml.safe_load((folder / "training_config.yaml").read_text())
    assert make_config({**kept, "base": run.base, "output": run.output}) == run
    for file in folder.iterdir():
        assert str(flux_folder.parent).encode() not in file.read_bytes()

    # The program, where its names mean something.
    (tmp_path / "path" / "to" / "this").mkdir(parents=True)
    (tmp_path / flux_folder.name).symlink_to(flux_folder)
    (tmp_path / "path" / "to" / "this" / "folder").symlink_to(folder)
    Image.new("RGB", (50, 40), (200, 30, 30)).save(tmp_path / "photo.png")
    program = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert len(program) == 1
    (tmp_path / "program.py").write_text(program[0])
    monkeypatch.chdir(tmp_path)
    runpy.run_path("program.py")
    assert Image.open("drawn.png").size == (32, 32)


def test_the_program_for_a_packaged_base_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config({"condition": "canny", "output": "x", "steps": 1, "data": {"source": "scenes"}})
    base = adapter_folder.read(packaged_adapter("canny", config.base)).control.base
    program = snippet(config, base, None)
    (tmp_path / "path" / "to" / "this").mkdir(parents=True)
    (tmp_path / "path" / "to" / "this" / "folder").symlink_to(packaged_adapter("canny", config.base))
    Image.new("RGB", (50, 40), (200, 30, 30)).save(tmp_path / "photo.png")
    (tmp_path / "program.py").write_text(program)
    monkeypatch.chdir(tmp_path)
    runpy.run_path("program.py")
    assert Image.open("drawn.png").size == (128, 128)


def test_pictures_are_held_out_of_data_that_is_not_drawn(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = []
    for number in range(40):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"caption {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    fields = {"condition": "canny", "output": "x", "steps": 1}
    data = {"source": "folder", "path": str(folder), "size": 32}
    from loco_diffusion.training.build import build_source

    def parts(count: int, **validation: Any) -> tuple[list[str], list[str]]:
        (folder / "metadata.jsonl").write_text("\n".join(lines[:count]))
        config = make_config({**fields, "data": data, "validation": validation})
        sources = split(config, build_source(config.data))
        return tuple([s[i].caption for i in range(len(s))] for s in sources)  # type: ignore[return-value]

    everything = [f"caption {number}" for number in range(40)]
    assert parts(40, pictures=3) == (everything[3:], everything[:3])
    assert parts(40, pictures=8) == (everything[4:], everything[:4])  # a tenth at most
    assert parts(5, pictures=3) == (everything[:5], everything[:5])  # too few to hold any out
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (other / "metadata.jsonl").write_text(lines[7])
    assert parts(40, pictures=3, path=str(other)) == (everything, ["caption 7"])


def test_other_validation_settings_bring_new_references(flux_folder: Path, tmp_path: Path) -> None:
    short = _config(
        flux_folder, tmp_path / "run", steps=2, lr_scheduler="constant", validation={"pictures": 0}
    )
    train(short)
    assert "vae" not in _events(short, "reference")[0]
    shutil.rmtree(tmp_path / "run" / "adapter")
    watched = short.model_copy(update={"steps": 3, "validation": ValidationSettings(pictures=2, steps=1)})
    train(watched, resume="latest")
    first, second = _events(watched, "reference")
    assert "vae" not in first and second["without_control"] and second["vae"]
    assert _events(watched, "validation")[-1]["pictures"] == 2
    page = (tmp_path / "run" / "report.html").read_text()
    assert "without control" in page


def test_options_of_the_condition_go_with_the_adapter(flux_folder: Path, tmp_path: Path) -> None:
    config = _config(flux_folder, tmp_path / "run", condition_options={"low": 20, "high": 40}, steps=1)
    adapter = train(config)
    session = open_session(flux_folder)
    session.load_adapters({"canny": adapter})
    assert session.controller.adapters["canny"].make_condition() == Canny(low=20, high=40)
    picture = to_pil(render([sample_scene(VALIDATION_SEEDS[0])], 32).image[0])
    scores = TaskScores(config.make_condition())
    scores.update([picture], [picture])
    assert scores.compute()["f1"] == 1


def test_a_tracker_that_does_not_start_is_one_sentence(
    flux_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("api_key not configured\n...")

    monkeypatch.setattr(Accelerator, "init_trackers", fail)
    config = _config(flux_folder, tmp_path / "run", log_with=["tensorboard"])
    with pytest.raises(
        UserError, match=r"log_with tensorboard cannot be started \(api_key not configured\); log"
    ):
        train(config)


def test_trackers_that_are_not_there_are_refused(flux_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no tracker 'paper'; choose from"):
        _config(flux_folder, tmp_path / "run", log_with=["paper"])
    config = _config(flux_folder, tmp_path / "run", log_with=["dvclive"])
    with pytest.raises(
        UserError, match="log_with names dvclive, which is not installed; pip install dvclive"
    ):
        train(config)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_can_be_named_and_steps_extended(
    run: TrainingConfig, flux_folder: Path, tmp_path: Path
) -> None:
    (checkpoint,) = (Path(run.output) / "checkpoints").iterdir()
    with pytest.raises(UserError, match=r"another configuration \(steps is 4 there and 6 here\); undo"):
        train(_config(flux_folder, tmp_path / "more", steps=6), resume=checkpoint)
    with pytest.raises(UserError, match="There is no checkpoint .*nowhere; give a folder like"):
        train(_config(flux_folder, tmp_path / "more"), resume=tmp_path / "nowhere")

    short = _config(flux_folder, tmp_path / "short", steps=2, decay=0.0)
    train(short)
    (checkpoint,) = (tmp_path / "short" / "checkpoints").iterdir()
    once, moved = (
        _config(flux_folder, tmp_path / n, steps=4, decay=0.0, log_every=3) for n in ("once", "moved")
    )
    train(once)
    train(moved, resume=checkpoint)  # another output, more steps, another log_every
    files = [load_file(Path(c.output) / "adapter" / "adapter_model.safetensors") for c in (once, moved)]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    start, *_ = read_log(tmp_path / "moved" / "log.jsonl")
    assert start["event"] == "start"
    with pytest.raises(UserError, match="holds checkpoints that do not lead on from .*step-00000002"):
        train(moved, resume=checkpoint)


def test_a_resumed_tracker_has_every_step_once(
    run: TrainingConfig, flux_folder: Path, tmp_path: Path
) -> None:
    config = _config(
        flux_folder, tmp_path / "run", log_with=["tensorboard"], checkpoint_every=1, keep_checkpoints=9
    )
    train(config)
    for step in (3, 4):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step:08d}")
    shutil.rmtree(tmp_path / "run" / "adapter")
    train(copy.deepcopy(config), resume="latest")
    folder = next((tmp_path / "run" / "trackers").glob("*/events*")).parent
    events = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    ids = {record["run"] for record in _events(config, "start")}
    assert len(ids) == 1
