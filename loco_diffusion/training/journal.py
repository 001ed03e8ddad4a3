"""What a run writes and shows while it trains: log.jsonl and a progress bar."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Journal:
    """The log of a run, one JSON object a line.

    Args:
        path: of log.jsonl; lines of steps after `step` are removed, since a resumed run takes them again.
        step: how many steps are done.
        enabled: False in all processes but the first.
    """

    def __init__(self, path: Path, step: int, enabled: bool) -> None:
        self.path = path
        self.enabled = enabled
        if enabled:
            kept = _lines_until(path, step) if step else []
            partial = path.with_name(f".{path.name}.partial")
            partial.write_text("".join(kept))
            os.replace(partial, path)

    def write(self, record: dict[str, Any]) -> None:
        """Append a record with the time, in seconds since 1970."""
        if self.enabled:
            with self.path.open("a") as file:
                file.write(json.dumps({**record, "time": time.time()}) + "\n")


def progress_bar(enabled: bool) -> Progress:
    """On standard error; its tasks may have a field `note`."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
        disable=not enabled,
    )


def _lines_until(path: Path, step: int) -> list[str]:
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [line for line in lines if _step_of(line) <= step]


def _step_of(line: str) -> float:
    """The line's step; infinite for a line that a killed run left unfinished."""
    try:
        return json.loads(line).get("step", 0)
    except ValueError:
        return float("inf")
