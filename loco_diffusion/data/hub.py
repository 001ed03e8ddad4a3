"""Data sets that the library `datasets` loads, as a whole or as a stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loco_diffusion.data.sources import Part, PictureData, Record, cause_of
from loco_diffusion.errors import UserError

if TYPE_CHECKING:
    import datasets

_SHUFFLED = 1000  # rows of a stream from which the next one is drawn


@dataclass(frozen=True)
class Columns:
    """What to read of a data set.

    Attributes:
        image: the column of pictures (or of paths of pictures).
        caption: the column of captions; of a list of captions the first one counts.
        map: the column of condition maps, None if there is none.
    """

    image: str = "image"
    caption: str = "text"
    map: str | None = None

    @property
    def pictures(self) -> list[str]:
        """The columns of pictures."""
        return [self.image] + ([self.map] if self.map else [])

    def check(self, known: list[str], name: str) -> None:
        """Raise UserError if the data set lacks one."""
        for column in (*self.pictures, self.caption):
            if column not in known:
                raise UserError(
                    f"The data set {name} has no column {column!r}; "
                    f"choose one of its columns ({', '.join(known)})."
                )

    def record(self, captions: dict[str, Any], pictures: Any, name: str, index: int) -> Record:
        """The record of one row.

        Args:
            captions: a row with the caption.
            pictures: gives a row with the pictures, not decoded, when called.
            name: of the data set.
            index: of the row, for messages.
        """
        value = captions[self.caption]
        if isinstance(value, (list, tuple)) and value:
            value = value[0]
        if not isinstance(value, str):
            raise UserError(
                f"Caption {index} of the data set {name} is no text but {type(value).__name__}; "
                f"choose another caption_column than {self.caption!r} or mend the row."
            )
        read_map = None if self.map is None else partial(_stored, pictures, self.map)
        return Record(
            f"Picture {index} of the data set {name}", value, partial(_stored, pictures, self.image), read_map
        )


class DatasetSource:
    """A data set from the hub, a folder, or saved by `save_to_disk`, of which any row can be read.

    Args:
        name: name or folder.
        split: such as "train" or "train[:1000]".
        columns: what to read.

    Raises:
        UserError: the data set cannot be loaded, is empty, or lacks a column.
    """

    def __init__(self, name: str, split: str, columns: Columns) -> None:
        self.name = name
        self.columns = columns
        loaded: datasets.Dataset = _load(name, split)
        columns.check(loaded.column_names, name)
        if len(loaded) == 0:
            raise UserError(f"The split {split!r} of the data set {name} is empty; choose another one.")
        self._fingerprint = loaded._fingerprint
        self._captions = loaded.select_columns([columns.caption])
        self._pictures = _undecoded(loaded.select_columns(columns.pictures), name, columns)

    def __len__(self) -> int:
        return len(self._captions)

    def __getitem__(self, index: int) -> Record:
        """See `Source`."""
        pictures = partial(self._pictures.__getitem__, index)
        return self.columns.record(self._captions[index], pictures, self.name, index)

    def identity(self, part: Part) -> str:
        """See `Source`: the fingerprint that `datasets` keeps of the data."""
        columns = {"pictures": self.columns.image, "captions": self.columns.caption, "maps": self.columns.map}
        return f"{self._fingerprint} {columns[part]}"


class StreamSource:
    """A data set that is read from front to back, without a copy on disk.

    Args:
        name: name or folder.
        split: such as "train"; parts of one cannot be streamed.
        columns: what to read.

    Raises:
        UserError: the data set cannot be loaded, is empty, or lacks a column.
    """

    def __init__(self, name: str, split: str, columns: Columns) -> None:
        self.name = name
        self.columns = columns
        loaded: datasets.IterableDataset = _load(name, split, streaming=True)
        try:
            first = next(iter(loaded.take(1)), None)
        except Exception as error:  # the first row is read from the network or from a file of any kind
            raise UserError(
                f"The data set {name} cannot be streamed ({cause_of(error)}); check its files."
            ) from error
        if first is None:
            raise UserError(f"The split {split!r} of the data set {name} is empty; choose another one.")
        columns.check(list(first), name)
        self._rows = _undecoded(loaded.select_columns([*columns.pictures, columns.caption]), name, columns)

    def records(self, seed: int, epoch: int) -> Iterator[Record]:
        """All records once, in an order that depends on seed and epoch only.

        It is the order of IterableDataset.shuffle: that of the files is drawn, several are read in turn, and each
        row is drawn from those that were read last.

        Raises:
            UserError: the stream breaks off.
        """
        rows = self._rows.shuffle(seed=seed, buffer_size=_SHUFFLED)
        rows.set_epoch(epoch)
        try:
            for number, row in enumerate(rows):
                yield self.columns.record(row, partial(dict, row), f"{self.name}, epoch {epoch},", number)
        except UserError:
            raise
        except Exception as error:  # networks and decoders have nearly any exception type
            raise UserError(
                f"The data set {self.name} breaks off ({cause_of(error)}); resume when it can be read again."
            ) from error


def _stored(row: Any, column: str) -> PictureData | None:
    """A picture of a row as it is stored; files that are elsewhere are read."""
    import datasets

    value = row()[column]
    if value is None or value["bytes"] is not None:
        return None if value is None else value["bytes"]
    return datasets.Image().decode_example(value)


def _load(name: str, split: str, streaming: bool = False) -> Any:
    import datasets

    try:
        if (Path(name) / "state.json").is_file():  # written by Dataset.save_to_disk, which keeps no splits
            if split != "train":
                raise ValueError("it was saved without splits, so that only 'train' names it")
            saved = datasets.Dataset.load_from_disk(name)
        elif (Path(name) / "dataset_dict.json").is_file():
            saved = datasets.DatasetDict.load_from_disk(name)[split]
        else:
            return datasets.load_dataset(name, split=split, streaming=streaming)
        return saved.to_iterable_dataset() if streaming else saved
    except Exception as error:  # a wrong name, split, format or connection has many exception types
        raise UserError(
            f"The split {split!r} of the data set {name} cannot be loaded ({cause_of(error)}); "
            "give the name of a data set on the hub or a local folder, and one of its splits."
        ) from error


def _undecoded(rows: Any, name: str, columns: Columns) -> Any:
    """Rows whose pictures are files, also where columns hold paths."""
    import datasets

    for column in columns.pictures:
        try:
            feature = rows.features[column] if rows.features else None
            if feature is not None and not isinstance(feature, datasets.Image) and feature.dtype != "string":
                raise TypeError(f"it holds {feature.dtype}")
            rows = rows.cast_column(column, datasets.Image(decode=False))
        except Exception as error:
            raise UserError(
                f"The column {column!r} of the data set {name} holds no pictures; choose another."
            ) from error
    return rows
