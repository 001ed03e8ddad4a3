"""Putting an adapter onto the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi, get_token

from loco_diffusion.adapters.peft_folder import one_line
from loco_diffusion.errors import UserError


def check_push(hub_id: str) -> None:
    """Check, before any costly work, that `push` can work, and make the repository if it is missing.

    Raises:
        UserError: the id is malformed, nobody is logged in, the hub is not reached, or it does not let us write.
    """
    if not re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", hub_id):
        raise UserError(f"{hub_id!r} is no repository of the Hugging Face Hub; give OWNER/NAME.")
    if get_token() is None:
        raise UserError(
            f"Nobody is logged in to the Hugging Face Hub, so nothing can be pushed to {hub_id}; run hf auth login, or "
            "set HF_TOKEN."
        )
    try:
        HfApi().create_repo(hub_id, exist_ok=True)  # passes for a repository that one may only read, too
        HfApi().auth_check(hub_id, write=True)
    except Exception as error:  # no connection, no rights, an unknown owner: many types
        raise UserError(
            f"{hub_id} cannot be written on the Hugging Face Hub ({_cause(error)}); check the name, the connection "
            "and your access (hf auth whoami)."
        ) from error


def push(folder: Path, hub_id: str) -> str:
    """Upload an adapter folder as one commit; returns the repository's address.

    Raises:
        UserError: it cannot be uploaded.
    """
    try:
        commit = HfApi().upload_folder(
            repo_id=hub_id, folder_path=folder, commit_message="Adapter trained with loco_diffusion"
        )
    except Exception as error:
        raise UserError(
            f"The adapter is in {folder}, but was not pushed to {hub_id} ({_cause(error)}); push it later with "
            f"hf upload {hub_id} {folder}."
        ) from error
    return str(commit.repo_url)


def _cause(error: Exception) -> str:
    return one_line(error)[:160].rstrip(".")
