"""Pictures in tar files of the WebDataset layout."""

from __future__ import annotations

import glob
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from loco_diffusion.data.sources import Part, Record, cause_of, digest
from loco_diffusion.errors import UserError

PICTURES = ("jpg", "jpeg", "png", "webp", "tif", "tiff", "bmp")
"""Members that are taken for the picture when none is named."""


@dataclass(frozen=True)
class _Sample:
    """Where the members of one sample lie: name of the member -> (first byte, number of bytes)."""

    tar: Path
    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)

    def read(self, member: str) -> bytes:
        offset, size = self.members[member]
        with self.tar.open("rb") as file:
            file.seek(offset)
            return file.read(size)


class TarSource:
    """Tar files in which `a.jpg` and `a.txt`, one after the other, are a picture and its caption.

    Neither of the libraries that read such tars suits a run that must continue where it was: `webdataset` reads
    them from front to back, so that the order hangs on buffers and workers, and `datasets` copies all pictures
    into its own cache first. An uncompressed tar needs neither: the headers say where each member lies, and any
    order of pictures can be read from that index.

    Args:
        path: a tar file or a pattern such as "shards/*.tar"; files are taken in the order of their names.
        picture: extension of the pictures, without the first dot; None for the one of `PICTURES` that is there.
        caption: extension of the captions, UTF-8 text.
        condition_map: extension of the condition maps, such as "canny.png"; None if there are no maps.

    Raises:
        UserError: there is no such tar, one is damaged or compressed, or a sample lacks a member.
    """

    def __init__(
        self, path: str, picture: str | None = None, caption: str = "txt", condition_map: str | None = None
    ) -> None:
        tars = sorted(Path(name) for name in glob.glob(path, recursive=True))
        if not tars:
            raise UserError(f"There is no tar file {path}; check data.path.")
        self._tars = tars
        self._samples = [sample for tar in tars for sample in _samples(tar)]
        if not self._samples:
            raise UserError(f"{path} holds no pictures; name tars in which a.jpg lies beside a.txt.")
        self._caption = caption
        self._map = condition_map
        self._pictures: list[str] = []
        for sample in self._samples:
            self._pictures.append(_picture_of(sample, picture, condition_map))
            for member in (caption, condition_map):
                if member is not None and member not in sample.members:
                    raise _lacks(sample, member)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Record:
        """See `Source`."""
        sample, picture, found = self._samples[index], self._pictures[index], self._map
        return Record(
            f"{sample.key}.{picture} in {sample.tar}",
            _text(sample, self._caption),
            lambda: sample.read(picture),
            None if found is None else lambda: sample.read(found),
        )

    def identity(self, part: Part) -> str:
        """See `Source`: sizes and times of the tars, and the members that are read."""
        tars = (f"{tar.name} {tar.stat().st_size} {tar.stat().st_mtime_ns}" for tar in self._tars)
        members = (
            self._pictures if part == "pictures" else [str({"captions": self._caption}.get(part, self._map))]
        )
        return digest([*tars, *members])


def _samples(tar: Path) -> Iterator[_Sample]:
    """The samples of a tar: neighbours whose names are the same up to the first dot."""
    sample: _Sample | None = None
    try:
        with tarfile.open(tar, "r:") as file:
            while (member := file.next()) is not None:
                file.members = []  # type: ignore[attr-defined]  # it would keep the headers of millions
                folder, _, name = member.name.rpartition("/")
                stem, dot, extension = name.partition(".")
                if not (member.isreg() and stem and dot):
                    continue
                key = f"{folder}/{stem}" if folder else stem
                if sample is None or sample.key != key:
                    if sample is not None:
                        yield sample
                    sample = _Sample(tar, key)
                sample.members[extension.lower()] = (member.offset_data, member.size)
    except (OSError, tarfile.TarError) as error:
        raise UserError(
            f"The tar {tar} cannot be read ({cause_of(error)}); use an intact, uncompressed one."
        ) from error
    if sample is not None:
        yield sample


def _picture_of(sample: _Sample, wanted: str | None, condition_map: str | None) -> str:
    for member in (wanted,) if wanted else PICTURES:
        if member in sample.members and member != condition_map:
            return member
    raise _lacks(sample, wanted or "jpg")


def _lacks(sample: _Sample, member: str) -> UserError:
    found = ", ".join(sorted(sample.members))
    return UserError(
        f"Sample {sample.key} in {sample.tar} has no {member} (it has {found}); add it, or choose another member."
    )


def _text(sample: _Sample, member: str) -> str:
    try:
        return sample.read(member).decode("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"The caption {sample.key}.{member} in {sample.tar} cannot be read ({cause_of(error)}); mend it."
        ) from error
