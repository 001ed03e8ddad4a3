"""What an adapter draws while it learns: pictures under held-out conditions, their scores, and its angles."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from torch import nn

from loco_diffusion.adapters.inspection import inspect
from loco_diffusion.bases import is_packaged
from loco_diffusion.control import Controller, layers
from loco_diffusion.control.family import Pipeline
from loco_diffusion.data.sources import Source
from loco_diffusion.generation import Session, default_sampling, fit_map
from loco_diffusion.grid import picture_grid
from loco_diffusion.images import fit, save_image
from loco_diffusion.scoring import SCORES, TaskScores
from loco_diffusion.training.compilation import uncompiled
from loco_diffusion.training.config import TrainingConfig

_COLUMNS = ("original", "condition", "with control", "without control")
_LETTERS, _LINES = 26, 6  # of a caption beside its pictures


class StopRequested(Exception):
    """Drawing was given up, because the run is to stop."""


class Validation:
    """The pictures that a run is watched by. Whatever is drawn changes nothing that the run learns.

    With several processes all of them must call the same methods: each draws a part of the pictures.

    Args:
        config: of the run.
        accelerator: of this process.
        controller: holds the adapter that learns.
        pipe: of the controller.
        source: the originals, if there are any.
        folder: where grids of pictures go.
        check_stop: called after each denoising step; raises StopRequested to give up.

    Raises:
        UserError: an original cannot be read.
    """

    def __init__(
        self,
        config: TrainingConfig,
        accelerator: Accelerator,
        controller: Controller,
        pipe: Pipeline,
        source: Source | None,
        folder: Path,
        check_stop: Callable[[], None],
    ) -> None:
        settings, size = config.validation, config.data.size
        self.config = config
        self.accelerator = accelerator
        self.folder = folder
        self.check_stop = check_stop
        self.session = Session(pipe, default_sampling(pipe, is_packaged(config.base)), controller)
        self.sampling = self.session.sampling(size, size, settings.steps, settings.guidance)
        count = min(settings.pictures, len(source)) if source is not None else 0
        records = [source[number] for number in range(count)] if source is not None else []
        self.captions = [record.caption for record in records]
        self.originals = [fit(record.picture(), size, size) for record in records]
        self.condition = config.make_condition()
        given = [record.map() for record in records]
        self.maps = [
            self.condition.extract(original).convert("RGB")
            if own is None
            else fit_map(own, config.condition, size, size)
            for original, own in zip(self.originals, given, strict=True)
        ]
        # What a given mask hides is not known here.
        self.is_scored = config.condition in SCORES and (
            config.condition != "mask" or all(own is None for own in given)
        )
        self._free: list[Image.Image] = []

    def reference(self) -> dict[str, dict[str, float]]:
        """Scores to compare with: of pictures drawn without control, and of the originals through the VAE."""
        if not self.originals:
            return {}
        at_once = self.config.batch_size
        parts = [self.originals[n : n + at_once] for n in range(0, len(self.originals), at_once)]
        with self._drawing():
            reconstructed = [picture for part in parts for picture in self.session.reconstruct(part)]
        return {
            "without_control": _mean(self._scores(self._without_control())),
            "vae": _mean(self._scores(reconstructed)),
        }

    def draw(self, step: int) -> dict[str, float]:
        """Draw and score the pictures, and write their grid, after that many steps.

        Returns:
            The scores by key, each the mean over pictures; none if the task has no scores.

        Raises:
            StopRequested: before all are drawn; no grid is written.
            UserError: the grid cannot be written, or memory does not suffice.
        """
        if not self.originals:
            return {}
        free, controlled = self._without_control(), self._drawn(self.maps)
        scores = self._scores(controlled)
        if self.accelerator.is_main_process:
            rows = list(zip(self.originals, self.maps, controlled, free, strict=True))
            labels = [self._label(caption, own) for caption, own in zip(self.captions, scores, strict=True)]
            self.folder.mkdir(parents=True, exist_ok=True)
            save_image(picture_grid(rows, labels, _COLUMNS), grid_path(self.folder, step))
        return _mean(scores)

    def _label(self, caption: str, scores: dict[str, float]) -> str:
        lines = textwrap.wrap(caption, _LETTERS, max_lines=_LINES, placeholder=" ...")
        if scores:
            first = SCORES[self.config.condition][0]
            lines.insert(0, f"{first.title} {scores[first.key]:.3g}")
        return "\n".join(lines)

    def _without_control(self) -> list[Image.Image]:
        """Drawn once: the base does not change."""
        if not self._free:
            self._free = self._drawn(None)
        return self._free

    def _drawn(self, maps: list[Image.Image] | None) -> list[Image.Image]:
        """All pictures; every process draws as many, so that all take the same steps together."""
        count, processes = len(self.originals), self.accelerator.num_processes
        share = -(-count // processes)
        first = share * self.accelerator.process_index
        mine = [number % count for number in range(first, first + share)]
        drawn: list[Image.Image] = []
        with self._drawing():
            for start in range(0, share, self.config.batch_size):
                drawn += self._batch(mine[start : start + self.config.batch_size], maps)
        return gather_object(drawn)[:count] if processes > 1 else drawn

    def _batch(self, numbers: list[int], maps: list[Image.Image] | None) -> list[Image.Image]:
        return self.session.generate(
            [self.captions[number] for number in numbers],
            [self.config.validation.seed + number for number in numbers],
            self.sampling,
            maps={self.config.condition: [maps[number] for number in numbers]} if maps else None,
            on_step=lambda step, total: self.check_stop(),
        )

    def _scores(self, pictures: list[Image.Image]) -> list[dict[str, float]]:
        """Of each picture; none where the task has none."""
        scores = []
        for picture, original in zip(pictures, self.originals, strict=True):
            own = {}
            if self.is_scored:
                task = TaskScores(self.condition)
                task.update([picture], [original])
                own = task.compute()
            scores.append(own)
        return scores

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        """In the block the whole pipeline is ready to draw; after it everything is as it was."""
        pipe, device = self.session.pipe, self.accelerator.device
        denoiser = self.session.controller.family.denoiser(pipe)
        parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
        places = [next(part.parameters()).device for part in parts]
        training = denoiser.training
        pipe.set_progress_bar_config(disable=True)
        forked = [device] if device.type != "cpu" else []
        rng = torch.random.fork_rng(forked, device_type=device.type if forked else "cuda")
        with rng, uncompiled(self.config):
            try:
                _place(parts, [device] * len(parts))
                denoiser.eval()
                yield
            finally:
                denoiser.train(training)
                _place(parts, places)


def grid_path(folder: Path, step: int) -> Path:
    """Where the pictures of a step are."""
    return folder / f"step-{step:08d}.png"


def turning(denoiser: nn.Module, name: str) -> dict[str, float]:
    """How far an adapter turns the layers, in degrees, and how exactly; of a LoRA its largest singular value.

    Angles are of rotation planes: the largest of all, and the mean of all. Methods that rotate nothing give {}.
    """
    weights = {path: tensor.detach().cpu() for path, tensor in layers.weights_of(denoiser, name).items()}
    found = inspect(layers.config_of(denoiser, name), weights)
    if found is None:
        return {}
    values = [value for spectrum in found.spectra.values() for value in spectrum]
    if not found.orthogonality_errors:
        return {"singular_value_max": max(values)}
    return {
        "angle_max": max(values),
        "angle_mean": mean(values),
        "orthogonality_error": max(found.orthogonality_errors.values()),
    }


def _place(parts: list[nn.Module], devices: list[torch.device]) -> None:
    for part, device in zip(parts, devices, strict=True):
        if next(part.parameters()).device != device:
            part.to(device)


def _mean(scores: list[dict[str, float]]) -> dict[str, float]:
    return {key: mean(own[key] for own in scores) for key in scores[0]}
