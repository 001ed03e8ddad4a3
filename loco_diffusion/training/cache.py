"""What is computed once for all pictures: tensors in memory, or in a folder that later runs find again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from loco_diffusion.errors import UserError

ROWS = 256
"""Pictures of a chunk, at most."""

_SAMPLED = 64  # values of a tensor that tell it from another


class Cache:
    """One row of each of a few named tensors for each picture, in chunks of pictures of one size.

    In memory each process keeps the rows of its own pictures. In a folder there are those of all pictures, each
    chunk a safetensors file that is complete or absent; the processes share the work of writing it, and rows are
    read as they are needed, from the operating system's cache of files where memory is free.

    Args:
        buckets: indices of the pictures of each size.
        folder: where the files are, None for memory.

    Attributes:
        chunks: indices of the pictures of each chunk.
        buckets: number of the size of each chunk.
    """

    def __init__(self, buckets: Sequence[Sequence[int]], folder: Path | None = None) -> None:
        self.folder = folder
        self.chunks: list[Sequence[int]] = []
        self.buckets: list[int] = []
        for number, bucket in enumerate(buckets):
            for start in range(0, len(bucket), ROWS):
                self.chunks.append(bucket[start : start + ROWS])
                self.buckets.append(number)
        self._memory: dict[int, dict[str, Tensor]] = {}
        self._places = {
            index: (number, row)
            for number, chunk in enumerate(self.chunks)
            for row, index in enumerate(chunk)
        }

    def __contains__(self, number: int) -> bool:
        """Whether a chunk is there."""
        return self._file(number).exists() if self.folder else number in self._memory

    def put(self, number: int, tensors: dict[str, Tensor]) -> None:
        """Keep a chunk's tensors, which have a row for each of its pictures.

        Raises:
            UserError: the file cannot be written, as on a full disk.
        """
        whole = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        if self.folder is None:
            self._memory[number] = whole
            return
        file = self._file(number)
        partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
        try:
            save_file(whole, partial)
            os.replace(partial, file)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise _unwritable(self.folder, error) from error

    def rows(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Rows of pictures of one size, stacked: name -> (B, ...).

        Raises:
            UserError: a file is missing or damaged.
        """
        rows = [self._row(*self._places[index]) for index in indices]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _row(self, number: int, row: int) -> dict[str, Tensor]:
        if self.folder is None:
            return {name: tensor[row] for name, tensor in self._memory[number].items()}
        file = self._file(number)
        try:
            opened = _open(file)
            return {name: opened.get_slice(name)[row] for name in opened.keys()}  # noqa: SIM118 (not a mapping)
        except Exception as error:  # a damaged file has many exception types
            raise UserError(
                f"The cached {file} cannot be read ({' '.join(str(error).split())}); delete it and resume."
            ) from error

    def _file(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"chunk-{number:06d}.safetensors"


def cache_folder(root: str, kind: str, depends_on: dict[str, Any]) -> Path:
    """The folder, made if need be, of what was computed from the same things.

    Args:
        root: of all caches.
        kind: first part of its name.
        depends_on: everything that the tensors depend on, as JSON has it; it is written beside them.

    Raises:
        UserError: the folder cannot be made.
    """
    text = json.dumps(depends_on, indent=1, sort_keys=True)
    folder = Path(root).expanduser() / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    partial = folder / f".depends_on.{os.getpid()}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial.write_text(text + "\n")
        os.replace(partial, folder / "depends_on.json")
    except OSError as error:
        raise _unwritable(folder, error) from error
    return folder


def model_identity(model: nn.Module) -> str:
    """What stands for a model, wherever it was loaded from: of its class, config and weights.

    Of each tensor the name, type, shape and a few spread values count; training changes nearly all values, and to
    read billions of them would take minutes.
    """
    config = getattr(model, "config", {})
    fields = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    fields = {k: v for k, v in fields.items() if not k.startswith("_") and k != "transformers_version"}
    total = hashlib.sha256(
        f"{type(model).__name__} {json.dumps(fields, sort_keys=True, default=str)}".encode()
    )
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor):
            flat = tensor.detach().flatten()
            spread = flat[:: max(1, flat.numel() // _SAMPLED)][:_SAMPLED]
            total.update(f"{name} {tuple(tensor.shape)} {tensor_identity(spread)}".encode())
    return total.hexdigest()[:32]


def tensor_identity(tensor: Tensor) -> str:
    """What stands for type and values of a tensor of at least one dimension."""
    values = tensor.contiguous().cpu().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tensor.dtype} ".encode() + values).hexdigest()[:32]


def tokenizer_identity(pipe: Any) -> str:
    """What stands for the vocabularies of a pipeline's tokenizers."""
    total = hashlib.sha256()
    for name, part in sorted(pipe.components.items()):
        tokenizer = getattr(part, "tokenizer", part)  # of a processor of text and pictures
        if hasattr(tokenizer, "get_vocab"):
            vocabulary = sorted(tokenizer.get_vocab().items())
            total.update(f"{name} {tokenizer.model_max_length} {json.dumps(vocabulary)}".encode())
    return total.hexdigest()[:32]


@lru_cache(maxsize=256)
def _open(file: Path) -> Any:
    return safe_open(file, framework="pt").__enter__()


def _unwritable(folder: Path, error: Exception) -> UserError:
    cause = getattr(error, "strerror", None) or " ".join(str(error).split())
    return UserError(
        f"The cache {folder} cannot be written ({cause}); free space, mend permissions or choose another "
        "cache_folder."
    )
