"""Every odd picture is either handled or refused in one sentence; nothing is half-written."""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from loco_diffusion.errors import UserError
from loco_diffusion.images import check_output, fit, load_image, save_image, to_pil, to_rgb, to_tensor

SIZE = (40, 24)


def photo(size: tuple[int, int] = SIZE) -> Image.Image:
    """A colour gradient, red to the right and green to the bottom."""
    width, height = size
    pixels = np.full((height, width, 3), 60, dtype=np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)[None, :]
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    return Image.fromarray(pixels)


def assert_close(image: Image.Image, expected: Image.Image, atol: int = 0) -> None:
    assert image.mode == "RGB" and image.size == expected.size
    difference = np.abs(np.asarray(image).astype(int) - np.asarray(expected).astype(int))
    assert difference.max() <= atol


def one_sentence(error: pytest.ExceptionInfo[UserError], path: Path) -> str:
    message = str(error.value)
    assert str(path) in message and "\n" not in message and message.endswith(".") and "; " in message
    return message


# --- pictures that are refused


def png_header(width: int, height: int) -> bytes:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return start + struct.pack(">I", 100) + b"IDAT"


def test_missing_paths_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    for path in (tmp_path / "none.png", tmp_path / "file" / "none.png"):
        with pytest.raises(UserError, match="does not exist") as error:
            load_image(path)
        one_sentence(error, path)


def test_unusable_paths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder") as error:
        load_image(tmp_path)
    one_sentence(error, tmp_path)
    for path in ("x\0y.png", "n" * 5000):
        with pytest.raises(UserError, match="cannot be read"):
            load_image(path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for ever
        with pytest.raises(UserError, match="not a regular file"):
            load_image(tmp_path / "pipe.png")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads every file")
def test_a_file_without_permission_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret.png"
    photo().save(path)
    path.chmod(0)
    with pytest.raises(UserError, match="permission denied") as error:
        load_image(path)
    one_sentence(error, path)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "empty"),
        (b"just text, no picture", "known format"),
        (b"\x89PNG\r\n\x1a\n" + b"junk" * 20, "damaged"),
        (png_header(30000, 30000), "more than .* pixels"),
        (png_header(40, 24), "damaged"),
    ],
)
def test_bad_content_is_refused(tmp_path: Path, content: bytes, cause: str) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match=cause) as error:
        load_image(path)
    one_sentence(error, path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tiff", "gif"])
def test_truncated_pictures_are_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"picture.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError, match="damaged") as error:
            load_image(path)
    one_sentence(error, path)


@pytest.mark.parametrize("size", [(1, 1), (15, 40), (40, 15)])
def test_tiny_pictures_are_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "tiny.png"
    photo(size).save(path)
    with pytest.raises(UserError, match="at least 16 px") as error:
        load_image(path)
    one_sentence(error, path)


# --- pictures that are handled


def test_rgb_is_read_exactly_and_without_metadata(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    photo().save(path, dpi=(72, 72))
    image = load_image(path)
    assert_close(image, photo())
    assert image.info == {}
    assert_close(load_image(str(path)), photo())


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_over_white(tmp_path: Path, mode: str) -> None:
    image = photo().convert(mode)
    alpha = Image.new("L", SIZE, 255)
    alpha.paste(0, (0, 0, 20, 24))
    image.putalpha(alpha)
    path = tmp_path / "picture.png"
    image.save(path)
    loaded = load_image(path)
    assert_close(loaded.crop((0, 0, 20, 24)), Image.new("RGB", (20, 24), "white"))
    assert_close(loaded.crop((20, 0, 40, 24)), image.convert("RGB").crop((20, 0, 40, 24)))


@pytest.mark.parametrize("transparency", [1, bytes([255, 0, 255])])
def test_palettes_keep_their_transparent_colour(tmp_path: Path, transparency: int | bytes) -> None:
    indices = np.zeros((24, 40), dtype=np.uint8)
    indices[:, 20:] = 1
    indices[12:, :] = 2
    image = Image.fromarray(indices)
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    path = tmp_path / "picture.png"
    image.save(path, transparency=transparency)
    loaded = load_image(path)
    assert [loaded.getpixel(xy) for xy in ((5, 5), (30, 5), (5, 20))] == [
        (255, 0, 0),
        (255, 255, 255),
        (0, 0, 255),
    ]
    image.save(path)
    assert load_image(path).getpixel((30, 5)) == (0, 255, 0)


def test_rgb_with_a_transparent_colour(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    Image.new("RGB", SIZE, (10, 20, 30)).save(path, transparency=(10, 20, 30))
    assert_close(load_image(path), Image.new("RGB", SIZE, "white"))


@pytest.mark.parametrize("suffix", ["jpg", "tiff"])
def test_cmyk(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"picture.{suffix}"
    photo().convert("CMYK").save(path, **({"quality": 100} if suffix == "jpg" else {}))
    assert_close(load_image(path), photo(), atol=8)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bit_gray_is_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    gray = np.linspace(0, 65535, 40 * 24).reshape(24, 40).astype(np.uint16)
    path = tmp_path / f"picture.{suffix}"
    Image.fromarray(gray).save(path)
    expected = np.rint(gray / 257).astype(np.uint8)
    assert_close(load_image(path), Image.fromarray(expected).convert("RGB"))


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.0, 255.0), (0.0, 65535.0), (-3.0, 5.0)])
def test_float_tiff_fills_the_range(tmp_path: Path, low: float, high: float) -> None:
    path = tmp_path / "picture.tiff"
    ramp = np.linspace(0, 1, 40 * 24, dtype=np.float32).reshape(24, 40)
    Image.fromarray((low + ramp * (high - low)).astype(np.float32)).save(path)
    assert_close(
        load_image(path), Image.fromarray(np.rint(ramp * 255).astype(np.uint8)).convert("RGB"), atol=1
    )


def test_float_tiff_with_nan_and_of_one_value(tmp_path: Path) -> None:
    path = tmp_path / "picture.tiff"
    values = np.linspace(0, 1, 40 * 24, dtype=np.float32).reshape(24, 40)
    values[0, 1], values[0, 2], values[0, 3] = np.nan, np.inf, -np.inf
    Image.fromarray(values).save(path)
    assert [load_image(path).getpixel((x, 0))[0] for x in (1, 2, 3)] == [0, 255, 0]
    Image.fromarray(np.full((24, 40), -7, dtype=np.int32)).save(path)
    assert_close(load_image(path), Image.new("RGB", SIZE))


@pytest.mark.parametrize("mode", ["1", "L", "P", "YCbCr", "HSV", "La", "PA", "RGBa", "RGBX", "I", "F"])
def test_other_modes(mode: str) -> None:
    image = (
        photo().convert("LA").convert("La")
        if mode == "La"
        else photo().convert("RGBA" if mode == "RGBa" else "RGB")
    )
    if mode == "PA":
        image = image.convert("P").convert("PA")
    elif mode in ("I", "F"):
        image = image.convert("L").convert(mode)
    else:
        image = image.convert(mode)
    rgb = to_rgb(image)
    assert rgb.mode == "RGB" and rgb.size == SIZE


def test_one_bit_pictures(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    image = Image.new("1", SIZE)
    image.paste(1, (0, 0, 20, 24))
    image.save(path)
    assert_close(load_image(path), image.convert("RGB"))


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_animations_give_their_first_frame(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"picture.{suffix}"
    frames = [Image.new("RGB", SIZE, colour) for colour in ("red", "blue", "lime")]
    frames[0].save(
        path, save_all=True, append_images=frames[1:], **({"lossless": True} if suffix == "webp" else {})
    )
    assert_close(load_image(path), frames[0], atol=1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(tmp_path: Path, orientation: int) -> None:
    stored = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "picture.png"
    (photo() if stored is None else photo().transpose(stored)).save(path, exif=exif)
    assert_close(load_image(path), photo())


def test_damaged_exif_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "picture.jpg"
    photo().save(path, quality=100, exif=b"Exif\0\0MM\0*junk that is no directory")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_close(load_image(path), photo(), atol=8)


# --- size, output, tensors


@pytest.mark.parametrize("size", [(40, 24), (24, 24), (16, 64), (100, 90), (1, 1)])
def test_fit_gives_the_size(size: tuple[int, int]) -> None:
    assert fit(photo(), *size).size == size
    assert_close(fit(photo(), *SIZE), photo())


def test_fit_crops_the_centre() -> None:
    image = Image.new("RGB", (60, 20), "red")
    image.paste((0, 0, 255), (20, 0, 40, 20))
    assert_close(fit(image, 20, 20), Image.new("RGB", (20, 20), "blue"))
    assert_close(fit(image, 10, 10).crop((1, 1, 9, 9)), Image.new("RGB", (8, 8), "blue"), atol=20)
    with pytest.raises(UserError, match="at least 1"):
        fit(image, 0, 10)


@pytest.mark.parametrize("suffix", ["png", "PNG", "jpg", "jpeg", "webp", "bmp", "tif", "tiff"])
def test_save_and_load_again(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"picture.{suffix}"
    for _ in range(2):  # the second time over the first
        save_image(photo(), path)
    assert os.listdir(tmp_path) == [path.name]
    assert_close(load_image(path), photo(), atol=0 if suffix.lower() in ("png", "bmp", "tif", "tiff") else 24)


def test_saving_follows_links_and_the_umask(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    link = tmp_path / "link.png"
    link.symlink_to(tmp_path / "folder" / "real.png")
    save_image(photo(), link)
    assert link.is_symlink() and (tmp_path / "folder" / "real.png").is_file()
    (tmp_path / "plain").write_bytes(b"")
    assert link.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_unusable_outputs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_bytes(b"x")
    cases = {
        tmp_path / "folder.png": "is a folder",
        tmp_path / "none" / "picture.png": "does not exist",
        tmp_path / "file" / "picture.png": "does not exist",
        tmp_path / "picture.xyz": "extension",
        tmp_path / "picture": "extension",
    }
    before = sorted(tmp_path.rglob("*"))
    for path, cause in cases.items():
        for refuse in (check_output, lambda target: save_image(photo(), target)):
            with pytest.raises(UserError, match=cause) as error:
                refuse(path)
            one_sentence(error, path)
    with pytest.raises(UserError, match="output path"):
        check_output("x\0y.png")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.png")
        with pytest.raises(UserError, match="regular file"):
            check_output(tmp_path / "pipe.png")
        (tmp_path / "pipe.png").unlink()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="not writable"):
        save_image(photo(), tmp_path / "picture.png")
    tmp_path.chmod(0o700)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "picture.jpg"
    save_image(photo(), path)
    before = path.read_bytes()
    with pytest.raises(UserError, match="cannot be written") as error:
        save_image(photo().convert("RGBA"), path)  # JPEG has no transparency
    one_sentence(error, path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


def test_tensors() -> None:
    tensor = to_tensor(photo())
    assert tensor.shape == (3, 24, 40) and tensor.dtype == torch.float32
    assert tensor.min() == 0 and tensor.max() == 1
    assert_close(to_pil(tensor), photo())
    assert to_pil(torch.full((3, 2, 2), 1.7, dtype=torch.bfloat16)).getpixel((0, 0)) == (255, 255, 255)
    with pytest.raises(ValueError, match="shape"):
        to_pil(torch.zeros(1, 3, 8, 8))
    with pytest.raises(UserError, match="NaN"):
        to_pil(torch.full((3, 2, 2), float("nan")))
