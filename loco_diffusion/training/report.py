"""The page that shows a run: curves, pictures, scores, configuration, machine. One file, which opens offline."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from datetime import datetime, timedelta
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml
from jinja2 import Environment
from PIL import Image

from loco_diffusion.control.adapter_folder import PACKAGES
from loco_diffusion.files import write_text
from loco_diffusion.machine import describe_machine
from loco_diffusion.scoring import SCORES, Score
from loco_diffusion.training.charts import Chart, Curve, draw_chart
from loco_diffusion.training.config import TrainingConfig
from loco_diffusion.training.journal import Record
from loco_diffusion.training.output import OutputFolder

MOST_GRIDS = 12  # on the page; of more, evenly spread ones
_QUALITY = 88  # of the page's copies of the grids


def write_report(output: OutputFolder, config: TrainingConfig, records: Sequence[Record]) -> Path:
    """Write `report.html` from the log and the pictures of a run, finished or not.

    Args:
        output: of the run.
        config: of the run.
        records: of the log.

    Returns:
        The page's path.

    Raises:
        UserError: it cannot be written.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    template = files(__package__).joinpath("report.html.jinja").read_text(encoding="utf-8")
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(template)
    text = page.render(
        config=config,
        tiles=_tiles(config, records),
        scores=score_table(config.condition, records),
        grids=_grids(output),
        charts=[_data_uri("image/svg+xml", draw_chart(chart).encode()) for chart in _charts(config, records)],
        settings=yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False),
        machine=describe_machine(device, PACKAGES),
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )
    write_text(output.report, text)
    return output.report


def score_table(condition: str, records: Sequence[Record]) -> list[tuple[Score, list[float | None]]]:
    """Each score of the task: of the newest pictures, of those without control, of the VAE's round trip."""
    newest, reference = _validations(records)[-1:], _reference(records)
    if not newest or not newest[0]["scores"]:
        return []
    parts = (newest[0]["scores"], reference.get("without_control", {}), reference.get("vae", {}))
    return [(score, [part.get(score.key) for part in parts]) for score in SCORES[condition]]


def training_seconds(config: TrainingConfig, records: Sequence[Record]) -> float:
    """The time that all logged steps took, without validation and without pauses between a run's parts."""
    reports = _reports(records)
    size = config.batch_size * config.accumulation * _start(records).get("processes", 1)
    steps = [0, *(record["step"] for record in reports)]
    return sum(
        (after - before) * size / record["images_per_second"]
        for (before, after), record in zip(pairwise(steps), reports, strict=True)
    )


def _tiles(config: TrainingConfig, records: Sequence[Record]) -> list[tuple[str, str, str]]:
    """The numbers at the top: their names, values, and what is to be said of them."""
    reports, start = _reports(records), _start(records)
    tiles = []
    table = score_table(config.condition, records)
    if table:
        score, (now, free, _) = table[0]
        compared = "" if free is None else f"without control {free:.3g}"
        tiles.append((score.title, f"{now:.3g}", compared))
    if reports:
        tiles.append(("loss", f"{reports[-1]['loss']:.4f}", f"at first {reports[0]['loss']:.4f}"))
        tiles.append(("steps", f"{reports[-1]['step']:,}", f"of {config.steps:,}"))
        seconds = round(training_seconds(config, records))
        speed = f"{reports[-1]['images_per_second']:.3g} images a second"
        tiles.append(("training time", str(timedelta(seconds=seconds)), speed))
    if start:
        total = sum(start["trainable"].values())
        tiles.append(
            ("trained parameters", f"{total:,}", f"{100 * total / start['base']:.3g} % of the denoiser's")
        )
        count = start["pictures"]
        tiles.append(("pictures", "a stream" if count is None else f"{count:,}", config.data.source))
    return tiles


def _charts(config: TrainingConfig, records: Sequence[Record]) -> list[Chart]:
    reports, validations, reference = _reports(records), _validations(records), _reference(records)
    charts = [Chart("loss", {"loss": _curve(reports, "loss")})]
    for score in SCORES.get(config.condition, ()):
        points = [(record["step"], record["scores"][score.key]) for record in validations if record["scores"]]
        lines = {
            name: reference[key][score.key]
            for name, key in (("without control", "without_control"), ("VAE round trip", "vae"))
            if score.key in reference.get(key, {})
        }
        arrow = "↑" if score.higher_is_better else "↓"
        charts.append(Chart(f"{score.title} {arrow}", {"with control": points}, lines))
    changed = {key.removesuffix("_changed"): _curve(reports, key) for key in _keys(reports, "_changed")}
    angles = {
        name: _curve(validations, f"angle_{key}") for name, key in (("largest", "max"), ("mean", "mean"))
    }
    errors = {"largest": _curve(validations, "orthogonality_error")}
    values = {"largest": _curve(validations, "singular_value_max")}
    rates = {key.replace("_lr", ""): _curve(reports, key) for key in _keys(reports, "lr")}
    charts += [
        Chart("norm of the change since the start", changed),
        Chart("rotation angles, degrees", angles),
        Chart("orthogonality error ‖R Rᵀ − I‖", errors, logarithmic=True),
        Chart("singular values of the change", values),
        Chart("gradient norm, before clipping", {"": _curve(reports, "grad_norm")}, logarithmic=True),
        Chart("learning rate", {("adapter" if name == "lr" else name): rate for name, rate in rates.items()}),
        Chart("images a second", {"": _curve(reports, "images_per_second")}),
    ]
    shown = [
        Chart(
            chart.title,
            {name: curve for name, curve in chart.curves.items() if curve},
            chart.lines,
            chart.logarithmic,
        )
        for chart in charts
    ]
    return [chart for chart in shown if chart.curves]


def _grids(output: OutputFolder) -> list[dict[str, Any]]:
    """Steps and pictures of grids from the first to the last."""
    paths = sorted(output.samples.glob("step-*.png"))
    if len(paths) > MOST_GRIDS:
        paths = [paths[round(i * (len(paths) - 1) / (MOST_GRIDS - 1))] for i in range(MOST_GRIDS)]
    return [{"step": int(path.stem.partition("-")[2]), "uri": _picture_uri(path)} for path in paths]


def _picture_uri(path: Path) -> str:
    stream = io.BytesIO()
    Image.open(path).convert("RGB").save(stream, "WEBP", quality=_QUALITY)
    return _data_uri("image/webp", stream.getvalue())


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _curve(records: Sequence[Record], key: str) -> Curve:
    return [(record["step"], record[key]) for record in records if key in record]


def _keys(records: Sequence[Record], ending: str) -> list[str]:
    return [key for key in (records[-1] if records else {}) if key.endswith(ending)]


def _reports(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if "loss" in record]


def _validations(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if record.get("event") == "validation"]


def _reference(records: Sequence[Record]) -> Record:
    """The newest: a run that goes on with other validation settings takes it again."""
    return next((record for record in reversed(records) if record.get("event") == "reference"), {})


def _start(records: Sequence[Record]) -> Record:
    return next((record for record in records if record.get("event") == "start"), {})
