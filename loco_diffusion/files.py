"""Writing a text file so that it is whole at any moment."""

from __future__ import annotations

import os
from pathlib import Path

from loco_diffusion.errors import UserError


def write_text(path: Path, text: str) -> Path:
    """Write a file atomically; returns its path.

    Raises:
        UserError: it cannot be written, as on a full disk; what was there stays.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}); free space or mend permissions, then start "
            "again where it stopped."
        ) from error
    return path
