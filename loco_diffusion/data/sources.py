"""Where training pictures come from; here `scenes` and a folder, beside it data sets and tars.

A source gives records, which are captioned pictures that are not read yet, by index, so that any order of them
can be repeated.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

from PIL import Image, ImageOps

from loco_diffusion.data.render import render
from loco_diffusion.data.scenes import TRAIN_SEEDS, sample_scene
from loco_diffusion.errors import UserError
from loco_diffusion.images import decode_image, image_size, load_image, to_pil, to_rgb

METADATA = "metadata.jsonl"

PictureData: TypeAlias = Path | bytes | Image.Image
"""A picture file, what is in one, or a picture."""

Part: TypeAlias = Literal["pictures", "captions", "maps"]


@dataclass(frozen=True)
class Record:
    """A captioned picture that is not read yet. Several threads may read it at once.

    Attributes:
        name: for messages, such as "Picture 3 of ...".
        caption: of the picture.
        read: gives the picture.
        read_map: gives the condition map that comes with the picture, if one does.
    """

    name: str
    caption: str
    read: Callable[[], PictureData | None]
    read_map: Callable[[], PictureData | None] | None = None

    def picture(self) -> Image.Image:
        """The picture, upright, 8-bit RGB.

        Raises:
            UserError: it cannot be read.
        """
        return _picture(self._data(self.read, self.name), self.name)

    def size(self) -> tuple[int, int]:
        """Width and height of the picture in pixels, without decoding it where that is possible.

        Raises:
            UserError: it cannot be read.
        """
        data = self._data(self.read, self.name)
        return _upright(data).size if isinstance(data, Image.Image) else image_size(data, self.name)

    def map(self) -> Image.Image | None:
        """The condition map that comes with the picture, RGB; None if maps are to be extracted.

        Raises:
            UserError: it cannot be read.
        """
        if self.read_map is None:
            return None
        name = f"The map of {self.name[0].lower()}{self.name[1:]}"
        return _picture(self._data(self.read_map, name), name)

    @staticmethod
    def _data(read: Callable[[], PictureData | None], name: str) -> PictureData:
        try:
            data = read()
        except Exception as error:  # disks, networks and libraries have nearly any exception type
            raise UserError(f"{name} cannot be read ({cause_of(error)}); remove it from the data.") from error
        if data is None:
            raise UserError(f"{name} is missing; remove its row from the data.")
        return data


class Source(Protocol):
    """Captioned pictures; the same index always gives the same record."""

    def __len__(self) -> int:
        """How many pictures there are, at least 1."""

    def __getitem__(self, index: int) -> Record:
        """The record at `index`. Several threads may ask at once.

        Raises:
            UserError: its caption cannot be read.
        """

    def identity(self, part: Part) -> str:
        """What changes when the pictures, captions or maps change, and stays when they are moved."""


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
        self.scene_size = size
        self.seeds = seeds

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Record:
        """See `Source`."""
        scene = sample_scene(self.seeds[index])
        return Record(
            f"Scene {index}", scene.caption, lambda: to_pil(render([scene], self.scene_size).image[0])
        )

    def identity(self, part: Part) -> str:
        """See `Source`."""
        seeds = "" if self.seeds == TRAIN_SEEDS else f" from {self.seeds[0]}"
        return f"{self.count} scenes{seeds}" + ("" if part == "captions" else f" of {self.scene_size} px")


class FolderSource:
    """A folder of pictures with a `metadata.jsonl` of lines {"file_name": "a.png", "text": "a caption"}.

    Args:
        path: the folder; `file_name` is relative to it and may name subfolders.
        map_field: field of the lines that names the file of the condition map; None if there are no maps.

    Raises:
        UserError: the folder or its metadata.jsonl is missing, a line is malformed, or a picture is missing.
    """

    def __init__(self, path: str | Path, map_field: str | None = None) -> None:
        folder = Path(path)
        self.folder = folder
        self._entries: list[tuple[Path, str, Path | None]] = []
        if not folder.is_dir():
            raise UserError(f"The picture folder {folder} does not exist; check its path.")
        try:
            lines = (folder / METADATA).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{folder / METADATA} cannot be read ({cause_of(error)}); "
                'write one line {"file_name": "a.png", "text": "a caption"} a picture into it.'
            ) from error
        for number, line in enumerate(lines, start=1):
            if line.strip():
                self._entries.append(_parse_entry(folder, number, line, map_field))
        if not self._entries:
            raise UserError(f"{folder / METADATA} lists no pictures; write one line for each into it.")

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Record:
        """See `Source`."""
        picture, caption, found = self._entries[index]
        return Record(str(picture), caption, lambda: picture, None if found is None else lambda: found)

    def identity(self, part: Part) -> str:
        """See `Source`: names, sizes and times of the files."""
        if part == "captions":
            return digest(caption for _, caption, _ in self._entries)
        files = (entry[0] if part == "pictures" else entry[2] for entry in self._entries)
        return digest(file_identity(file, self.folder) for file in files if file is not None)


def file_identity(file: Path, folder: Path) -> str:
    """Name in a folder, size and time of a file."""
    status = file.stat()
    return f"{file.relative_to(folder)} {status.st_size} {status.st_mtime_ns}"


def digest(texts: Iterable[str]) -> str:
    """What stands for a row of texts, 32 hexadecimal digits."""
    total = hashlib.sha256()
    for text in texts:
        total.update(f"{len(text)}:{text}".encode(errors="surrogatepass"))
    return total.hexdigest()[:32]


def cause_of(error: Exception) -> str:
    """The first words of an error."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _picture(data: PictureData, name: str) -> Image.Image:
    if isinstance(data, Image.Image):
        return to_rgb(_upright(data))
    return load_image(data) if isinstance(data, Path) else decode_image(data, name)


def _upright(image: Image.Image) -> Image.Image:
    return ImageOps.exif_transpose(image)


def _parse_entry(
    folder: Path, number: int, line: str, map_field: str | None
) -> tuple[Path, str, Path | None]:
    where = f"Line {number} of {folder / METADATA}"
    try:
        entry: Any = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not valid JSON ({error}); mend it.") from error
    if not isinstance(entry, dict):
        raise UserError(f'{where} is not an object {{"file_name": "a.png", "text": "a caption"}}; mend it.')
    fields = ["file_name", "text"] + ([map_field] if map_field else [])
    for key in fields:
        if not isinstance(entry.get(key), str):
            raise UserError(f'{where} needs the text field "{key}"; add it.')
    names = [entry["file_name"]] + ([entry[map_field]] if map_field else [])
    for name in names:
        if not (folder / name).is_file():
            raise UserError(f"{where} names {name!r}, which does not exist; remove the line.")
    return folder / names[0], entry["text"], folder / names[1] if map_field else None
