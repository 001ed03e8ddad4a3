"""How much of what a prompt names a picture shows, as far as the scene classifier sees it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import permutations
from statistics import mean

from loco_diffusion.embedded.scene_classifier import Sighting

JUDGED_BY = ("color", "kind", "ground", "sky")
TITLES = {
    "color": "colours of solids",
    "kind": "kinds of solids",
    "both": "colour and kind",
    "count": "number of solids",
    "ground": "ground (colour and pattern)",
    "ground_color": "colour of the ground",
    "pattern": "pattern of the ground",
    "sky": "sky",
}
Solid = tuple[str, str]  # kind and colour


class PromptAccuracy:
    """Shares of what is right, over pictures."""

    def __init__(self) -> None:
        self._right: Counter[str] = Counter()
        self._asked: Counter[str] = Counter()
        self._skies: list[bool] = []

    def update(self, seen: Sighting, wanted: Sighting, sky_counts: bool = True) -> None:
        """Take in a picture.

        Args:
            seen: what the classifier sees.
            wanted: what the prompt names, or what there really is.
            sky_counts: whether the sky is to be judged; a prompt does not tell that it must be in view.
        """
        for kind, color in matches(seen.solids, wanted.solids):
            self._add(kind=kind, color=color, both=kind and color)
        color, pattern = seen.ground == wanted.ground, seen.pattern == wanted.pattern
        self._add(
            count=len(seen.solids) == len(wanted.solids),
            ground=color and pattern,
            ground_color=color,
            pattern=pattern,
        )
        self._skies.append(seen.sky is not None)
        if sky_counts:
            self._add(sky=seen.sky == wanted.sky)

    def _add(self, **answers: bool) -> None:
        self._asked.update(answers.keys())
        self._right.update(name for name, right in answers.items() if right)

    def compute(self) -> dict[str, float | None]:
        """Each share in [0, 1] by the keys of `TITLES`, None where nothing was judged; "mean" is that of `JUDGED_BY`,
        "sky_in_view" the share of pictures in which a sky is seen."""
        shares = {
            name: self._right[name] / self._asked[name] if self._asked[name] else None for name in TITLES
        }
        judged = [share for name in JUDGED_BY if (share := shares[name]) is not None]
        return shares | {"mean": mean(judged), "sky_in_view": mean(self._skies)}


def matches(seen: Sequence[Solid], wanted: Sequence[Solid]) -> list[tuple[bool, bool]]:
    """Whether the kind and whether the colour of each wanted solid is right in the seen one assigned to it.

    The assignment is the one with most right answers, among these the one with most solids right in both; a
    wanted solid without a partner is wrong in both, and seen ones without a partner do not count.
    """
    partners: list[Solid | None] = [*seen, *[None] * (len(wanted) - len(seen))]
    return max(
        (
            [
                (one is not None and one[0] == kind, one is not None and one[1] == color)
                for one, (kind, color) in zip(chosen, wanted, strict=True)
            ]
            for chosen in permutations(partners, len(wanted))
        ),
        key=lambda answers: (sum(map(sum, answers)), sum(map(all, answers))),
    )
