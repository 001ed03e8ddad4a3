"""The folder of a run: what is in it, and whether a run may write into it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from loco_diffusion.errors import UserError
from loco_diffusion.files import write_text
from loco_diffusion.training.checkpoints import list_checkpoints, load_state
from loco_diffusion.training.config import TrainingConfig, make_config
from loco_diffusion.training.schedules import learning_rate_schedule

FREE_FIELDS = frozenset(
    {
        "output",
        "checkpoint_every",
        "keep_checkpoints",
        "log_every",
        "log_with",
        "cache_gigabytes",
        "cache_folder",
        "validation",
    }
)
"""Fields that may differ between a run and its continuation: they do not change what is learnt. So may `steps`,
as long as the learning rates of the steps that are done are the same with both numbers."""
LATEST = "latest"


@dataclass(frozen=True)
class OutputFolder:
    """Paths of a run."""

    root: Path

    @property
    def adapter(self) -> Path:
        """The trained adapter."""
        return self.root / "adapter"

    @property
    def checkpoints(self) -> Path:
        """What a run continues from."""
        return self.root / "checkpoints"

    @property
    def log(self) -> Path:
        """One JSON object a line."""
        return self.root / "log.jsonl"

    @property
    def samples(self) -> Path:
        """Grids of validation pictures, one a validation."""
        return self.root / "samples"

    @property
    def report(self) -> Path:
        """The page that shows the run."""
        return self.root / "report.html"

    def newest_checkpoint(self) -> Path | None:
        """The newest complete checkpoint."""
        return next(reversed(list_checkpoints(self.checkpoints)), None)

    def check(self, identity: dict[str, Any], resume: str | Path | None) -> Path | None:
        """Check that a run may write here, before any costly work.

        Args:
            identity: what a checkpoint's state must agree with: `config`, `pictures`, `processes`.
            resume: "latest" to continue from the newest checkpoint here, if there is one; or a checkpoint's
                folder, here or of another output; None to begin a new run.

        Returns:
            The checkpoint to continue from, or None to start from the beginning.

        Raises:
            UserError: there are results that would be overwritten, checkpoints of another configuration, or
                no permission to write.
        """
        newest = self.newest_checkpoint()
        chosen = newest if resume == LATEST else None if resume is None else Path(resume)
        if chosen is not None and not (chosen / "state.json").is_file():
            raise UserError(
                f"There is no checkpoint {chosen}; give a folder like RUN/checkpoints/step-00000100, or "
                f"--resume {LATEST}."
            )
        if newest is None and self.adapter.exists():
            raise UserError(f"{self.adapter} holds a finished adapter; choose another output.")
        if newest is not None and chosen is None:
            raise UserError(
                f"{self.root} holds checkpoints of an earlier run; continue it with --resume {LATEST}, "
                "or choose another output."
            )
        if newest is not None and chosen is not None and not newest.samefile(chosen):
            raise UserError(
                f"{self.root} holds checkpoints that do not lead on from {chosen} (the newest is {newest.name}); "
                "choose another output."
            )
        if chosen is not None:
            difference = _difference(load_state(chosen), identity)
            if difference:
                raise UserError(
                    f"{chosen.parent.parent} holds checkpoints of another configuration ({difference}); "
                    "undo the change, or choose another output."
                )
        self._check_writable()
        return chosen

    @contextmanager
    def locked(self) -> Iterator[None]:
        """In the block no other process trains into this folder; a killed one keeps none out.

        Raises:
            UserError: another process does, or the lock cannot be written.
        """
        lock = FileLock(self.root / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(
                f"Another process trains into {self.root}; wait until it has ended, or choose another output."
            ) from error
        except (OSError, NotImplementedError) as error:  # a full disk, a file system without locks
            raise UserError(
                f"The lock {self.root / '.lock'} cannot be written ({error}); free space, or choose another output."
            ) from error
        try:
            yield
        finally:
            lock.release()

    def remove_leftovers(self) -> None:
        """Delete what a killed process was writing and nobody can read."""
        for folder, pattern in (
            (self.checkpoints, ".*.partial"),
            (self.root, ".*.partial"),
            (self.samples, ".*.tmp"),
            (self.root, f".{self.adapter.name}.*.new"),
            (self.root, f".{self.adapter.name}.*.old"),
        ):
            for path in folder.glob(pattern):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)

    def write_config(self, config: TrainingConfig) -> None:
        """Keep the configuration with every default written out.

        Raises:
            UserError: it cannot be written.
        """
        write_text(self.root / "config.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))

    def _check_writable(self) -> None:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"The output {self.root} cannot be made ({error.strerror}); choose another output."
            ) from error
        if not os.access(self.root, os.W_OK | os.X_OK):
            raise UserError(f"The output {self.root} is not writable; choose another output.")


def _difference(there: dict[str, Any], here: dict[str, Any]) -> str:
    """What differs between a checkpoint's state and this run, "" if nothing that matters does."""
    config = there.get("config", {})
    free = FREE_FIELDS
    try:  # a checkpoint of an older version lacks newer fields: their defaults count
        old_config = make_config(config)
        config = old_config.model_dump(mode="json")
        if _same_past(old_config, make_config(here["config"]), int(there.get("step", 0))):
            free = free | {"steps"}
    except UserError:
        pass
    old = flat({**there, "config": config})
    new = flat(here)
    names = [name for name in {**new, **old} if name.split(".")[0] in here]
    return "; ".join(
        f"{name.removeprefix('config.')} is {_shown(old, name)} there and {_shown(new, name)} here"
        for name in names
        if name.removeprefix("config.").split(".")[0] not in free and _shown(old, name) != _shown(new, name)
    )


def _same_past(old: TrainingConfig, new: TrainingConfig, done: int) -> bool:
    """Whether the steps that are done were taken as they would have been with the new total of steps."""
    if new.adapter.method == "loca":  # when it learns locations depends on the total
        return False
    if done > new.steps:
        return False
    before, now = (
        learning_rate_schedule(old),
        learning_rate_schedule(old.model_copy(update={"steps": new.steps})),
    )
    return all(before(step) == now(step) for step in range(done))


def _shown(values: dict[str, Any], name: str) -> str:
    return repr(values[name]) if name in values else "absent"


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with names like `outer.inner`."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        result |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return result
