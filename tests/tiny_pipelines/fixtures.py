"""Fixtures for tests that run for every family, and on both routes."""

from __future__ import annotations

from typing import Any

import pytest

from loco_diffusion.control.adapter import Route
from tiny_pipelines import TINY, Tiny
from tiny_pipelines.controlled import ROUTES, fresh


@pytest.fixture(params=TINY.values(), ids=TINY)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return request.param


@pytest.fixture
def pipe(tiny: Tiny) -> Any:
    """A pipeline that the test may change."""
    return fresh(tiny)


@pytest.fixture(params=ROUTES)
def route(request: pytest.FixtureRequest) -> Route:
    return request.param
