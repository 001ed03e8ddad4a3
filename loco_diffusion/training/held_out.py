"""Which pictures a run is watched by, and which are left to learn from."""

from __future__ import annotations

from torch import Tensor

from loco_diffusion.data.scenes import VALIDATION_SEEDS
from loco_diffusion.data.sources import FolderSource, SceneSource, Source
from loco_diffusion.training.config import ScenesData, TrainingConfig

SHARE = 10  # at most one in so many pictures is held out


class Part:
    """The pictures of a source at some indices.

    Args:
        source: all pictures.
        indices: theirs.
    """

    def __init__(self, source: Source, indices: range) -> None:
        self.source = source
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def picture(self, index: int) -> Tensor:
        """See `Source`."""
        return self.source.picture(self.indices[index])

    def caption(self, index: int) -> str:
        """See `Source`."""
        return self.source.caption(self.indices[index])


def split(config: TrainingConfig, source: Source) -> tuple[Source, Source]:
    """The pictures to train on, and those to validate on.

    Of fewer than ten pictures none is held out: the first are both.

    Raises:
        UserError: `validation.path` holds no pictures.
    """
    settings, size = config.validation, config.data.size
    if settings.path is not None:
        return source, FolderSource(settings.path, size)
    if isinstance(config.data, ScenesData):
        return source, SceneSource(max(1, settings.pictures), size, VALIDATION_SEEDS)
    held_out = min(settings.pictures, len(source) // SHARE)
    return Part(source, range(held_out, len(source))), Part(source, range(held_out or len(source)))
