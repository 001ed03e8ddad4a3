"""A network that names what a picture of a scene shows: its solids from left to right, the ground and the sky."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from loco_diffusion.data.render import horizon
from loco_diffusion.data.scenes import COLORS, GROUNDS, KINDS, MAX_OBJECTS, PATTERNS, SKIES, Scene, to_tensors

STRIDE = 4  # pixels along the side of a cell
SKY_ROWS = 2.0  # the sky is in view if the horizon is at least so many rows below the top of a 128-px picture
FOUND = 0.25  # a weaker peak is no solid
_COLORS, _GROUNDS, _SKIES = tuple(COLORS), tuple(GROUNDS), (*SKIES, None)


@dataclass(frozen=True)
class Sighting:
    """What a picture shows: `solids` are pairs of kind and colour from left to right; `sky` is None where none
    is in view."""

    solids: tuple[tuple[str, str], ...]
    ground: str
    pattern: str
    sky: str | None


class SceneClassifier(ModelMixin, ConfigMixin):
    """Centres of solids as peaks of a map ("Objects as Points", arXiv 1904.07850) on a feature pyramid
    (arXiv 1612.03144); kind and colour are read at the peaks, ground and sky from the whole picture.

    Args:
        channels: features at strides 2, 4, 8 and 16.
        pyramid: features of the cells.
    """

    @register_to_config
    def __init__(self, channels: tuple[int, ...] = (16, 32, 64, 96), pyramid: int = 48) -> None:
        super().__init__()
        first, *others = channels
        self.stem = _convolution(3, first, stride=2)
        widths = zip(channels, others, strict=False)
        self.stages = nn.ModuleList(
            nn.Sequential(_convolution(before, after, stride=2), _Residual(after)) for before, after in widths
        )
        self.laterals = nn.ModuleList(nn.Conv2d(width, pyramid, 1) for width in others)
        self.smooth = _convolution(pyramid, pyramid)
        self.cells = nn.Conv2d(pyramid, 1 + len(KINDS) + len(COLORS), 1)
        assert self.cells.bias is not None
        nn.init.constant_(self.cells.bias[:1], -3)  # hardly any cell is a middle
        self.whole = nn.Linear(2 * channels[-1], len(GROUNDS) + len(PATTERNS) + len(_SKIES))

    def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
        """Logits of pictures (B, 3, H, W) in [0, 1].

        Returns:
            centres (B, H/4, W/4); kinds (B, 4, H/4, W/4); colours (B, 10, H/4, W/4); ground (B, 5);
            pattern (B, 3); sky (B, 6), the last one for none in view.
        """
        features = self.stem(pictures * 2 - 1)
        levels = [features := stage(features) for stage in self.stages]
        pooled = torch.cat([features.mean((2, 3)), features.amax((2, 3))], dim=1)
        top_down = self.laterals[-1](levels[-1])
        for lateral, level in zip(reversed(self.laterals[:-1]), reversed(levels[:-1]), strict=True):
            top_down = nn.functional.interpolate(top_down, scale_factor=2) + lateral(level)
        centers, kinds, colors = self.cells(self.smooth(top_down)).split((1, len(KINDS), len(COLORS)), dim=1)
        whole = self.whole(pooled).split((len(GROUNDS), len(PATTERNS), len(_SKIES)), dim=1)
        return centers[:, 0], kinds, colors, *whole

    @torch.no_grad()
    def classify(self, pictures: Tensor) -> list[Sighting]:
        """What pictures (B, 3, H, W) in [0, 1] show."""
        return sightings(*self(pictures.to(self.device, self.dtype)))


def sightings(
    centers: Tensor, kinds: Tensor, colors: Tensor, ground: Tensor, pattern: Tensor, sky: Tensor
) -> list[Sighting]:
    """What logits say, see `SceneClassifier.forward`; of more than MAX_OBJECTS solids the most certain ones."""
    certainty = centers.sigmoid()
    peaks = certainty * (nn.functional.max_pool2d(certainty, 3, stride=1, padding=1) == certainty)
    best, where = peaks.flatten(1).topk(MAX_OBJECTS)
    kind, color = (logits.argmax(1).flatten(1).gather(1, where).tolist() for logits in (kinds, colors))
    columns = (where % centers.shape[2]).tolist()
    told = zip(*(logits.argmax(1).tolist() for logits in (ground, pattern, sky)), strict=True)
    seen = []
    for row, (ground_number, pattern_number, sky_number) in enumerate(told):
        found = [slot for slot in range(MAX_OBJECTS) if best[row, slot] > FOUND]
        found.sort(key=columns[row].__getitem__)
        solids = tuple((KINDS[kind[row][slot]], _COLORS[color[row][slot]]) for slot in found)
        seen.append(Sighting(solids, _GROUNDS[ground_number], PATTERNS[pattern_number], _SKIES[sky_number]))
    return seen


def truth(scenes: Sequence[Scene]) -> list[Sighting]:
    """What the pictures of scenes show."""
    return [
        Sighting(
            tuple((solid.kind, solid.color) for solid in scene.solids),
            scene.ground,
            scene.pattern,
            scene.sky if row >= SKY_ROWS else None,
        )
        for scene, row in zip(scenes, horizon(to_tensors(scenes)).tolist(), strict=True)
    ]


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(_convolution(width, width), _convolution(width, width))

    def forward(self, features: Tensor) -> Tensor:
        return features + self.branch(features)


def _convolution(before: int, after: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.GroupNorm(4, after), nn.ReLU(inplace=True))
