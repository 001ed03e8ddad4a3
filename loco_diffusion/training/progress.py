"""What a run shows on the terminal while it trains."""

from __future__ import annotations

from datetime import timedelta

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def progress_bar(enabled: bool) -> Progress:
    """On standard error; its tasks may have a field `note`."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("left"),
        TextColumn("{task.fields[note]}", style="dim"),
        console=Console(stderr=True, highlight=False),
        disable=not enabled,
    )


def announce(progress: Progress, text: str) -> None:
    """A line that stays above the bars."""
    if not progress.disable:
        progress.console.print(text, markup=False, soft_wrap=not progress.console.is_terminal)


def annotate(progress: Progress, task: TaskID, note: str) -> None:
    """Write a note beside a task's bar; where no terminal shows bars, as a line of its own."""
    progress.update(task, note=note)
    if not progress.console.is_terminal:
        bar = progress.tasks[progress.task_ids.index(task)]
        seconds = bar.time_remaining
        left = "" if seconds is None else f", {timedelta(seconds=round(seconds))} left"
        announce(progress, f"{bar.description} {bar.completed:.0f}/{bar.total:.0f}: {note}{left}")
