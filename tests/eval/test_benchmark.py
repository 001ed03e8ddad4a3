"""The benchmark on two pictures and two steps: what it writes, and that its numbers are the scorers'."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from loco_diffusion import LoCOConfig
from loco_diffusion.control import EncoderConfig
from loco_diffusion.data.render import render
from loco_diffusion.data.scenes import TEST_SEEDS, sample_scene
from loco_diffusion.generation import open_session
from loco_diffusion.images import to_pil
from loco_diffusion.scoring import SCORES, TaskScores

EVAL = Path(__file__).parents[2] / "eval"
sys.path.insert(0, str(EVAL))
import benchmark  # noqa: E402
from report import write_table  # noqa: E402
from settings import Experiment, Protocol, names, read  # noqa: E402

TASKS = list(SCORES)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one untrained adapter a task, for the packaged DiT."""
    folder = tmp_path_factory.mktemp("adapters") / "mine"
    controller = open_session("packaged-dit").controller
    for task in TASKS:
        controller.add_adapter(task, LoCOConfig(r=1, num_rotations=1), encoder=EncoderConfig(hidden_size=8))
        controller.save_adapter(folder / task, task)
    return folder


@pytest.fixture(scope="module")
def protocol(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The protocol `scenes`, cut to two pictures in two batches and two steps."""
    content = yaml.safe_load((EVAL / "protocols" / "scenes.yaml").read_text())
    path = tmp_path_factory.mktemp("protocol") / "tiny.yaml"
    path.write_text(yaml.safe_dump({**content, "pictures": 2, "steps": 2, "batch_size": 1}))
    return path


@pytest.fixture(scope="module")
def results(protocol: Path, adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of all experiments."""
    out = tmp_path_factory.mktemp("results")
    arguments = ["--protocol", protocol, "--experiment", "all", "--adapters", adapters, "--out", out]
    assert benchmark.main([str(argument) for argument in arguments]) == 0
    return out / "tiny"


def _metrics(path: Path) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads(path.read_text())["train_info"]["metrics"]
    return metrics


def test_every_experiment_leaves_one_result(results: Path) -> None:
    files = {"loco--mine.json", "none--no-control.json", "none--vae-round-trip.json", "README.md"}
    assert {path.name for path in results.iterdir()} == files
    for path in results.glob("*.json"):
        result = json.loads(path.read_text())
        assert list(result) == ["run_info", "train_info", "meta_info"]
        assert result["run_info"]["settings"]["pictures"] == 2
        assert {task: list(scores) for task, scores in result["train_info"]["metrics"].items()} == {
            task: [score.key for score in SCORES[task]] for task in TASKS
        }
        assert "/" not in json.dumps(result["train_info"]["adapters"])  # no place of this machine
    loco = json.loads((results / "loco--mine.json").read_text())
    adapter = loco["train_info"]["adapters"]["canny"]
    assert adapter["peft_config"]["peft_type"] == "LOCO" and adapter["num_adapter_params"] > 0
    environments = [json.loads(path.read_text())["meta_info"] for path in results.glob("*.json")]
    assert environments[0] == environments[1] == environments[2]


def test_untrained_adapters_score_as_no_control(results: Path) -> None:
    free, loco = (_metrics(results / f"{name}.json") for name in ("none--no-control", "loco--mine"))
    for task in TASKS:
        assert loco[task] == pytest.approx(free[task], rel=1e-2), task  # an edge pixel may flip


def test_the_numbers_are_those_of_the_pictures(results: Path, protocol: Path) -> None:
    settings = read(Protocol, "protocols", str(protocol))
    scenes = [sample_scene(seed) for seed in TEST_SEEDS[:2]]
    originals = [to_pil(picture) for picture in render(scenes, 128).image]
    session = open_session("packaged-dit")
    sampling = session.sampling(128, 128, settings.steps, settings.guidance)
    pictures = session.generate([scene.caption for scene in scenes], [42, 43], sampling)
    for name, drawn in (("no-control", pictures), ("vae-round-trip", session.reconstruct(originals))):
        metrics = _metrics(results / f"none--{name}.json")
        for task in TASKS:
            scores = TaskScores(task)
            scores.update(drawn, originals)
            assert metrics[task] == pytest.approx(scores.compute(), rel=1e-2, abs=1e-3), (name, task)


def test_originals_score_perfectly() -> None:
    originals = [to_pil(picture) for picture in render([sample_scene(7)], 64).image]
    for task in TASKS:
        scores = TaskScores(task)
        scores.update(originals, originals)
        computed = scores.compute()
        for score in SCORES[task]:
            if score.key != "psnr":  # infinite
                assert computed[score.key] == pytest.approx(float(score.higher_is_better), abs=1e-5)


def test_the_table_compares_with_no_control_and_the_bars(
    results: Path, protocol: Path, tmp_path: Path
) -> None:
    settings = read(Protocol, "protocols", str(protocol))
    for path in results.glob("*.json"):
        result = json.loads(path.read_text())
        factor = 0.4 if path.name.startswith("loco") else 1.0
        for task in TASKS:
            scores = dict.fromkeys(result["train_info"]["metrics"][task], 100.0)
            result["train_info"]["metrics"][task] = {key: factor * value for key, value in scores.items()}
        (tmp_path / path.name).write_text(json.dumps(result))
    trial = json.loads((results / "loco--mine.json").read_text())
    trial["run_info"]["experiment_name"] = "other-base"
    trial["meta_info"]["model_info"]["sha256"] = "0"
    (tmp_path / "loco--other-base.json").write_text(json.dumps(trial))
    text = write_table(tmp_path, settings).read_text()
    assert write_table(tmp_path, settings).read_text() == text
    assert text.count("other-base") == 1 and text.endswith("another base: other-base.\n")
    assert text.count("| mine |") == 1 + 1 + 6 + 1 + 1  # scores, ratios, bars, similarity, runs
    lines = text.split("## Bars")[1].split("## ")[0].splitlines()
    bars = [line.split("|")[-2].strip() for line in lines if "| mine |" in line]
    low, lower, high = "missed: 47 % too low", "missed: 56 % too low", "missed: 14 % too high"
    assert bars == [low, lower, "met", high, "met", "met"]


def test_a_trial_stays_out_of_the_table(protocol: Path, tmp_path: Path) -> None:
    arguments = ["--protocol", protocol, "--experiment", "vae-round-trip", "--limit", 1, "--out", tmp_path]
    assert benchmark.main([str(argument) for argument in arguments]) == 0
    assert (tmp_path / "tiny" / "none--vae-round-trip-first-1.json").is_file()
    table = (tmp_path / "tiny" / "README.md").read_text()
    assert "| vae-round-trip" not in table and "vae-round-trip-first-1." in table


def test_what_comes_with_the_benchmark_is_valid() -> None:
    assert {"no-control", "loco", "vae-round-trip"} <= set(names("experiments"))
    for name in names("experiments"):
        assert read(Experiment, "experiments", name).name == name
    for name in names("protocols"):
        protocol = read(Protocol, "protocols", name)
        assert protocol.pictures == 256
        assert {bar.task for bar in protocol.bars} == set(protocol.tasks) == set(TASKS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--protocol", "paper5"], "choose from scenes"),
        (["--experiment", "lora"], "choose from"),
        (["--experiment", "loco", "--adapters", "missing"], "no adapter"),
        (["--table", "--out", "missing"], "run an experiment first"),
        (["--protocol", "seen.yaml"], "seeds must be from"),
    ],
)
def test_bad_input(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    content = yaml.safe_load((EVAL / "protocols" / "scenes.yaml").read_text())
    Path("seen.yaml").write_text(yaml.safe_dump({**content, "first_seed": 5}))
    assert benchmark.main(["--out", "results", *arguments]) == 2
    captured = capfd.readouterr()
    assert captured.err.count("\n") == 1 and words in captured.err
    assert not list(tmp_path.rglob("*.json"))
