"""The command line's CONDITION=VALUE options: their syntax and what must go together."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from loco_diffusion.bases import is_packaged
from loco_diffusion.errors import UserError


def parse_pairs(
    option: str, texts: Sequence[str], conditions: Collection[str] | None = None
) -> dict[str, str]:
    """Values by condition.

    Args:
        option: its name, for messages.
        texts: each of the form CONDITION=VALUE.
        conditions: those that may occur; default: any.

    Raises:
        UserError: a text is of another form, or its condition is repeated or may not occur.
    """
    pairs: dict[str, str] = {}
    for text in texts:
        condition, _, value = text.partition("=")
        if not condition or not value:
            raise UserError(
                f"{option} {text!r} has another form than CONDITION=VALUE; write {option} canny=..."
            )
        if condition in pairs:
            raise UserError(f"{option} is given twice for {condition}; give it once.")
        if conditions is not None and condition not in conditions:
            raise UserError(
                f"{option} is given for {condition!r}, which is not controlled; "
                f"add --control {condition}=PATH or --control-image {condition}=PATH."
            )
        pairs[condition] = value
    return pairs


def parse_controls(
    control: Sequence[str], control_image: Sequence[str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Paths by condition of --control (ordinary pictures) and of --control-image (ready maps).

    Raises:
        UserError: see `parse_pairs`; or a condition has both.
    """
    pictures, ready = parse_pairs("--control", control), parse_pairs("--control-image", control_image)
    for condition in pictures.keys() & ready.keys():
        raise UserError(f"{condition} has both --control and --control-image; give one of them.")
    return pictures, ready


def parse_strengths(texts: Sequence[str], conditions: Collection[str]) -> dict[str, float]:
    """Strengths by condition; 1 where none is given.

    Raises:
        UserError: see `parse_pairs`; or a strength is no finite number.
    """
    strengths = dict.fromkeys(conditions, 1.0)
    for condition, text in parse_pairs("--strength", texts, conditions).items():
        try:
            strengths[condition] = float(text)
        except ValueError:
            strengths[condition] = math.nan
        if not math.isfinite(strengths[condition]):
            raise UserError(f"The strength of {condition} must be a finite number, got {text!r}; try 0.8.")
    return strengths


def parse_adapters(
    texts: Sequence[str], conditions: Collection[str], model: str | None
) -> dict[str, str | None]:
    """Adapters by condition, as `generation.Session.load_adapters` takes them: None for the packaged one.

    Raises:
        UserError: see `parse_pairs`; or there is a model of its own but no adapter for a condition.
    """
    given = parse_pairs("--adapter", texts, conditions)
    for condition in conditions:
        if not is_packaged(model) and condition not in given:
            raise UserError(
                f"The packaged adapters are for the packaged bases only; for {model} "
                f"add --adapter {condition}=DIR_OR_HUB_ID."
            )
    return {condition: given.get(condition) for condition in conditions}


def check_prompt(prompt: str) -> None:
    """Raise UserError if there is no text in the prompt, or bytes that are no text."""
    if not prompt.strip():
        raise UserError("The prompt is empty; say what to draw.")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError("The prompt is not valid UTF-8 text; type it anew.") from error
