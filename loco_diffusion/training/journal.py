"""The log of a run, log.jsonl, one JSON object a line."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from loco_diffusion.errors import UserError

Record = dict[str, Any]
"""A line: an `event` ("start", "reference", "validation", or none for a report about steps), the `step` after
which it was written, the `time` in seconds since 1970, and what the event brings."""


class Journal:
    """The log of a run.

    Args:
        path: of log.jsonl; lines of steps after `step` are removed, since a resumed run takes them again.
        step: how many steps are done.
        enabled: False in all processes but the first.

    Attributes:
        records: all lines, also those of the run that is continued.

    Raises:
        UserError: it cannot be written, as on a full disk.
    """

    def __init__(self, path: Path, step: int, enabled: bool) -> None:
        self.path = path
        self.enabled = enabled
        self.records = [record for record in read_log(path) if record.get("step", 0) <= step] if step else []
        if enabled:
            partial = path.with_name(f".{path.name}.partial")
            try:
                partial.write_text("".join(json.dumps(record) + "\n" for record in self.records))
                os.replace(partial, path)
            except OSError as error:
                raise self._unwritable(error) from error

    def write(self, record: Record) -> None:
        """Append a record with the time.

        Raises:
            UserError: it cannot be written.
        """
        record = {**record, "time": time.time()}
        self.records.append(record)
        if self.enabled:
            try:
                with self.path.open("a") as file:
                    file.write(json.dumps(record) + "\n")
            except OSError as error:
                raise self._unwritable(error) from error

    def last(self, event: str) -> Record | None:
        """The newest record of an event."""
        return next((record for record in reversed(self.records) if record.get("event") == event), None)

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"The log {self.path} cannot be written ({error.strerror or error}); free space or mend permissions, "
            "then resume."
        )


def read_log(path: Path) -> list[Record]:
    """The records of a log.jsonl; none if there is no such file. A line that a killed run left unfinished is
    left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records
