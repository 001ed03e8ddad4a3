"""Ranks that differ from layer to layer, as peft's configurations say it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping


def rank_pattern(ranks: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """The r and the rank_pattern that give each layer its rank.

    Args:
        ranks: by the layers' full names; at least one.

    Returns:
        The most common rank, and the other ones by a pattern that no other layer's name matches.
    """
    [(common, _)] = Counter(ranks.values()).most_common(1)
    # peft also tries a pattern on the ends of names; "^" keeps it from the namesakes in inner modules.
    return common, {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != common}
