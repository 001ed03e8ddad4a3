"""The folder of a run: what is in it, and whether a run may write into it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from loco_diffusion.errors import UserError
from loco_diffusion.training.checkpoints import list_checkpoints, load_state
from loco_diffusion.training.config import TrainingConfig, make_config

FREE_FIELDS = frozenset(
    {"output", "checkpoint_every", "keep_checkpoints", "log_every", "cache_gigabytes", "cache_folder"}
)
"""Fields that may differ between a run and its continuation: they do not change what is learnt."""


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

    def newest_checkpoint(self) -> Path | None:
        """The newest complete checkpoint."""
        return next(reversed(list_checkpoints(self.checkpoints)), None)

    def check(self, identity: dict[str, Any], resume: bool) -> Path | None:
        """Check that a run may write here, before any costly work.

        Args:
            identity: what a checkpoint's state must agree with: `config`, `pictures`, `processes`.
            resume: continue from the newest checkpoint.

        Returns:
            The checkpoint to continue from, or None to start from the beginning.

        Raises:
            UserError: there are results that would be overwritten, checkpoints of another configuration, or
                no permission to write.
        """
        newest = self.newest_checkpoint()
        if newest is None and self.adapter.exists():
            raise UserError(f"{self.adapter} holds a finished adapter; choose another output.")
        if newest is not None and not resume:
            raise UserError(
                f"{self.root} holds checkpoints of an earlier run; continue it with --resume, "
                "or choose another output."
            )
        if newest is not None:
            difference = _difference(load_state(newest), identity)
            if difference:
                raise UserError(
                    f"{self.root} holds checkpoints of another configuration ({difference}); "
                    "undo the change, or choose another output."
                )
        self._check_writable()
        return newest

    def write_config(self, config: TrainingConfig) -> None:
        """Keep the configuration with every default written out."""
        partial = self.root / ".config.yaml.partial"
        partial.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        os.replace(partial, self.root / "config.yaml")

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
    try:  # a checkpoint of an older version lacks newer fields: their defaults count
        config = make_config(there.get("config", {})).model_dump(mode="json")
    except UserError:
        config = there.get("config", {})
    old = _flat({**there, "config": config})
    new = _flat(here)
    names = [name for name in {**new, **old} if name.split(".")[0] in here]
    return "; ".join(
        f"{name.removeprefix('config.')} is {_shown(old, name)} there and {_shown(new, name)} here"
        for name in names
        if name.removeprefix("config.") not in FREE_FIELDS and _shown(old, name) != _shown(new, name)
    )


def _shown(values: dict[str, Any], name: str) -> str:
    return repr(values[name]) if name in values else "absent"


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
