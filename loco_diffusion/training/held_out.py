"""Which pictures a run is watched by, and which are left to learn from."""

from __future__ import annotations

from loco_diffusion.data.hub import StreamSource
from loco_diffusion.data.scenes import VALIDATION_SEEDS
from loco_diffusion.data.sources import FolderSource, Part, Record, SceneSource, Source
from loco_diffusion.training.config import TrainingConfig
from loco_diffusion.training.data_config import ScenesData

SHARE = 10  # at most one in so many pictures is held out


class Selection:
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

    def __getitem__(self, index: int) -> Record:
        return self.source[self.indices[index]]

    def identity(self, part: Part) -> str:
        """See `Source`."""
        whole = self.source.identity(part)
        return whole if len(self) == len(self.source) else f"{self.indices} of {whole}"


def split(
    config: TrainingConfig, source: Source | StreamSource
) -> tuple[Source | StreamSource, Source | None]:
    """The pictures to train on, and those to validate on, if there are any: of a stream none are held out.

    Of fewer than ten pictures none is held out either: the first are both.

    Raises:
        UserError: `validation.path` holds no pictures.
    """
    settings = config.validation
    if settings.path is not None:
        return source, FolderSource(settings.path)
    if isinstance(source, StreamSource):
        return source, None
    if isinstance(config.data, ScenesData):
        return source, SceneSource(max(1, settings.pictures), config.data.size, VALIDATION_SEEDS)
    held_out = min(settings.pictures, len(source) // SHARE)
    return Selection(source, range(held_out, len(source))), Selection(source, range(held_out or len(source)))
