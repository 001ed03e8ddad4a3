"""What every command of the toolkit does on the terminal: errors, notes, progress, and quiet libraries.

Every error that the user can mend is one line on standard error and exit status 2.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from loco_diffusion.errors import UserError

USER_ERROR, INTERRUPTED = 2, 130


def run_app(app: typer.Typer, name: str, arguments: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        app: the commands.
        name: of the program.
        arguments: without the program's name; default: those of the process.

    Returns:
        The exit status: 0, 2 for an error of the user's, 130 when interrupted.
    """
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    given = None if arguments is None else list(arguments)
    try:
        status = app(given, prog_name=name, standalone_mode=False) or 0
    except UserError as error:
        return _fail(str(error), USER_ERROR)
    except (typer.Abort, KeyboardInterrupt):
        status = INTERRUPTED
    except Exception as error:
        # Typer reports wrong usage by click's exception types, of which newer versions have their own copy.
        if not hasattr(error, "format_message"):
            raise
        return _fail(f"{error.format_message().rstrip('.')}; see {name} --help.", USER_ERROR)
    return _fail("Interrupted.", INTERRUPTED) if status == INTERRUPTED else int(status)


def quiet_libraries() -> None:
    """Keep the libraries' messages and bars away: what the user must know we say ourselves."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity(logging.CRITICAL)
        library.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)


def progress_bars() -> Progress:
    """Bars on standard error that vanish when done; nothing where it is no terminal."""
    console = Console(stderr=True)
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def say(text: str) -> None:
    """A result, one line on standard output."""
    sys.stdout.write(text + "\n")


def note(text: str) -> None:
    """What the user should know although all goes well, one line on standard error."""
    sys.stderr.write(f"Note: {text}\n")


def _fail(text: str, status: int) -> int:
    sys.stderr.write(f"Error: {' '.join(text.split())}\n")
    return status
