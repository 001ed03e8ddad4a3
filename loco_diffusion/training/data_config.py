"""The data section of a configuration: one class for each source of pictures."""

from __future__ import annotations

from typing import Literal, TypeAlias

from pydantic import BaseModel, Field, model_validator

from loco_diffusion.data.framing import Framing, bucket_sizes
from loco_diffusion.training.settings import Settings


class ScenesData(Settings):
    """The procedural world `scenes`, drawn as needed."""

    source: Literal["scenes"]
    count: int = Field(default=6000, ge=1, description="Number of scenes, the first of the training seeds.")
    size: int = Field(default=128, ge=16, description="Side of the pictures in pixels.")

    @property
    def framing(self) -> Framing:
        """How pictures become examples."""
        return Framing(((self.size, self.size),))


class PictureData(Settings):
    """What pictures of any size need."""

    size: int = Field(
        default=512, ge=16, description="Side in pixels to which pictures are resized and cropped."
    )
    max_aspect_ratio: float = Field(
        default=1.0,
        ge=1,
        description="1: examples are square. More: they may be as much longer than wide, or wider than long, in "
        "sizes of about size x size pixels; a batch has one size.",
    )
    aspect_step: int = Field(
        default=64, ge=1, description="Sides of examples that are not square are multiples of this."
    )
    random_crop: bool = Field(
        default=False, description="Cut where a picture is too long at random, not around the centre."
    )
    random_flip: bool = Field(
        default=False,
        description="Exchange left and right in half of the examples; not for captions that tell left from right.",
    )

    @model_validator(mode="after")
    def _there_are_other_sizes(self) -> PictureData:
        if self.max_aspect_ratio > 1 and len(self.framing.sizes) == 1:
            raise ValueError(
                f"with aspect_step {self.aspect_step} no size near {self.size}x{self.size} has an aspect ratio "
                f"up to {self.max_aspect_ratio:g}; lower aspect_step or raise max_aspect_ratio"
            )
        return self

    @property
    def framing(self) -> Framing:
        """How pictures become examples."""
        sizes = bucket_sizes(self.size, self.max_aspect_ratio, self.aspect_step)
        return Framing(sizes, self.random_crop, self.random_flip)


class FolderData(PictureData):
    """A folder of pictures with a metadata.jsonl of lines {"file_name": ..., "text": ...}."""

    source: Literal["folder"]
    path: str = Field(description="The folder.")
    map_field: str | None = Field(
        default=None,
        description="Field of metadata.jsonl that names the file of the condition map; none: maps are extracted.",
    )


class DatasetData(PictureData):
    """A Hugging Face data set."""

    source: Literal["dataset"]
    name: str = Field(description="Name on the hub, or a local folder.")
    split: str = Field(default="train", description='Split, such as "train" or "train[:1000]".')
    image_column: str = Field(default="image", description="Column of the pictures.")
    caption_column: str = Field(
        default="text", description="Column of the captions; of a list the first one counts."
    )
    map_column: str | None = Field(
        default=None, description="Column of the condition maps; none: maps are extracted."
    )
    streaming: bool = Field(
        default=False,
        description="Read it from front to back while training, without a copy on disk; nothing is cached then, "
        "and a resumed run first reads again what it has read before.",
    )


class TarData(PictureData):
    """Uncompressed tar files of the WebDataset layout: a.jpg beside a.txt."""

    source: Literal["tars"]
    path: str = Field(description='A tar file, or a pattern such as "shards/*.tar".')
    image_member: str | None = Field(
        default=None, description="Extension of the pictures; none: jpg, jpeg, png, webp, ..., what there is."
    )
    caption_member: str = Field(default="txt", description="Extension of the captions.")
    map_member: str | None = Field(
        default=None,
        description="Extension of the condition maps, such as canny.png; none: maps are extracted.",
    )


Data: TypeAlias = ScenesData | FolderData | DatasetData | TarData

DATA_SOURCES: dict[str, type[BaseModel]] = {
    "scenes": ScenesData,
    "folder": FolderData,
    "dataset": DatasetData,
    "tars": TarData,
}
"""The sections by the name of their source."""
