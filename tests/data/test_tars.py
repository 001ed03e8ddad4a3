"""Tars of the WebDataset layout: any sample can be read, and what is wrong is named."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from loco_diffusion.data.tars import TarSource
from loco_diffusion.errors import UserError


def _picture(value: int, width: int = 24, height: int = 16) -> Image.Image:
    return Image.fromarray(np.full((height, width, 3), value, dtype=np.uint8))


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def _write(path: Path, members: dict[str, bytes], mode: str = "w") -> None:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    for number in range(2):
        members: dict[str, bytes] = {}
        for sample in range(3):
            value = 3 * number + sample
            members[f"v1.0/{value}.png"] = _png(_picture(value))
            members[f"v1.0/{value}.txt"] = f" number {value}\n".encode()
            members[f"v1.0/{value}.canny.png"] = _png(_picture(200 + value, 48, 32))
        _write(tmp_path / f"{number}.tar", members)
    return tmp_path


def test_samples_of_all_tars_by_index(tars: Path) -> None:
    source = TarSource(str(tars / "*.tar"), condition_map="canny.png")
    assert len(source) == 6
    for index in (5, 0, 3, 1):  # in any order
        record = source[index]
        assert record.picture() == _picture(index) and record.size() == (24, 16)
        assert record.caption == f"number {index}" and record.map() == _picture(200 + index, 48, 32)
    plain = TarSource(str(tars / "1.tar"))
    assert len(plain) == 3 and plain[0].map() is None and plain[0].caption == "number 3"
    named = TarSource(str(tars / "1.tar"), "canny.png")
    assert named[0].picture() == _picture(203, 48, 32)


def test_identity_changes_with_the_tars(tars: Path) -> None:
    def identity() -> str:
        return TarSource(str(tars / "*.tar")).identity("pictures")

    first = identity()
    assert identity() == first
    assert TarSource(str(tars / "*.tar")).identity("captions") != first
    _write(tars / "0.tar", {"a.png": _png(_picture(0)), "a.txt": b""})
    assert identity() != first


def test_bad_tars_are_refused(tars: Path) -> None:
    _write(tars / "gz.tar.gz", {"a.png": _png(_picture(0)), "a.txt": b""}, "w:gz")
    _write(tars / "empty.tar", {})
    _write(tars / "apart.tar", {"a.png": _png(_picture(0)), "b.txt": b"b"})
    _write(tars / "text.tar", {"a.txt": b"a"})
    content = (tars / "0.tar").read_bytes()
    (tars / "short.tar").write_bytes(content[: content.index(b"v1.0/2.png") + 600])
    for name, message in (
        ("*.rar", r"There is no tar file .*\*\.rar; check data\.path"),
        ("gz.tar.gz", "gz.tar.gz cannot be read .* uncompressed"),
        ("empty.tar", "holds no pictures"),
        ("apart.tar", r"Sample a in .* has no txt \(it has png\)"),
        ("text.tar", r"Sample a in .* has no jpg \(it has txt\)"),
        ("short.tar", "short.tar cannot be read .* intact"),
    ):
        with pytest.raises(UserError, match=message):
            TarSource(str(tars / name))
    with pytest.raises(UserError, match="has no depth.png"):
        TarSource(str(tars / "0.tar"), condition_map="depth.png")


def test_damaged_members_are_named(tars: Path) -> None:
    _write(tars / "bad.tar", {"a.png": b"no picture", "a.txt": b"a", "b.png": b"", "b.txt": b"\xff\xfe"})
    source = TarSource(str(tars / "bad.tar"))
    with pytest.raises(UserError, match=r"a\.png in .*bad.tar is damaged"):
        source[0].picture()
    with pytest.raises(UserError, match=r"caption b\.txt in .*bad.tar cannot be read"):
        source[1]
