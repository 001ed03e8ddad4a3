"""A procedural world of coloured solids on a ground under a sky, with exact captions.

A scene is a handful of numbers drawn from its seed alone, so scene 17 is the same in every batch and on every
machine. Lengths are world units, angles radians, colours linear RGB in [0, 1]; the ground is the plane z = 0 and
the camera looks along +y. `render.py` draws the pictures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

MAX_OBJECTS = 4

TRAIN_SEEDS = range(0, 10_000_000)
VALIDATION_SEEDS = range(10_000_000, 20_000_000)
TEST_SEEDS = range(20_000_000, 30_000_000)

KINDS = ("sphere", "box", "cylinder", "cone")
MATERIALS = ("matte", "glossy")
SIZES = {"small": 0.5, "medium": 0.75, "large": 1.05}
COLORS = {
    "red": (0.82, 0.08, 0.07),
    "orange": (0.95, 0.45, 0.05),
    "yellow": (0.95, 0.85, 0.10),
    "green": (0.10, 0.60, 0.15),
    "cyan": (0.10, 0.75, 0.80),
    "blue": (0.08, 0.20, 0.80),
    "purple": (0.45, 0.12, 0.65),
    "pink": (0.95, 0.50, 0.70),
    "white": (0.95, 0.95, 0.95),
    "black": (0.05, 0.05, 0.06),
}
PATTERNS = ("plain", "checkered", "striped")
GROUNDS = {  # two tones each; a plain ground uses the first
    "gray": ((0.62, 0.62, 0.62), (0.36, 0.36, 0.37)),
    "beige": ((0.82, 0.73, 0.56), (0.58, 0.48, 0.34)),
    "brown": ((0.48, 0.32, 0.20), (0.28, 0.18, 0.11)),
    "olive": ((0.50, 0.55, 0.26), (0.28, 0.33, 0.14)),
    "teal": ((0.32, 0.56, 0.55), (0.15, 0.33, 0.35)),
}
SKIES = {  # horizon, zenith
    "blue": ((0.78, 0.89, 0.98), (0.24, 0.48, 0.85)),
    "sunset": ((0.98, 0.72, 0.42), (0.42, 0.28, 0.52)),
    "overcast": ((0.82, 0.83, 0.85), (0.60, 0.63, 0.68)),
    "night": ((0.20, 0.22, 0.36), (0.03, 0.04, 0.12)),
    "dawn": ((0.97, 0.80, 0.80), (0.50, 0.62, 0.86)),
}


@dataclass(frozen=True)
class Solid:
    """One object; `x`, `y` is where it stands on the ground, `radius` its size, `yaw` its turn about z."""

    kind: str
    color: str
    material: str
    size: str
    x: float
    y: float
    yaw: float

    @property
    def radius(self) -> float:
        return SIZES[self.size]

    def phrase(self) -> str:
        return f"a {self.size} {self.material} {self.color} {self.kind}"


@dataclass(frozen=True)
class Scene:
    """Everything that a picture depends on. Solids are sorted from left to right as the camera sees them."""

    solids: tuple[Solid, ...]
    pattern: str
    ground: str
    ground_turn: float
    tile: float
    sky: str
    light: tuple[float, float, float]  # unit vector towards the light
    camera: tuple[float, float, float]
    target: tuple[float, float, float]
    fov: float  # of the short side

    @property
    def caption(self) -> str:
        """What is in the picture, exactly: solids from left to right, the ground, the sky."""
        phrases = [solid.phrase() for solid in self.solids]
        things = phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]
        return f"{things} on a {self.pattern} {self.ground} ground under a {self.sky} sky"


def sample_scene(seed: int) -> Scene:
    """The scene of a seed (non-negative)."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, MAX_OBJECTS + 1))
    distance, elevation = rng.uniform(6.5, 8.5), math.radians(rng.uniform(12, 38))
    aim = rng.uniform(-0.35, 0.35, size=2)
    sun_turn, sun_height = rng.uniform(0, 2 * math.pi), math.radians(rng.uniform(35, 65))
    return Scene(
        solids=_place_solids(rng, count),
        pattern=_pick(rng, PATTERNS),
        ground=_pick(rng, tuple(GROUNDS)),
        ground_turn=float(rng.uniform(0, math.pi)),
        tile=float(rng.uniform(0.8, 1.3)),
        sky=_pick(rng, tuple(SKIES)),
        light=(
            math.cos(sun_turn) * math.cos(sun_height),
            math.sin(sun_turn) * math.cos(sun_height),
            math.sin(sun_height),
        ),
        camera=(
            float(rng.uniform(-0.8, 0.8)),
            -distance * math.cos(elevation),
            distance * math.sin(elevation) + 0.5,
        ),
        target=(float(aim[0]), 0.0, float(0.75 + 0.5 * aim[1])),
        fov=math.radians(float(rng.uniform(38, 46))),
    )


def _pick(rng: np.random.Generator, names: Sequence[str]) -> str:
    return names[int(rng.integers(len(names)))]


def _place_solids(rng: np.random.Generator, count: int) -> tuple[Solid, ...]:
    """Solids that do not touch and that do not hide one another from a camera in front of them."""
    sizes = tuple(SIZES) if count < MAX_OBJECTS else ("small", "medium")
    while True:
        solids: list[Solid] = []
        for _ in range(40):
            solid = Solid(
                kind=_pick(rng, KINDS),
                color=_pick(rng, tuple(COLORS)),
                material=_pick(rng, MATERIALS),
                size=_pick(rng, sizes),
                x=float(rng.uniform(-2.0, 2.0)),
                y=float(rng.uniform(-1.5, 1.8)),
                yaw=float(rng.uniform(0, math.pi / 2)),
            )
            in_view = abs(solid.x) + solid.radius < 2.4 + 0.3 * solid.y
            if in_view and all(_apart(solid, other) for other in solids):
                solids.append(solid)
            if len(solids) == count:
                return tuple(sorted(solids, key=lambda s: s.x))


def _apart(a: Solid, b: Solid) -> bool:
    reach = a.radius + b.radius
    return abs(a.x - b.x) > 0.75 * reach and math.hypot(a.x - b.x, a.y - b.y) > 1.15 * reach


@dataclass
class SceneTensors:
    """A batch of scenes as float32 tensors, solids padded to MAX_OBJECTS: what the renderer reads.

    Shapes: `kind` (B, 4) with -1 where there is no solid; `place` (B, 4, 2); `radius`, `yaw`, `glossy` (B, 4);
    `color` (B, 4, 3); `ground` (B, 2, 3); `sky` (B, 2, 3); `light`, `camera`, `target` (B, 3); the rest (B,).
    """

    kind: torch.Tensor
    place: torch.Tensor
    radius: torch.Tensor
    yaw: torch.Tensor
    glossy: torch.Tensor
    color: torch.Tensor
    pattern: torch.Tensor
    ground: torch.Tensor
    ground_turn: torch.Tensor
    tile: torch.Tensor
    sky: torch.Tensor
    light: torch.Tensor
    camera: torch.Tensor
    target: torch.Tensor
    fov: torch.Tensor


def to_tensors(scenes: Sequence[Scene]) -> SceneTensors:
    """Stack scenes for the renderer."""
    empty = Solid("none", "black", "matte", "small", 0.0, 0.0, 0.0)
    rows = [list(s.solids) + [empty] * (MAX_OBJECTS - len(s.solids)) for s in scenes]

    def per_solid(value) -> torch.Tensor:
        return torch.tensor([[value(solid) for solid in row] for row in rows], dtype=torch.float32)

    def per_scene(value) -> torch.Tensor:
        return torch.tensor([value(scene) for scene in scenes], dtype=torch.float32)

    return SceneTensors(
        kind=per_solid(lambda s: KINDS.index(s.kind) if s.kind in KINDS else -1).long(),
        place=per_solid(lambda s: (s.x, s.y)),
        radius=per_solid(lambda s: s.radius),
        yaw=per_solid(lambda s: s.yaw),
        glossy=per_solid(lambda s: float(s.material == "glossy")),
        color=per_solid(lambda s: COLORS[s.color]),
        pattern=per_scene(lambda s: PATTERNS.index(s.pattern)).long(),
        ground=per_scene(lambda s: GROUNDS[s.ground]),
        ground_turn=per_scene(lambda s: s.ground_turn),
        tile=per_scene(lambda s: s.tile),
        sky=per_scene(lambda s: SKIES[s.sky]),
        light=per_scene(lambda s: s.light),
        camera=per_scene(lambda s: s.camera),
        target=per_scene(lambda s: s.target),
        fov=per_scene(lambda s: s.fov),
    )
