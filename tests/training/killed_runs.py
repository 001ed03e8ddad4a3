"""Training runs in processes of their own, which really die: killed at a point of their work, or out of space."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["loco_diffusion.training.trainer", "diffusers.pipelines.flux.pipeline_flux"])
KILLED = -signal.SIGKILL
REFUSED = 2


@dataclass(frozen=True)
class Moment:
    """When a process kills itself: just before it does something to a path, as Python's audit events tell it.

    Attributes:
        event: "open", "os.mkdir", "os.rename" or "shutil.rmtree".
        ending: of the path that is written, made or deleted; of a rename, that of the new name.
    """

    event: str
    ending: str

    def watch(self) -> None:
        """Kill this process at the moment."""

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event == self.event:
                path = arguments[1 if event == "os.rename" else 0]
                if isinstance(path, (str, os.PathLike)) and os.fspath(path).endswith(self.ending):
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)


def train_in_process(
    fields: dict[str, Any],
    moment: Moment | None = None,
    largest_file: int | None = None,
    meanwhile: Callable[[int], None] | None = None,
) -> int:
    """Train with `resume="latest"` in a new process.

    Args:
        fields: of the configuration.
        moment: when it is to be killed.
        largest_file: in bytes, beyond which the system refuses to write; standing in for a full disk.
        meanwhile: called with the process's id while it runs.

    Returns:
        Its exit status: 0, 2 for a UserError (its text is in `<output>.error`), or minus the signal.
    """
    process = _CONTEXT.Process(target=_run, args=(fields, moment, largest_file))
    process.start()
    if meanwhile is not None:
        assert process.pid is not None
        meanwhile(process.pid)
    process.join(300)
    assert process.exitcode is not None, "the run hangs"
    return process.exitcode


def kill_when(ready: Callable[[], bool]) -> Callable[[int], None]:
    """For `meanwhile`: SIGKILL as soon as something is so."""

    def kill(pid: int) -> None:
        deadline = time.monotonic() + 120
        while not ready():
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(pid, signal.SIGKILL)

    return kill


def _run(fields: dict[str, Any], moment: Moment | None, largest_file: int | None) -> None:
    import torch

    from loco_diffusion.errors import UserError
    from loco_diffusion.training.config import make_config
    from loco_diffusion.training.trainer import train

    torch.set_num_threads(1)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    if moment is not None:
        moment.watch()
    try:
        train(make_config(fields), resume="latest")
    except UserError as error:
        Path(f"{fields['output']}.error").write_text(str(error))
        sys.exit(REFUSED)
