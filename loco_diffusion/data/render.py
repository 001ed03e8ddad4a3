"""Analytic ray casting of `scenes`: pictures, depth and object masks, vectorised over scenes and pixels.

Every pixel is one ray; pixels where the colour jumps are then averaged over four more rays. Each solid is a unit
primitive in its own frame (moved, turned and scaled to the scene), so one formula a kind serves camera and shadow
rays alike. Vectors travel as tuples of three tensors, which keeps every operation elementwise and cheap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from loco_diffusion.data.scenes import KINDS, MAX_OBJECTS, Scene, SceneTensors, to_tensors

NEAR, FAR = 3.5, 40.0  # ray lengths that become depth 1 and 0
_NEVER = 1e9
_BOX, _BOX_TOP = 0.85, 1.6
_CYLINDER, _CYLINDER_TOP = 0.8, 1.8
_CONE_TOP = 2.0
_VISIBLE = 0.06  # a step between neighbours' colours that deserves smoothing
_SUBPIXELS = ((-0.25, -0.25), (0.25, -0.25), (-0.25, 0.25), (0.25, 0.25))

Vector = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Rendering(NamedTuple):
    """`image` (B, 3, H, W) in [0, 1]; `depth` (B, H, W), inverse ray length scaled to [0, 1], near is 1, sky is 0;
    `masks` (B, MAX_OBJECTS, H, W) bool, the visible pixels of each solid in the caption's order."""

    image: torch.Tensor
    depth: torch.Tensor
    masks: torch.Tensor


def render(scenes: Sequence[Scene], size: int | tuple[int, int] = 128) -> Rendering:
    """Draw scenes at `size` pixels: one side of a square, or (height, width)."""
    height, width = (size, size) if isinstance(size, int) else size
    tensors = to_tensors(scenes)
    rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    pixels = torch.stack([columns, rows], dim=-1).reshape(1, -1, 2).float().expand(len(scenes), -1, -1)
    color, length, hit = _trace(tensors, pixels, height, width)
    image = color.reshape(-1, 3, height, width)
    image = _smooth_edges(tensors, image, pixels)
    disparity = (1 / length - 1 / FAR) / (1 / NEAR - 1 / FAR)
    masks = hit[:, None, :] == torch.arange(MAX_OBJECTS)[None, :, None]
    return Rendering(
        image.clamp(0, 1),
        disparity.clamp(0, 1).reshape(-1, height, width),
        masks.reshape(-1, MAX_OBJECTS, height, width),
    )


def project(scenes: SceneTensors, points: torch.Tensor, size: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """Where points of the world appear in square pictures.

    Args:
        scenes: B scenes.
        points: (B, K, 3), in front of the camera.
        size: of the pictures, in pixels.

    Returns:
        Columns and rows (B, K, 2) in pixels from the top left corner, and pixels to a unit of length (B, K).
    """
    away = points - scenes.camera[:, None]
    along, right, down = (away @ axis[..., None] for axis in _camera_axes(scenes))
    scale = size / (2 * torch.tan(scenes.fov / 2))[:, None, None] / along
    return size / 2 + torch.cat([right, down], dim=-1) * scale, scale[..., 0]


def horizon(scenes: SceneTensors, size: int = 128) -> torch.Tensor:
    """Rows (B,) of the horizon in square pictures, in pixels from the top; negative where no sky is in view."""
    forward, _, down = _camera_axes(scenes)
    return size / 2 - forward[:, 2] / down[:, 2] * size / (2 * torch.tan(scenes.fov / 2))


def _smooth_edges(scenes: SceneTensors, image: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Average four sub-pixel rays wherever a neighbour's colour differs visibly."""
    batch, _, height, width = image.shape
    jump = torch.zeros(batch, height, width)
    across = (image[..., 1:] - image[..., :-1]).abs().amax(1)
    down = (image[:, :, 1:] - image[:, :, :-1]).abs().amax(1)
    jump[..., 1:] = across
    jump[..., :-1] = torch.maximum(jump[..., :-1], across)
    jump[:, 1:] = torch.maximum(jump[:, 1:], down)
    jump[:, :-1] = torch.maximum(jump[:, :-1], down)
    most = int((jump > _VISIBLE).flatten(1).sum(1).max())
    if most == 0:
        return image
    steepness, chosen = jump.flatten(1).topk(most, dim=1)
    here = pixels.gather(1, chosen[..., None].expand(-1, -1, 2))
    rays = torch.cat([here + torch.tensor(offset) for offset in _SUBPIXELS], dim=1)
    color = _trace(scenes, rays, height, width)[0].reshape(batch, 3, len(_SUBPIXELS), most).mean(2)
    flat, where = image.flatten(2), chosen[:, None].expand(-1, 3, -1)
    # Scenes with fewer edges than the batch's most keep their further pixels, so no scene depends on its batch.
    color = torch.where(steepness[:, None] > _VISIBLE, color, flat.gather(2, where))
    flat = flat.scatter(2, where, color)
    return flat.reshape(image.shape)


def _trace(
    scenes: SceneTensors, pixels: torch.Tensor, height: int, width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Follow the rays through `pixels` (B, P, 2): colour (B, 3, P), ray length (B, P), solid hit or -1 (B, P)."""
    origin, ray = _camera_rays(scenes, pixels, height, width)
    along, solid = _nearest_solid(scenes, origin, ray)
    to_ground = torch.where(ray[2] < -1e-4, -origin[2] / ray[2].clamp(max=-1e-4), _NEVER)
    length = torch.minimum(along, to_ground)
    on_solid, seen = along < to_ground, length < _NEVER
    solid = torch.where(on_solid, solid, -1)
    point: Vector = (
        origin[0] + length * ray[0],
        origin[1] + length * ray[1],
        origin[2] + length * ray[2],
    )
    hits = on_solid.nonzero(as_tuple=True)
    normal, surface, glossy = _surface(scenes, tuple(axis[hits] for axis in point), hits[0], solid[hits])
    up = torch.zeros_like(length), torch.zeros_like(length), torch.ones_like(length)
    normals: Vector = tuple(u.index_put(hits, n) for u, n in zip(up, normal, strict=True))  # type: ignore[assignment]
    lit = _light(scenes, point, normals, seen)

    color = _ground_color(scenes, point, length, ray, height) * (0.38 + 0.62 * lit)[:, None]
    haze = (1 - torch.exp(-((length / 30) ** 2)))[:, None]
    color = color + haze * (scenes.sky[:, 0, :, None] - color)
    color = torch.where(seen[:, None], color, _sky_color(scenes.sky[..., None], ray[2][:, None]))
    shaded = surface * (0.38 + 0.62 * lit[hits])[:, None]
    gloss = _gloss(scenes, tuple(axis[hits] for axis in ray), normal, lit[hits], hits[0])
    color.transpose(1, 2)[hits] = shaded + glossy[:, None] * gloss
    return color, torch.where(seen, length, _NEVER), solid


def _camera_rays(
    scenes: SceneTensors, pixels: torch.Tensor, height: int, width: int
) -> tuple[Vector, Vector]:
    forward, right, down = _camera_axes(scenes)
    spread = 2 * torch.tan(scenes.fov / 2)[:, None] / min(height, width)
    x = (pixels[..., 0] - width / 2) * spread
    y = (pixels[..., 1] - height / 2) * spread
    inverse = torch.rsqrt(1 + x * x + y * y)
    ray = tuple(
        (forward[:, i, None] + x * right[:, i, None] + y * down[:, i, None]) * inverse for i in range(3)
    )
    origin = tuple(scenes.camera[:, i, None] for i in range(3))
    return origin, ray  # type: ignore[return-value]


def _camera_axes(scenes: SceneTensors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unit vectors (B, 3) along the view, to its right and down its picture."""
    forward = torch.nn.functional.normalize(scenes.target - scenes.camera, dim=-1)
    right = torch.nn.functional.normalize(
        torch.linalg.cross(forward, torch.tensor([[0.0, 0.0, 1.0]])), dim=-1
    )
    return forward, right, torch.linalg.cross(forward, right)


def _nearest_solid(scenes: SceneTensors, origin: Vector, ray: Vector) -> tuple[torch.Tensor, torch.Tensor]:
    """Ray parameter of the first solid hit (or _NEVER) and its index, both (B, P)."""
    batch = scenes.kind.shape[0]
    count = max(origin[0].shape[1], ray[0].shape[1])
    lengths = torch.full((batch, MAX_OBJECTS, count), _NEVER)
    for kind, intersect in enumerate((_hit_sphere, _hit_box, _hit_cylinder, _hit_cone)):
        scene, slot = (scenes.kind == kind).nonzero(as_tuple=True)
        if len(scene):
            start, way = _to_local(scenes, scene, slot, origin, ray)
            lengths[scene, slot] = intersect(start, way)
    nearest = lengths.min(dim=1)
    return nearest.values, nearest.indices


def _to_local(
    scenes: SceneTensors, scene: torch.Tensor, slot: torch.Tensor, origin: Vector, ray: Vector
) -> tuple[Vector, Vector]:
    """Origins and directions in the frame of solids (M = len(scene)), where each is a unit primitive."""
    place, yaw = scenes.place[scene, slot], scenes.yaw[scene, slot, None]
    shrink = 1 / scenes.radius[scene, slot, None]
    cos, sin = torch.cos(yaw) * shrink, torch.sin(yaw) * shrink
    x, y = origin[0][scene] - place[:, 0, None], origin[1][scene] - place[:, 1, None]
    start = cos * x + sin * y, cos * y - sin * x, origin[2][scene] * shrink
    x, y = ray[0][scene], ray[1][scene]
    return start, (cos * x + sin * y, cos * y - sin * x, ray[2][scene] * shrink)


def _positive(length: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    return torch.where(valid & (length > 1e-3), length, _NEVER)


def _hit_sphere(o: Vector, d: Vector) -> torch.Tensor:
    oz = o[2] - 1
    a = d[0] * d[0] + d[1] * d[1] + d[2] * d[2]
    b = o[0] * d[0] + o[1] * d[1] + oz * d[2]
    root = b * b - a * (o[0] * o[0] + o[1] * o[1] + oz * oz - 1)
    return _positive((-b - root.clamp(min=0).sqrt()) / a, root > 0)


def _hit_box(o: Vector, d: Vector) -> torch.Tensor:
    enter, leave = None, None
    for axis, (low, high) in enumerate(((-_BOX, _BOX), (-_BOX, _BOX), (0.0, _BOX_TOP))):
        inverse = 1 / torch.where(d[axis].abs() < 1e-6, 1e-6, d[axis])
        first, second = (low - o[axis]) * inverse, (high - o[axis]) * inverse
        near, far = torch.minimum(first, second), torch.maximum(first, second)
        enter = near if enter is None else torch.maximum(enter, near)
        leave = far if leave is None else torch.minimum(leave, far)
    assert enter is not None and leave is not None
    return _positive(enter, enter < leave)


def _hit_cylinder(o: Vector, d: Vector) -> torch.Tensor:
    a = (d[0] * d[0] + d[1] * d[1]).clamp(min=1e-9)
    b = o[0] * d[0] + o[1] * d[1]
    root = b * b - a * (o[0] * o[0] + o[1] * o[1] - _CYLINDER**2)
    side = (-b - root.clamp(min=0).sqrt()) / a
    z = o[2] + side * d[2]
    side = _positive(side, (root > 0) & (z > 0) & (z < _CYLINDER_TOP))
    top = (_CYLINDER_TOP - o[2]) / torch.where(d[2].abs() < 1e-6, 1e-6, d[2])
    x, y = o[0] + top * d[0], o[1] + top * d[1]
    return torch.minimum(side, _positive(top, x * x + y * y < _CYLINDER**2))


def _hit_cone(o: Vector, d: Vector) -> torch.Tensor:
    """x² + y² = ((2 − z)/2)², 0 < z < 2: a quadratic that may open either way, so both roots are tried."""
    slope = 1 / _CONE_TOP
    oz, dz = (o[2] - _CONE_TOP) * slope, d[2] * slope
    a = d[0] * d[0] + d[1] * d[1] - dz * dz
    a = torch.where(a.abs() < 1e-6, 1e-6, a)
    b = o[0] * d[0] + o[1] * d[1] - oz * dz
    root = b * b - a * (o[0] * o[0] + o[1] * o[1] - oz * oz)
    spread = root.clamp(min=0).sqrt()
    best = None
    for sign in (-1, 1):
        length = (-b + sign * spread) / a
        z = o[2] + length * d[2]
        length = _positive(length, (root > 0) & (z > 0) & (z < _CONE_TOP))
        best = length if best is None else torch.minimum(best, length)
    assert best is not None
    return best


def _surface(
    scenes: SceneTensors, point: tuple[torch.Tensor, ...], scene: torch.Tensor, solid: torch.Tensor
) -> tuple[Vector, torch.Tensor, torch.Tensor]:
    """World normal, colour (N, 3) and gloss (N,) at N points on solids."""
    place, yaw, radius = scenes.place[scene, solid], scenes.yaw[scene, solid], scenes.radius[scene, solid]
    cos, sin = torch.cos(yaw), torch.sin(yaw)
    x, y = (point[0] - place[:, 0]) / radius, (point[1] - place[:, 1]) / radius
    local: Vector = (cos * x + sin * y, cos * y - sin * x, point[2] / radius)
    n = _local_normal(local, scenes.kind[scene, solid])
    normal: Vector = (cos * n[0] - sin * n[1], sin * n[0] + cos * n[1], n[2])
    return normal, scenes.color[scene, solid], scenes.glossy[scene, solid]


def _local_normal(p: Vector, kind: torch.Tensor) -> Vector:
    x, y, z = p
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    around = (x * x + y * y).sqrt().clamp(min=1e-6)
    reach = torch.stack([x.abs() / _BOX, y.abs() / _BOX, (z - _BOX_TOP / 2).abs() / (_BOX_TOP / 2)])
    face = reach.argmax(0)
    on_top = z > _CYLINDER_TOP - 1e-3
    tilt = 1 / math.sqrt(1 + 1 / _CONE_TOP**2)
    by_kind = {
        "sphere": (x, y, z - 1),
        "box": (
            torch.where(face == 0, x.sign(), zero),
            torch.where(face == 1, y.sign(), zero),
            torch.where(face == 2, one, zero),
        ),
        "cylinder": (
            torch.where(on_top, zero, x / around),
            torch.where(on_top, zero, y / around),
            torch.where(on_top, one, zero),
        ),
        "cone": (x / around * tilt, y / around * tilt, tilt / _CONE_TOP * one),
    }
    chosen = [zero, zero, one]
    for index, name in enumerate(KINDS):
        for axis in range(3):
            chosen[axis] = torch.where(kind == index, by_kind[name][axis], chosen[axis])
    return chosen[0], chosen[1], chosen[2]


def _light(scenes: SceneTensors, point: Vector, normal: Vector, seen: torch.Tensor) -> torch.Tensor:
    """Lambert's cosine where the light is not blocked, (B, P) in [0, 1]."""
    light: Vector = (scenes.light[:, 0, None], scenes.light[:, 1, None], scenes.light[:, 2, None])
    cosine = normal[0] * light[0] + normal[1] * light[1] + normal[2] * light[2]
    lift = 0.01
    start: Vector = (point[0] + lift * normal[0], point[1] + lift * normal[1], point[2] + lift * normal[2])
    blocked = _nearest_solid(scenes, start, light)[0] < _NEVER
    return torch.where(seen & ~blocked, cosine.clamp(min=0), 0.0)


def _gloss(
    scenes: SceneTensors,
    ray: tuple[torch.Tensor, ...],
    normal: Vector,
    lit: torch.Tensor,
    scene: torch.Tensor,
) -> torch.Tensor:
    """Blinn's highlight and a faint mirror of the sky at N points on solids, (N, 3)."""
    light = scenes.light[scene]
    half = [light[:, axis] - ray[axis] for axis in range(3)]
    size = (half[0] ** 2 + half[1] ** 2 + half[2] ** 2).sqrt().clamp(min=1e-6)
    cosine = ((half[0] * normal[0] + half[1] * normal[1] + half[2] * normal[2]) / size).clamp(min=0)
    facing = -(ray[0] * normal[0] + ray[1] * normal[1] + ray[2] * normal[2])
    mirror_z = ray[2] + 2 * facing * normal[2]
    grazing = (0.12 + 0.5 * (1 - facing.clamp(0, 1)) ** 3) * (mirror_z > 0)
    highlight = 0.75 * cosine**50 * (lit > 0)
    return highlight[:, None] + _sky_color(scenes.sky[scene], mirror_z[:, None]) * grazing[:, None]


def _sky_color(sky: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Blend of `sky` (B, 2, 3, ...), horizon and zenith, for rays that climb by `z` (broadcast to (B, 3, ...))."""
    return sky[:, 0] + (z / 0.5).clamp(0, 1) * (sky[:, 1] - sky[:, 0])


def _ground_color(
    scenes: SceneTensors, point: Vector, length: torch.Tensor, ray: Vector, height: int
) -> torch.Tensor:
    """Colour of the ground plane under each ray, (B, 3, P)."""
    cos, sin = torch.cos(scenes.ground_turn)[:, None], torch.sin(scenes.ground_turn)[:, None]
    tile = scenes.tile[:, None]
    u = torch.floor((cos * point[0] + sin * point[1]) / tile)
    v = torch.floor((cos * point[1] - sin * point[0]) / tile)
    pattern = scenes.pattern[:, None]
    second = (u + v * (pattern == 1)) % 2
    # Tiles smaller than about two pixels fade into their mean instead of flickering.
    footprint = length * (scenes.fov[:, None] / height) / ray[2].abs().clamp(min=1e-3)
    sharp = (1.5 - 2 * footprint / tile).clamp(0, 1)
    mix = (0.5 + sharp * (second - 0.5)) * (pattern > 0)
    tones = scenes.ground[..., None]
    return tones[:, 0] + mix[:, None] * (tones[:, 1] - tones[:, 0])
