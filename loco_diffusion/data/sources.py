"""Where training pictures come from: `scenes`, a folder with captions, a Hugging Face data set.

A source gives square 8-bit pictures and their captions by index, so that any order of them can be repeated.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from loco_diffusion.data.render import render
from loco_diffusion.data.scenes import TRAIN_SEEDS, sample_scene
from loco_diffusion.errors import UserError
from loco_diffusion.images import fit, load_image, to_rgb

if TYPE_CHECKING:
    import datasets

METADATA = "metadata.jsonl"


class Source(Protocol):
    """Captioned pictures; the same index always gives the same picture and caption."""

    def __len__(self) -> int:
        """How many pictures there are, at least 1."""

    def picture(self, index: int) -> Tensor:
        """The picture at `index`: uint8 (3, size, size). Several threads may ask at once.

        Raises:
            UserError: it cannot be read.
        """

    def caption(self, index: int) -> str:
        """The caption at `index`.

        Raises:
            UserError: there is none.
        """


class SceneSource:
    """The first scenes of some seeds, drawn when asked for.

    Args:
        count: number of scenes.
        size: side of the pictures in pixels.
        seeds: of the scenes.
    """

    def __init__(self, count: int, size: int, seeds: range = TRAIN_SEEDS) -> None:
        if not 1 <= count <= len(seeds):
            raise UserError(f"There are 1 to {len(seeds):,} scenes, not {count}.")
        self.count = count
        self.size = size
        self.seeds = seeds

    def __len__(self) -> int:
        return self.count

    def picture(self, index: int) -> Tensor:
        """See `Source`."""
        drawn = render([sample_scene(self.seeds[index])], self.size)
        return (drawn.image[0] * 255).round().to(torch.uint8)

    def caption(self, index: int) -> str:
        """See `Source`."""
        return sample_scene(self.seeds[index]).caption


class FolderSource:
    """A folder of pictures with a `metadata.jsonl` of lines {"file_name": "a.png", "text": "a caption"}.

    Args:
        path: the folder; `file_name` is relative to it and may name subfolders.
        size: side of the pictures in pixels; others are resized and cropped around the centre.

    Raises:
        UserError: the folder or its metadata.jsonl is missing, a line is malformed, or a picture is missing.
    """

    def __init__(self, path: str | Path, size: int) -> None:
        folder = Path(path)
        self.size = size
        self._entries: list[tuple[Path, str]] = []
        if not folder.is_dir():
            raise UserError(f"The picture folder {folder} does not exist; check data.path.")
        try:
            lines = (folder / METADATA).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{folder / METADATA} cannot be read ({_cause(error)}); "
                'write one line {"file_name": "a.png", "text": "a caption"} a picture into it.'
            ) from error
        for number, line in enumerate(lines, start=1):
            if line.strip():
                self._entries.append(_parse_entry(folder, number, line))
        if not self._entries:
            raise UserError(f"{folder / METADATA} lists no pictures; write one line for each into it.")

    def __len__(self) -> int:
        return len(self._entries)

    def picture(self, index: int) -> Tensor:
        """See `Source`."""
        return _fitted(load_image(self._entries[index][0]), self.size)

    def caption(self, index: int) -> str:
        """See `Source`."""
        return self._entries[index][1]


class DatasetSource:
    """A data set that the library `datasets` loads: from the hub, a folder, or saved by `save_to_disk`.

    Args:
        name: name or folder.
        split: such as "train" or "train[:1000]".
        image_column: the column of pictures (or of paths of pictures).
        caption_column: the column of captions; of a list of captions the first one counts.
        size: side of the pictures in pixels; others are resized and cropped around the centre.

    Raises:
        UserError: the data set cannot be loaded, is empty, or lacks a column.
    """

    def __init__(self, name: str, split: str, image_column: str, caption_column: str, size: int) -> None:
        self.name = name
        self.size = size
        self.image_column = image_column
        self.caption_column = caption_column
        loaded = _load_dataset(name, split)
        for column in (image_column, caption_column):
            if column not in loaded.column_names:
                known = ", ".join(loaded.column_names)
                raise UserError(
                    f"The data set {name} has no column {column!r}; choose one of its columns ({known})."
                )
        if len(loaded) == 0:
            raise UserError(f"The split {split!r} of the data set {name} is empty; choose another one.")
        self._captions = loaded.select_columns([caption_column])
        self._pictures = _as_images(loaded.select_columns([image_column]), name, image_column)

    def __len__(self) -> int:
        return len(self._captions)

    def picture(self, index: int) -> Tensor:
        """See `Source`."""
        where = f"Picture {index} of the data set {self.name}"
        try:
            value = self._pictures[index][self.image_column]
            if value is not None:
                return _fitted(to_rgb(ImageOps.exif_transpose(value)), self.size)
        except Exception as error:  # decoders meet damaged files with nearly any exception type
            raise UserError(f"{where} cannot be read ({_cause(error)}); remove it from the data.") from error
        raise UserError(f"{where} is missing; remove its row from the data.")

    def caption(self, index: int) -> str:
        """See `Source`."""
        value = self._captions[index][self.caption_column]
        if isinstance(value, (list, tuple)) and value:
            value = value[0]
        if not isinstance(value, str):
            raise UserError(
                f"Caption {index} of the data set {self.name} is no text but {type(value).__name__}; "
                f"choose another caption_column than {self.caption_column!r} or mend the row."
            )
        return value


def _fitted(image: Image.Image, size: int) -> Tensor:
    """Resize and crop an RGB picture: uint8 (3, size, size)."""
    return torch.from_numpy(np.array(fit(image, size, size))).permute(2, 0, 1).contiguous()


def _parse_entry(folder: Path, number: int, line: str) -> tuple[Path, str]:
    where = f"Line {number} of {folder / METADATA}"
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not valid JSON ({error}); mend it.") from error
    if not isinstance(entry, dict):
        raise UserError(f'{where} is not an object {{"file_name": "a.png", "text": "a caption"}}; mend it.')
    for key in ("file_name", "text"):
        if not isinstance(entry.get(key), str):
            raise UserError(f'{where} needs the text field "{key}"; add it.')
    picture = folder / entry["file_name"]
    if not picture.is_file():
        raise UserError(f"{where} names {entry['file_name']!r}, which does not exist; remove the line.")
    return picture, entry["text"]


def _load_dataset(name: str, split: str) -> datasets.Dataset:
    import datasets

    try:
        if (Path(name) / "state.json").is_file():  # written by Dataset.save_to_disk, which keeps no splits
            if split != "train":
                raise ValueError("it was saved without splits, so that only 'train' names it")
            return datasets.Dataset.load_from_disk(name)
        if (Path(name) / "dataset_dict.json").is_file():
            return datasets.DatasetDict.load_from_disk(name)[split]
        return datasets.load_dataset(name, split=split)
    except Exception as error:  # a wrong name, split, format or connection has many exception types
        raise UserError(
            f"The split {split!r} of the data set {name} cannot be loaded ({_cause(error)}); "
            "give the name of a data set on the hub or a local folder, and one of its splits."
        ) from error


def _as_images(column: datasets.Dataset, name: str, image_column: str) -> datasets.Dataset:
    """The column decoded to pictures, also where it holds paths."""
    import datasets

    feature: Any = column.features[image_column]
    if isinstance(feature, datasets.Image):
        return column
    try:
        return column.cast_column(image_column, datasets.Image())
    except Exception as error:
        raise UserError(
            f"The column {image_column!r} of the data set {name} holds no pictures; choose another."
        ) from error


def _cause(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
