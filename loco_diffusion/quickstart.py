"""The first run: all conditions of one picture, drawn with control and without, scored, side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from PIL import Image

from loco_diffusion.generation import Sampling, Session
from loco_diffusion.grid import picture_grid
from loco_diffusion.images import fit
from loco_diffusion.scoring import SCORES, Score, TaskScores

CONDITIONS = ("canny", "depth", "mask", "colorization", "deblur")


@dataclass(frozen=True)
class Comparison:
    """One task: pictures of one prompt and one noise, with control and without.

    Attributes:
        condition: the task.
        score: what it is judged by.
        condition_map: extracted from the input picture.
        controlled: drawn with control.
        free: drawn without.
        with_control: the score of `controlled` against the input picture.
        without_control: the score of `free`.
    """

    condition: str
    score: Score
    condition_map: Image.Image
    controlled: Image.Image
    free: Image.Image
    with_control: float
    without_control: float


def compare(
    session: Session,
    image: Image.Image,
    prompt: str,
    seed: int = 0,
    sampling: Sampling | None = None,
    on_step: Callable[[str, int, int], None] | None = None,
) -> list[Comparison]:
    """Draw a picture for each condition that the session has an adapter for, and one without control.

    Args:
        session: with adapters named after their conditions.
        image: an RGB picture of any size; its centre is used.
        prompt: "" lets the conditions alone decide.
        seed: of the noise, the same for all pictures.
        sampling: default: the session's.
        on_step: called with what is drawn ("without control" or a condition), the steps done and their total.

    Raises:
        UserError: see `Session.generate`.
    """
    chosen = sampling or session.defaults
    original = fit(image, chosen.width, chosen.height)

    def draw(title: str, maps: Mapping[str, Image.Image]) -> Image.Image:
        def report(step: int, total: int) -> None:
            if on_step is not None:
                on_step(title, step, total)

        return session.generate([prompt], [seed], chosen, maps=maps, on_step=report)[0]

    free = draw("without control", {})
    comparisons = []
    for condition, info in session.controller.adapters.items():
        condition_map = info.make_condition().extract(original)
        controlled = draw(condition, {condition: condition_map})
        score = SCORES[condition][0]
        with_control, without_control = (
            _score(condition, score, picture, original) for picture in (controlled, free)
        )
        comparisons.append(
            Comparison(condition, score, condition_map, controlled, free, with_control, without_control)
        )
    return comparisons


def comparison_grid(image: Image.Image, comparisons: list[Comparison]) -> Image.Image:
    """One row a task: the input picture, its condition map, the picture with control, the one without."""
    size = comparisons[0].controlled.size
    original = fit(image, *size)
    rows = [(original, c.condition_map, c.controlled, c.free) for c in comparisons]
    labels = [
        f"{c.condition}\n{c.score.title}\nwith {c.with_control:.4g}\nwithout {c.without_control:.4g}"
        for c in comparisons
    ]
    return picture_grid(rows, labels, ["input", "condition", "with control", "without control"])


def _score(condition: str, score: Score, picture: Image.Image, original: Image.Image) -> float:
    scores = TaskScores(condition)
    scores.update([picture], [original])
    return scores.compute()[score.key]
