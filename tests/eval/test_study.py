"""A study of two methods at toy size: its runs, what it does not repeat, its table."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from loco_diffusion.control.layers import check_config

EVAL = Path(__file__).parents[2] / "eval"
sys.path.insert(0, str(EVAL))
import study  # noqa: E402
import study_profile  # noqa: E402
from settings import Study, read  # noqa: E402
from study_report import best_rate, write_study  # noqa: E402

TOY = {
    "tasks": ["canny"],
    "scenes": 2,
    "train_steps": 1,
    "batch_size": 1,
    "learning_rates": [1e-3, 1e-2],
    "seeds": [0, 1],
    "validation_pictures": 1,
    "test_pictures": 1,
    "sampling_steps": 1,
    "reference": "lora",
    "methods": {"lora": {"method": "lora"}, "loco both": {"method": "loco", "options": {"side": "both"}}},
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("study") / "toy.yaml"
    content = yaml.safe_load((EVAL / "studies" / "methods.yaml").read_text())
    path.write_text(yaml.safe_dump({**content, **TOY}))
    return path


@pytest.fixture(scope="module")
def out(toy: Path) -> Path:
    """The folder of the toy study's results."""
    arguments = ["--study", toy, "--runs", toy.parent / "runs", "--out", toy.parent / "results"]
    assert study.main([str(argument) for argument in arguments]) == 0
    return toy.parent / "results" / "toy"


def study_of(toy: Path) -> Study:
    return read(Study, "studies", str(toy))


def test_every_method_is_tuned_and_then_repeated(toy: Path, out: Path) -> None:
    results = [json.loads(path.read_text()) for path in out.glob("*.json")]
    assert len(results) == 2 * 3
    for method in TOY["methods"]:
        best = best_rate(study_of(toy), out, method)
        taken = [(r["run"]["seed"], r["run"]["lr"]) for r in results if r["run"]["method"] == method]
        assert sorted(taken) == sorted([(0, 1e-3), (0, 1e-2), (1, best)])
    assert all(0 <= result["test"]["f1"] <= 1 for result in results)


def test_runs_with_a_result_are_not_repeated(toy: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "train", None)
    arguments = ["--study", toy, "--runs", toy.parent / "runs", "--out", toy.parent / "results"]
    assert study.main([str(argument) for argument in arguments]) == 0


def test_results_of_other_settings_are_refused(
    toy: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = toy.parent / "other" / "toy.yaml"
    changed.parent.mkdir()
    content = yaml.safe_load(toy.read_text())
    changed.write_text(yaml.safe_dump({**content, "train_steps": 2, "test_pictures": 2}))
    assert study.main(["--study", str(changed), "--table", "--out", str(out.parent)]) == 2
    message = "was made with another steps and test_pictures than the study now has; delete"
    assert message in capsys.readouterr().err


def test_what_is_no_result_is_refused(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "canny--lora--lr1--seed0.json").write_text('{"run": {}}')
    assert study.main(["--study", str(toy), "--table", "--out", str(tmp_path)]) == 2
    assert "is no result of this study" in capsys.readouterr().err


def test_methods_that_diverge_are_results(toy: Path, out: Path, tmp_path: Path) -> None:
    for path in out.glob("*.json"):
        result = json.loads(path.read_text())
        if result["run"]["method"] == "lora" or result["run"]["seed"] == 1:
            result = {k: v for k, v in result.items() if k not in ("test", "validation", "parameters")}
            result["diverged"] = "Training diverged before step 1."
        (tmp_path / path.name).write_text(json.dumps(result))
    assert best_rate(study_of(toy), tmp_path, "lora") is None
    table = write_study(tmp_path, study_of(toy)).read_text()
    assert "| lora |" not in table and "| loco both |" in table
    assert table.count("lora (lr") == 3 and table.count("loco both (lr") == 1


def test_a_deleted_result_is_made_again(toy: Path, out: Path) -> None:
    path = sorted(out.glob("*.json"))[0]
    before = json.loads(path.read_text())
    path.unlink()
    arguments = ["--study", toy, "--runs", toy.parent / "runs", "--out", toy.parent / "results"]
    assert study.main([str(argument) for argument in arguments]) == 0
    assert json.loads(path.read_text())["test"] == before["test"]


def test_the_table_names_every_method(out: Path) -> None:
    table = (out / "README.md").read_text()
    assert all(f"| {method} |" in table for method in TOY["methods"])
    assert (out / "canny.png").exists()


def test_profiles_of_the_trained_adapters(toy: Path, out: Path) -> None:
    arguments = ["--study", toy, "--runs", toy.parent / "runs", "--out", toy.parent / "results"]
    assert study_profile.main([str(argument) for argument in arguments]) == 0
    rows = [line.split(" | ") for line in (out / "profile-canny.md").read_text().splitlines()]
    lora, loco = (next(row for row in rows if row[0] == f"| {method}") for method in TOY["methods"])
    for row in (lora, loco):
        assert 0 < float(row[2]) < 0.1 and float(row[3]) > 0 and float(row[4]) >= 1  # after one step
    assert lora[5] == "–" and 0 < float(loco[5].removesuffix("°")) < 10
    assert (out / "profile-canny.png").exists()


def test_a_wrong_method_is_refused(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert study.main(["--study", str(toy), "--method", "olga"]) == 2
    assert "no method 'olga'; choose from" in capsys.readouterr().err


def test_the_methods_of_the_study_have_about_equal_parameters() -> None:
    from diffusers import FluxTransformer2DModel
    from peft import inject_adapter_in_model

    chosen = read(Study, "studies", "methods")
    for name in chosen.methods:
        if name == "encoder alone":
            continue
        config = study.training_config(
            chosen, study.Run(task="canny", method=name, lr=1e-3, seed=0), Path("runs")
        )
        model = FluxTransformer2DModel(
            in_channels=8, num_layers=1, num_single_layers=0, num_attention_heads=4, attention_head_dim=64
        )
        check_config(config.adapter.peft_config(["to_q"]))
        inject_adapter_in_model(config.adapter.peft_config(["to_q"]), model)
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert parameters == pytest.approx(4096, rel=0.15), name
