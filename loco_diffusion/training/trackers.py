"""TensorBoard, Weights & Biases and other trackers, as accelerate knows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from PIL import Image

from loco_diffusion.data.sources import cause_of
from loco_diffusion.errors import UserError
from loco_diffusion.training.config import TrainingConfig
from loco_diffusion.training.output import flat

PROJECT = "loco-diffusion"
_PACKAGES = {"comet_ml": "comet-ml"}  # that are not called like their tracker


def check_trackers(names: tuple[str, ...]) -> None:
    """Raise UserError if the package of a tracker is not installed."""
    available = {str(getattr(name, "value", name)) for name in get_available_trackers()}
    for name in names:
        if name not in available:
            package = _PACKAGES.get(name, name)
            raise UserError(
                f"log_with names {name}, which is not installed; pip install {package}, or leave it out."
            )


class Trackers:
    """The trackers of a run.

    Args:
        accelerator: made with `log_with`.
        config: of the run.
        run: identifier of the run, the same after a resume.
        step: how many steps are done; what TensorBoard has of later ones is hidden.

    Raises:
        UserError: a tracker cannot be started.
    """

    def __init__(self, accelerator: Accelerator, config: TrainingConfig, run: str, step: int) -> None:
        self.accelerator = accelerator
        self.enabled = bool(config.log_with)
        if self.enabled:
            shown = {
                name: value if isinstance(value, (bool, int, float)) else str(value)
                for name, value in flat(config.model_dump(mode="json")).items()
            }
            settings = {
                "tensorboard": {"purge_step": step + 1 if step else None},
                "wandb": {"name": Path(config.output).name, "id": run, "resume": "allow"},
            }
            try:
                accelerator.init_trackers(PROJECT, shown, settings)
            except Exception as error:  # each tracker has types of its own
                raise UserError(
                    f"log_with {', '.join(config.log_with)} cannot be started ({cause_of(error)}); log in, or leave "
                    "it out."
                ) from error

    def log(self, group: str, values: dict[str, float], step: int) -> None:
        """Log numbers, under names like `train/loss`."""
        if self.enabled:
            self.accelerator.log({f"{group}/{name}": value for name, value in values.items()}, step=step)

    def picture(self, name: str, path: Path, step: int) -> None:
        """Log a picture file to those trackers that take pictures."""
        for tracker in self.accelerator.trackers if self.enabled and self.accelerator.is_main_process else []:
            log_images: Any = getattr(tracker, "log_images", None)
            if log_images is None:
                continue
            picture = Image.open(path).convert("RGB")
            if tracker.name == "tensorboard":
                log_images({name: np.asarray(picture)[None]}, step=step, dataformats="NHWC")
            else:
                log_images({name: [picture]}, step=step)

    def end(self) -> None:
        """Write what is pending."""
        if self.enabled:
            self.accelerator.end_training()
