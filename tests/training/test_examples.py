"""Training examples: what is cached equals what is computed, and random conditions stay random."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from rich.progress import Progress

from loco_diffusion.conditions import get_condition
from loco_diffusion.control.family import family_of
from loco_diffusion.data.sources import SceneSource
from loco_diffusion.errors import UserError
from loco_diffusion.training.config import make_config
from loco_diffusion.training.examples import Examples


@pytest.fixture
def make(flux: FluxPipeline) -> Callable[..., Examples]:
    """A function that makes examples of six 32-px scenes and prepares them."""

    def examples(condition: str, process: tuple[int, int] = (0, 1), **fields: Any) -> Examples:
        config = make_config({"condition": condition, "output": "unused", "steps": 1, **fields})
        made = Examples(
            config,
            SceneSource(6, 32),
            get_condition(condition),
            family_of(flux),
            flux,
            torch.device("cpu"),
            process,
        )
        with Progress(disable=True) as progress:
            made.prepare(progress)
        return made

    return examples


@pytest.mark.parametrize("input", ["pixels", "latents"])
@pytest.mark.parametrize("condition", ["canny", "deblur"])
def test_cached_equals_computed(make: Callable[..., Examples], condition: str, input: str) -> None:
    encoder = {"input": input}
    cached, computed = make(condition, encoder=encoder), make(condition, encoder=encoder, cache_gigabytes=0)
    assert cached.cached and not computed.cached
    assert computed.needs_models
    assert cached.needs_models == (input == "latents" and condition == "deblur")  # the blur is drawn anew
    batches = [ex.encode(ex.load([4, 0, 2], np.random.default_rng(7))) for ex in (cached, computed)]
    for name in ("keep", "sigmas", "noise"):
        assert torch.equal(getattr(batches[0], name), getattr(batches[1], name))
    torch.testing.assert_close(batches[0].maps.tokens, batches[1].maps.tokens)
    assert batches[0].maps.input == batches[1].maps.input == input
    assert batches[0].maps.grid == batches[1].maps.grid
    torch.testing.assert_close(batches[0].latents, batches[1].latents)
    torch.testing.assert_close(batches[0].text, batches[1].text)
    assert len(batches[0].maps) == 3


def test_random_conditions_are_drawn_in_every_batch(make: Callable[..., Examples]) -> None:
    for condition, random in (("mask", True), ("deblur", True), ("colorization", False)):
        examples = make(condition)
        first, second = (examples.load([1, 2], np.random.default_rng(seed)).maps for seed in (0, 1))
        assert torch.equal(first, second) != random
        assert torch.equal(first, examples.load([1, 2], np.random.default_rng(0)).maps)


def test_dropped_text_is_the_empty_prompt(make: Callable[..., Examples], flux: FluxPipeline) -> None:
    for cache in (0.0, 1.0):
        examples = make("canny", text_dropout=1.0, condition_dropout=1.0, cache_gigabytes=cache)
        batch = examples.encode(examples.load([0, 1], np.random.default_rng(0)))
        expected = family_of(flux).encode_prompts(flux, ["", ""])
        torch.testing.assert_close(batch.text, expected)
        assert not batch.keep.any()


def test_processes_share_the_pictures(make: Callable[..., Examples]) -> None:
    shards = [list(make("canny", (number, 4)).shard) for number in range(4)]
    assert sorted(sum(shards, [])) == list(range(6))
    with pytest.raises(UserError, match="6 pictures are too few for 7 processes"):
        make("canny", (6, 7))
