"""What a section of the configuration is, and the section about the pictures that a run is watched by."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Settings(BaseModel):
    """A section of the configuration; unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ValidationSettings(Settings):
    """Pictures that are drawn under held-out conditions, and scored, while the adapter learns."""

    pictures: int = Field(default=4, ge=0, le=64, description="How many; 0 draws none.")
    every: int = Field(
        default=500,
        ge=1,
        description="Steps between them; also of rotation angles and orthogonality. The last step has them, too.",
    )
    steps: int | None = Field(
        default=None, ge=1, description="Denoising steps a picture; default: what suits the base."
    )
    guidance: float | None = Field(
        default=None, ge=0, le=100, description="Guidance scale; default: what suits the base."
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="Of the first picture's noise; others count on.")
    path: str | None = Field(
        default=None,
        description="Folder of their originals, with a metadata.jsonl. Default: the first scenes of the "
        "validation seeds; of other data the first pictures (a tenth at most), which are not trained on then; "
        "of streams none.",
    )
