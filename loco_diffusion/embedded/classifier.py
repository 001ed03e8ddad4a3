"""Recipe of the packaged scene classifier, which judges what generated pictures show."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from loco_diffusion.data.render import horizon, project
from loco_diffusion.data.scenes import (
    COLORS,
    GROUNDS,
    MAX_OBJECTS,
    PATTERNS,
    SKIES,
    TRAIN_SEEDS,
    Scene,
    sample_scene,
    to_tensors,
)
from loco_diffusion.embedded.loop import half_precision, train
from loco_diffusion.embedded.pictures import SIZE, rendered_scenes
from loco_diffusion.embedded.scene_classifier import SKY_ROWS, STRIDE, SceneClassifier

SCENES, BATCH = 12_000, 32
_HEIGHT = 0.85  # of a solid's middle, as a share of its radius: spheres 1, the others .8 to .9


class Labels(NamedTuple):
    """What is in N scenes. `kind` and `color` (N, 4) are -1 where there is no solid; `place` (N, 4, 3) holds
    the column and row of a solid's middle and its radius in the picture, in pixels; the others are (N,)."""

    kind: Tensor
    color: Tensor
    place: Tensor
    ground: Tensor
    pattern: Tensor
    sky: Tensor


def build_classifier(steps: int, runs: Path, device: str) -> SceneClassifier:
    """Train the classifier (or take it from its last checkpoint)."""
    torch.manual_seed(0)
    network = SceneClassifier().to(device, memory_format=torch.channels_last).train()
    pictures, _ = rendered_scenes(TRAIN_SEEDS[:SCENES], runs)
    labels = labels_of([sample_scene(seed) for seed in TRAIN_SEEDS[:SCENES]])

    def loss_of_step(step: int) -> Tensor:
        chosen = torch.from_numpy(np.random.default_rng(step).integers(SCENES, size=BATCH))
        batch = pictures[chosen].float() / 255
        told = Labels(*(part[chosen] for part in labels))
        if step % 2:
            batch, told = mirrored(batch, told)
        worn = degraded(batch).to(device, memory_format=torch.channels_last)
        with half_precision(device):
            logits = network(worn)
        return loss_of(tuple(part.float() for part in logits), Labels(*(part.to(device) for part in told)))

    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.05)
    train(runs / "classifier", network, [optimizer], loss_of_step, steps)
    return network.eval()


def labels_of(scenes: list[Scene]) -> Labels:
    """What is in scenes, for pictures of 128 px."""
    tensors = to_tensors(scenes)
    middle = torch.cat([tensors.place, _HEIGHT * tensors.radius[..., None]], dim=-1)
    pixels, scale = project(tensors, middle, SIZE)
    color = torch.full((len(scenes), MAX_OBJECTS), -1)
    for row, scene in enumerate(scenes):
        for slot, solid in enumerate(scene.solids):
            color[row, slot] = list(COLORS).index(solid.color)
    sky = torch.tensor([list(SKIES).index(scene.sky) for scene in scenes])
    return Labels(
        kind=tensors.kind,
        color=color,
        place=torch.cat([pixels, (tensors.radius * scale)[..., None]], dim=-1),
        ground=torch.tensor([list(GROUNDS).index(scene.ground) for scene in scenes]),
        pattern=torch.tensor([PATTERNS.index(scene.pattern) for scene in scenes]),
        sky=torch.where(horizon(tensors, SIZE) >= SKY_ROWS, sky, len(SKIES)),
    )


def mirrored(pictures: Tensor, labels: Labels) -> tuple[Tensor, Labels]:
    """Pictures (N, 3, H, W) with left and right exchanged, and their labels."""
    place = labels.place.clone()
    place[..., 0] = pictures.shape[3] - place[..., 0]
    return pictures.flip(3), labels._replace(place=place)


def degraded(pictures: Tensor) -> Tensor:
    """Pictures (N, 3, H, W) with a random blur, noise, blotches and contrast each, as small networks draw them."""

    def amount(most: float) -> Tensor:
        return most * torch.rand(len(pictures), 1, 1, 1)

    blurred = functional.avg_pool2d(functional.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    coarse = torch.randn(len(pictures), 3, *(side // 8 for side in pictures.shape[2:]))
    blotches = functional.interpolate(coarse, scale_factor=8, mode="bilinear")
    worn = torch.lerp(pictures, blurred, amount(0.9))
    worn = worn + amount(0.05) * blotches + amount(0.04) * torch.randn_like(pictures)
    return ((worn - 0.5) * (0.95 + amount(0.1)) + 0.48 + amount(0.04)).clamp(0, 1)


def loss_of(logits: tuple[Tensor, ...], labels: Labels) -> Tensor:
    """Focal loss of the centres ("Objects as Points", equation 1), cross entropies of everything else."""
    centers, kinds, colors, *whole = logits
    nearness, nearest = _nearness(labels, centers.shape[1:])
    losses = [_focal(centers, nearness)]
    for found, named in ((kinds, labels.kind), (colors, labels.color)):
        target = named.gather(1, nearest.flatten(1)).view_as(nearest).clamp(min=0)
        losses.append(
            (functional.cross_entropy(found, target, reduction="none") * nearness).sum() / nearness.sum()
        )
    pairs = zip(whole, (labels.ground, labels.pattern, labels.sky), strict=True)
    return torch.stack(losses + [functional.cross_entropy(found, named) for found, named in pairs]).sum()


def _nearness(labels: Labels, shape: tuple[int, int] | torch.Size) -> tuple[Tensor, Tensor]:
    """How near cells are to the middle of a solid, 1 in its own cell, and which solid that is; both (N, h, w)."""
    rows, columns = (torch.arange(count, device=labels.place.device) for count in shape)
    column, row, radius = (labels.place / STRIDE).unbind(-1)
    across = columns - column.floor()[..., None]
    down = rows - row.floor()[..., None]
    distance = across.square()[:, :, None, :] + down.square()[:, :, :, None]
    near = torch.exp(-distance / (2 * (radius / 4).clamp(min=0.6).square()[..., None, None]))
    best = torch.where((labels.kind >= 0)[..., None, None], near, 0.0).max(dim=1)
    return best.values, best.indices


def _focal(logits: Tensor, nearness: Tensor) -> Tensor:
    certainty = logits.sigmoid()
    at_middle = -functional.logsigmoid(logits) * (1 - certainty).square()
    elsewhere = -functional.logsigmoid(-logits) * certainty.square() * (1 - nearness) ** 4
    return torch.where(nearness == 1, at_middle, elsewhere).sum() / (nearness == 1).sum()
