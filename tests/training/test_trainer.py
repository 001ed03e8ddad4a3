"""Training runs of a tiny FLUX: they learn, resume bit for bit, stop cleanly, and never overwrite."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from loco_diffusion.bases import load_base
from loco_diffusion.control.controller import Controller
from loco_diffusion.errors import UserError
from loco_diffusion.training import trainer
from loco_diffusion.training.checkpoints import list_checkpoints, load_checkpoint
from loco_diffusion.training.config import TrainingConfig
from loco_diffusion.training.examples import Batch
from loco_diffusion.training.objective import Objective
from loco_diffusion.training.output import OutputFolder
from loco_diffusion.training.trainer import train


def _log(config: TrainingConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(config.output) / "log.jsonl").read_text().splitlines()]


def _reports(config: TrainingConfig) -> list[dict[str, Any]]:
    return [line for line in _log(config) if "loss" in line]


def _weights(config: TrainingConfig) -> dict[str, torch.Tensor]:
    folder = Path(config.output) / "adapter"
    return {
        f"{file}.{name}": tensor
        for file in ("adapter_model", "control_encoder")
        if (folder / f"{file}.safetensors").exists()
        for name, tensor in load_file(folder / f"{file}.safetensors").items()
    }


def _checkpoints(config: TrainingConfig) -> list[Path]:
    return list_checkpoints(Path(config.output) / "checkpoints")


def test_loss_falls_on_four_pictures(make: Any, flux: Any) -> None:
    config = make(
        data={"source": "scenes", "count": 4, "size": 32},
        adapter={"target_modules": "attention+ff", "options": {"r": 2, "num_rotations": 2}},
        steps=60,
        batch_size=8,
        lr=1e-2,
        encoder_lr=1e-2,
        text_dropout=0,
        condition_dropout=0,
        checkpoint_every=60,
        log_every=10,
    )
    folder = train(config)
    start, *_ = log = _log(config)
    points = [line for line in log if "loss" in line]
    assert start["trainable"]["adapter"] > 0 and start["trainable"]["encoder"] > 0
    assert [point["step"] for point in points] == [10, 20, 30, 40, 50, 60]
    assert points[-1]["loss"] < 0.9 * points[0]["loss"]
    assert all(point["adapter_changed"] > 0 and point["encoder_changed"] > 0 for point in points)
    assert Controller(flux).load_adapter(folder) == "canny"


def test_loca_learns_locations_in_turn_at_the_start(make: Any) -> None:
    config = make(
        adapter={"method": "loca", "options": {"num_coefficients": 50}},
        steps=80,
        checkpoint_every=2,
        keep_checkpoints=99,
        lr=1e-2,
    )
    train(config)
    expected = _weights(config)
    checkpoints = _checkpoints(config)
    saved = [load_checkpoint(path)[0] for path in checkpoints]

    def learned(number: int) -> set[str]:
        """What changed between a checkpoint and the next: coefficients are vectors, locations matrices."""
        before, after = saved[number : number + 2]
        names = [name for name in before if name.startswith("adapter.")]
        changed = [name for name in names if not torch.equal(before[name], after[name])]
        return {"locations" if before[name].ndim == 2 else "coefficients" for name in changed}

    # Ten steps of coefficients, then locations, until 15 % of all steps are over: after the twelfth.
    assert [learned(number) for number in range(8)] == [{"coefficients"}] * 4 + [{"locations"}] + [
        {"coefficients"}
    ] * 3
    for checkpoint in checkpoints[5:]:  # 10 steps are left: the next one is the first of locations
        shutil.rmtree(checkpoint)
    train(config, resume="latest")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in _weights(config).items())


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {
            "condition": "mask",
            "adapter": {"method": "lora", "options": {"r": 2, "lora_dropout": 0.5}},
            "encoder": {"input": "latents", "hidden_size": 8},
            "accumulation": 2,
            "cache_gigabytes": 0,
            "timesteps": {"sampling": "uniform", "shift": 2},
            "mixed_precision": "bf16",
        },
        {"adapter": {"options": {"r": 2, "num_rotations": 2, "init": "skew"}}, "ema_decay": 0.9},
        pytest.param(
            {"optimizer": "adamw8bit", "lr_scheduler": "cosine", "warmup_steps": 1},
            # Not among the packages for tests: on CPUs its import speaks on standard error.
            marks=pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes"),
        ),
        {"optimizer": "prodigy", "lr_scheduler": "constant", "ema_decay": 0.9},
        {"adapter": {"method": "loft", "options": {"r": 4, "support": "gradient"}}},
        {"tokens": {}},
        {"tokens": {"stride": 2, "joint": True}, "data": {"source": "scenes", "count": 5, "size": 64}},
    ],
    ids=["loco", "lora-on-the-fly", "loco-skew", "8-bit", "prodigy", "loft-gradient", "tokens", "joint"],
)
def test_resumed_equals_uninterrupted(make: Any, fields: dict[str, Any]) -> None:
    config = make(**fields)
    train(config)
    expected, log = _weights(config), _log(config)
    assert log[0]["cached"] == ("cache_gigabytes" not in fields)
    for kill_after in (3, 1):  # 1 and 3 lie between two lines of the log
        shutil.rmtree(Path(config.output) / "adapter")
        for checkpoint in _checkpoints(config)[kill_after:]:
            shutil.rmtree(checkpoint)
        train(config, resume="latest")
        resumed = _weights(config)
        assert resumed.keys() == expected.keys()
        assert all(torch.equal(resumed[name], expected[name]) for name in expected)
        for line, before in zip(_log(config), log, strict=True):
            assert line.keys() == before.keys()
            assert {k for k in line if line[k] != before[k]} <= {"images_per_second", "time"}


def test_the_moving_average_is_saved(make: Any) -> None:
    config = make(ema_decay=0.5)
    train(config)
    states = [load_checkpoint(path)[0] for path in _checkpoints(config)]
    assert any(name.startswith("ema.") for name in states[0])
    names = [f"encoder.{i}" for i in range(4)]
    saved = [tensor for name, tensor in _weights(config).items() if name.startswith("control_encoder")]
    start = load_checkpoint(_checkpoints(config)[0])[0]
    expected = [start[name] for name in names]  # the first step's, as diffusers has it
    for number, state in enumerate(states[1:], start=1):
        decay = min(0.5, (1 + number) / (10 + number))
        expected = [decay * e + (1 - decay) * state[n] for n, e in zip(names, expected, strict=True)]
    assert all(any(torch.allclose(e, s) for s in saved if s.shape == e.shape) for e in expected)
    assert not any(torch.equal(states[-1][n], s) for n in names for s in saved)


def test_learning_rates_of_schedules_and_of_prodigy_are_logged(make: Any) -> None:
    config = make("cosine", lr_scheduler="cosine", log_every=1)
    train(config)
    assert [line["lr"] / 3e-3 for line in _reports(config)] == pytest.approx([1, 0.8535534, 0.5, 0.1464466])
    config = make("prodigy", optimizer="prodigy", decay=0, log_every=30, steps=60, checkpoint_every=60)
    train(config)
    rates = [line["lr"] for line in _reports(config)]
    assert 1e-6 <= rates[0] < rates[1]  # it starts at 1e-6
    assert rates == [line["encoder_lr"] for line in _reports(config)]


def test_checkpointed_gradients_are_the_same(make: Any) -> None:
    results = []
    for number, checkpointing in enumerate((False, True)):
        config = make(f"run{number}", gradient_checkpointing=checkpointing)
        train(config)
        results.append(_weights(config))
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())


def test_a_quantised_base_is_trained(make: Any, flux: Any, flux_folder: Path) -> None:
    config = make(quantization="int8")
    folder = train(config)
    Controller(flux).load_adapter(folder)  # the base itself takes the adapter, too
    assert all(line["adapter_changed"] > 0 and line["encoder_changed"] > 0 for line in _reports(config))
    pipe = load_base(flux_folder, torch.float32, "int8")
    layer = pipe.transformer.transformer_blocks[0].attn.to_q
    assert type(layer.weight).__name__ == "Int8Tensor"
    expected = flux.transformer.transformer_blocks[0].attn.to_q.weight
    torch.testing.assert_close(layer.weight.dequantize(), expected, atol=0.003, rtol=0)
    assert not torch.equal(layer.weight.dequantize(), expected)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
def test_four_bits_need_a_gpu(make: Any) -> None:
    with pytest.raises(UserError, match="quantization nf4 needs a GPU, and there is none; use int8"):
        train(make(quantization="nf4"))


def test_optimizers_that_are_not_installed_are_refused(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, package in (("adamw8bit", "bitsandbytes"), ("prodigy", "prodigyopt")):
        monkeypatch.setitem(sys.modules, package, None)
        config = make(optimizer=name)
        with pytest.raises(
            UserError, match=f"{name} needs {package}, .*pip install {package}, or use optimizer"
        ):
            train(config)
        assert not Path(config.output).exists()


def test_too_little_memory_is_one_sentence_and_costs_no_checkpoint(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make(checkpoint_every=1, gradient_checkpointing=True)

    def exhausted(objective: Objective, batch: Batch) -> torch.Tensor:
        if _checkpoints(config):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return loss(objective, batch)

    loss = Objective.loss
    monkeypatch.setattr(Objective, "loss", exhausted)
    with pytest.raises(
        UserError, match="memory does not suffice; lower batch_size .*, or set quant"
    ) as found:
        train(config)
    assert "gradient_checkpointing" not in str(found.value)
    assert len(_checkpoints(config)) == 1
    monkeypatch.undo()
    train(config, resume="latest")


def test_a_finished_run_encodes_nothing_again(
    make: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make()
    train(config)
    expected = _weights(config)
    shutil.rmtree(Path(config.output) / "adapter")

    def refuse(*_: Any) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr(trainer, "prepare", refuse)
    capsys.readouterr()
    train(config, resume="latest")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in _weights(config).items())
    assert "Training canny" not in capsys.readouterr().err


def test_two_processes_do_not_train_into_one_folder(make: Any) -> None:
    config = make()
    output = OutputFolder(Path(config.output))
    output.root.mkdir()
    with output.locked(), pytest.raises(UserError, match="Another process trains into .*; wait until"):
        train(config)
    train(config)


@pytest.mark.slow
def test_compiled_steps_are_steps_and_resume_bit_for_bit(make: Any) -> None:
    fields = {
        "adapter": {"options": {"r": 2, "num_rotations": 1, "side": "both", "init": "skew"}},
        "validation": {"pictures": 1, "every": 2, "steps": 1},
        "gradient_checkpointing": True,
        "log_every": 1,
        "steps": 3,
    }
    plain, compiled = make("plain", **fields), make("compiled", torch_compile=True, **fields)
    train(plain)
    torch._dynamo.reset()
    with mock.patch.dict(torch._dynamo.utils.counters, clear=True) as counters:
        train(compiled)
        assert 2 <= counters["stats"]["unique_graphs"] <= 4  # a double and a single block; none to draw with
    losses = [[report["loss"] for report in _reports(config)] for config in (plain, compiled)]
    assert losses[1] == [pytest.approx(loss, rel=1e-3) for loss in losses[0]]
    expected = _weights(compiled)
    shutil.rmtree(Path(compiled.output) / "adapter")
    for checkpoint in _checkpoints(compiled)[1:]:
        shutil.rmtree(checkpoint)
    train(compiled, resume="latest")
    resumed = _weights(compiled)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())


def test_what_cannot_be_compiled_is_one_sentence(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(graph: Any, inputs: Any) -> Any:
        raise OSError("there is no compiler")

    compile_with = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile_with(module, backend=fail))
    with pytest.raises(UserError, match=r"torch_compile failed \(.*there is no compiler.*\); install a"):
        train(make(torch_compile=True))
    with pytest.raises(UserError, match="remove torch_compile or tokens"):
        make(torch_compile=True, tokens={})


def test_planes_are_fitted_to_gradients(make: Any) -> None:
    options = {"r": 2, "num_rotations": 2, "init": "skew"}
    config = make(adapter={"options": options})
    train(config)
    planes = _fitted_planes(load_checkpoint(_checkpoints(config)[0])[0])
    assert len(planes) == 11
    for u in planes:  # random ones are not orthogonal to each other
        columns = u.transpose(0, 1).flatten(1)
        torch.testing.assert_close(columns.mT @ columns, torch.eye(4), atol=1e-5, rtol=0)
    later = make(
        "later",
        adapter={"options": options, "fit_after": 2},
        checkpoint_every=1,
        keep_checkpoints=99,
        steps=3,
    )
    train(later)
    first, second, third = (load_checkpoint(path)[0] for path in _checkpoints(later))
    for checkpoint in (first, second):
        assert all(map(torch.equal, _fitted_planes(checkpoint), planes))
    names = [name for name in first if name.startswith("adapter.")]
    assert all(torch.equal(first[name], second[name]) for name in names)
    assert any(not torch.equal(second[name], third[name]) for name in names)
    seen = zip(planes, _fitted_planes(third), strict=True)  # with the condition
    assert all(not torch.allclose(before, after) for before, after in seen)
    plain = make("plain", steps=1)
    train(plain)
    assert not any(name.startswith("fitted.") for name in load_checkpoint(_checkpoints(plain)[0])[0])


@pytest.mark.parametrize("options", [{"r": 4, "support": "skew"}, {"r": 4, "support": "gradient"}])
def test_supports_are_fitted_again(make: Any, options: dict[str, Any]) -> None:
    config = make(
        adapter={"method": "loft", "options": options, "fit_after": 1},
        checkpoint_every=1,
        keep_checkpoints=99,
    )
    train(config)
    first, second = (load_checkpoint(path)[0] for path in _checkpoints(config)[:2])
    bases = [name for name in first if name.endswith("loft_basis")]
    assert bases and all(not torch.allclose(first[name], second[name]) for name in bases)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 3, "adapter": {"fit_after": 3}}, "in 3 steps the adapter would not learn"),
        (
            {"adapter": {"fit_after": 1}, "tokens": {}},
            "the tokens route has no encoder that could learn first",
        ),
    ],
)
def test_adapters_that_would_not_learn_are_refused(make: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(**fields)


def test_fsdp_of_one_process_has_nothing_to_split(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert train(make(steps=1)).is_dir()


def _fitted_planes(checkpoint: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [t for name, t in checkpoint.items() if name.startswith("fitted.") and name.endswith("loco_u")]


def test_seeds_and_only_seeds_change_the_result(make: Any) -> None:
    first, same, other = make("a", steps=1), make("b", steps=1), make("c", steps=1, seed=1)
    for config in (first, same, other):
        train(config)
    assert all(torch.equal(value, _weights(same)[name]) for name, value in _weights(first).items())
    assert any(not torch.equal(value, _weights(other)[name]) for name, value in _weights(first).items())


@pytest.mark.parametrize(
    ("number", "expected"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
)
def test_signal_leaves_a_checkpoint_to_resume_from(
    make: Any, number: signal.Signals, expected: type[BaseException]
) -> None:
    config = make(steps=100_000, checkpoint_every=100_000)
    before = signal.getsignal(number)
    reached = [0]
    for resume in (None, "latest"):
        sender = threading.Thread(target=_signal_after, args=(config, reached[-1], number))
        sender.start()
        with pytest.raises(expected):
            train(config, resume=resume)
        sender.join()
        reached.append(int(_checkpoints(config)[-1].name.removeprefix("step-")))
    assert 0 < reached[1] < reached[2] < config.steps
    assert signal.getsignal(number) is before


def _signal_after(config: TrainingConfig, step: int, number: signal.Signals) -> None:
    """Send this process a signal when the log has a line of a later step: then the run is listening."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        time.sleep(0.02)
        path = Path(config.output) / "log.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        if any(json.loads(line).get("step", 0) > step for line in lines if line.endswith("}")):
            os.kill(os.getpid(), number)
            return


def test_divergence_keeps_the_last_good_checkpoint(make: Any) -> None:
    config = make(encoder_lr=1e36)
    with pytest.raises(UserError, match=r"diverged before step 2 .*step-00000001 is intact; lower lr"):
        train(config)
    assert [path.name for path in _checkpoints(config)] == ["step-00000001"]
    tensors = load_file(_checkpoints(config)[0] / "tensors.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert not (Path(config.output) / "adapter").exists()


def test_nothing_is_overwritten(make: Any) -> None:
    config = make(steps=1)
    train(config)
    with pytest.raises(
        UserError, match=r"holds checkpoints of an earlier run; continue it with --resume latest"
    ):
        train(config)
    changed = make(steps=1, lr=1e-4, data={"source": "scenes", "count": 6, "size": 32}, log_every=7)
    with pytest.raises(UserError) as caught:
        train(changed, resume="latest")
    assert "(data.count is 5 there and 6 here; lr is 0.003 there and 0.0001 here; pictures is 5 there" in str(
        caught.value
    )
    assert "log_every" not in str(caught.value)
    shutil.rmtree(Path(config.output) / "checkpoints")
    with pytest.raises(UserError, match="holds a finished adapter; choose another output"):
        train(config, resume="latest")


def test_damaged_checkpoint_is_named(make: Any) -> None:
    config = make(steps=1)
    train(config)
    (_checkpoints(config)[-1] / "tensors.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match=r"step-00000001 cannot be read .* delete it"):
        train(config, resume="latest")


def test_impossible_runs_are_refused_before_anything_is_written(make: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"output": "file/run"}, "cannot be made"),
        ({"base": str(tmp_path / "nowhere")}, "no model folder .*nowhere"),
        ({"data": {"source": "scenes", "size": 40}}, "data.size is 40, .* a multiple of 16; use 32"),
        ({"data": {"source": "folder", "path": "nowhere"}}, "folder nowhere does not exist"),
        ({"adapter": {"target_modules": ["to_x"]}}, "to_x"),
        ({"adapter": {"options": {"r": 40}}}, "exceeds the .* inputs of a target layer"),
    ]
    for number, (fields, message) in enumerate(cases):
        config = make(**{"output": f"run{number}", **fields})
        with pytest.raises(UserError, match=message):
            train(config)
        assert not (Path(config.output) / "log.jsonl").exists()
