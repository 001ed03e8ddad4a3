"""What people see of a run: log, trackers, terminal, pictures and the report page, from one place."""

from __future__ import annotations

import secrets
import time
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from rich.progress import Progress
from torch import nn

from loco_diffusion.scoring import SCORES
from loco_diffusion.training.config import TrainingConfig
from loco_diffusion.training.journal import Journal, Record
from loco_diffusion.training.output import OutputFolder
from loco_diffusion.training.progress import annotate, announce
from loco_diffusion.training.report import write_report
from loco_diffusion.training.trackers import Trackers
from loco_diffusion.training.validation import Validation, grid_path, turning


class Watch:
    """What people see of a run.

    Args:
        config: of the run.
        accelerator: of this process.
        output: of the run.
        validation: draws the pictures.
        denoiser: with the adapter.
        step: how many steps are done.
        progress: on the terminal.
    """

    def __init__(
        self,
        config: TrainingConfig,
        accelerator: Accelerator,
        output: OutputFolder,
        validation: Validation,
        denoiser: nn.Module,
        step: int,
        progress: Progress,
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.output = output
        self.validation = validation
        self.denoiser = denoiser
        self.progress = progress
        self.journal = Journal(output.log, step, accelerator.is_main_process)
        start = self.journal.last("start") or {}
        self.run = str(start.get("run", secrets.token_hex(4)))
        self.trackers = Trackers(accelerator, config, self.run, step)
        self.task = progress.add_task("Training", total=config.steps, completed=step, note="")
        self._since, self._since_step = time.monotonic(), step

    def begin(self, step: int, sizes: Record) -> None:
        """Report what is trained, once a run; and what a run that was killed had still to draw.

        Args:
            step: how many steps are done.
            sizes: "trainable" and "norms" by group, "base", "pictures" and "cached".

        Raises:
            StopRequested: see `Validation.draw`.
        """
        if step < self.config.steps:
            announce(self.progress, _introduction(self.config, sizes))
        if self.journal.last("start") is None:
            self.journal.write({"event": "start", "run": self.run, **sizes})
        how = self.config.validation.model_dump(mode="json", exclude={"every"})
        if self._lacks("reference", validation=how):
            self.journal.write({"event": "reference", "validation": how, **self.validation.reference()})
        if step and self.is_due(step) and self._lacks("validation", step=step):
            self.validate(step)
        self._restart(step)

    def is_due(self, step: int) -> bool:
        """Whether there is a validation after that many steps."""
        return step % self.config.validation.every == 0 or step == self.config.steps

    def advance(self, step: int) -> None:
        """A step is done."""
        self.progress.update(self.task, completed=step)

    def report(self, record: Record) -> None:
        """Log the steps since the last report.

        Args:
            record: "step" and numbers.
        """
        step = record["step"]
        pictures = self.config.batch_size * self.config.accumulation * self.accelerator.num_processes
        speed = (step - self._since_step) * pictures / (time.monotonic() - self._since)
        self._restart(step)
        record = {**record, "images_per_second": speed}
        self.journal.write(record)
        self.trackers.log("train", {k: v for k, v in record.items() if k != "step"}, step)
        annotate(self.progress, self.task, f"loss {record['loss']:.4f}, {speed:.3g} images/s")

    def validate(self, step: int) -> None:
        """Draw, score and measure, and write the report page.

        Raises:
            StopRequested: see `Validation.draw`.
        """
        note = self.progress.tasks[self.progress.task_ids.index(self.task)].fields["note"]
        self.progress.update(self.task, note="validating ...")
        scores = self.validation.draw(step)
        turned = turning(self.denoiser, self.config.condition)
        pictures = len(self.validation.originals)
        self.journal.write(
            {"event": "validation", "step": step, "pictures": pictures, "scores": scores, **turned}
        )
        self.trackers.log("validation", {**scores, **turned}, step)
        if scores:
            self.trackers.picture("validation/pictures", grid_path(self.output.samples, step), step)
        if step < self.config.steps:  # else `finish` does
            self._write_report()
        announce(self.progress, f"Step {step}: {self._summary(scores, turned)}.")
        self.progress.update(self.task, note=note)
        self._restart(step)

    def finish(self) -> None:
        """All steps are done: write the final report page."""
        self._write_report()

    def close(self) -> None:
        """Write what trackers have pending, however the run ended."""
        self.trackers.end()

    def _write_report(self) -> None:
        if self.accelerator.is_main_process:
            write_report(self.output, self.config, self.journal.records)

    def _summary(self, scores: dict[str, float], turned: dict[str, float]) -> str:
        """A validation in a line."""
        parts = []
        if scores:
            first = SCORES[self.config.condition][0]
            free = (self.journal.last("reference") or {}).get("without_control", {}).get(first.key)
            compared = "" if free is None else f" (without control {free:.3g})"
            parts.append(f"{first.title} {scores[first.key]:.3g}{compared}")
        if "angle_max" in turned:
            parts.append(f"angles up to {turned['angle_max']:.3g}°, {turned['angle_mean']:.3g}° on average")
            parts.append(f"orthogonal to {turned['orthogonality_error']:.1g}")
        if "singular_value_max" in turned:
            parts.append(f"singular values up to {turned['singular_value_max']:.3g}")
        report = next((record for record in reversed(self.journal.records) if "loss" in record), {})
        for name in report:
            if name.endswith("_changed"):
                parts.append(f"{name.removesuffix('_changed')} moved by {report[name]:.3g}")
        return ", ".join(parts)

    def _lacks(self, event: str, **fields: Any) -> bool:
        """Whether the newest line of an event, as the first process knows it, has other fields or is missing."""
        newest = self.journal.last(event)
        answer: list[Any] = [
            newest is None or any(newest.get(name) != value for name, value in fields.items())
        ]
        return bool(broadcast_object_list(answer)[0])

    def _restart(self, step: int) -> None:
        """Begin to measure speed anew; drawing pictures is no training."""
        self._since, self._since_step = time.monotonic(), step


def _introduction(config: TrainingConfig, sizes: Record) -> str:
    total = sum(sizes["trainable"].values())
    parts = ", ".join(f"{count:,} in the {name}" for name, count in sizes["trainable"].items())
    norms = ", ".join(f"{name} {norm:.3g}" for name, norm in sizes["norms"].items())
    pictures = "a stream of pictures" if sizes["pictures"] is None else f"{sizes['pictures']:,} pictures"
    cached = "kept" if sizes["cached"] else "encoded in every step"
    return (
        f"Training {config.condition} with {config.adapter.method}: {total:,} parameters ({parts}), "
        f"{100 * total / sizes['base']:.3g} % of the denoiser's {sizes['base']:,}; {pictures}, "
        f"{cached}. Norms at the start: {norms}."
    )
