"""Which row of a denoiser's batch gets which condition."""

from __future__ import annotations

import pytest
import torch

from loco_diffusion.control.rows import Rows
from loco_diffusion.errors import UserError


@pytest.mark.parametrize(
    ("number", "rows", "copies", "expected"),
    [
        (1, 4, 2, [0]),  # serves all
        (2, 2, 1, [0, 1]),
        (2, 4, 1, [0, 0, 1, 1]),  # two pictures of each prompt
        (2, 4, 2, [0, 1, 0, 1]),  # both halves of classifier-free guidance
        (2, 8, 2, [0, 0, 1, 1, 0, 0, 1, 1]),
    ],
)
def test_pictures_of_a_prompt_lie_side_by_side_in_each_half(
    number: int, rows: int, copies: int, expected: list[int]
) -> None:
    assert Rows(lambda: copies).spread(torch.arange(number), rows).tolist() == expected


def test_what_cannot_be_dealt_out_is_refused() -> None:
    with pytest.raises(UserError, match="3 condition maps for 4 pictures"):
        Rows(lambda: 2).spread(torch.arange(3), 8)
