"""Pictures in and out: robust loading, fitting to a size, atomic saving, tensors.

Everything in the package works on 8-bit RGB `PIL.Image` pictures or on float tensors in [0, 1].
"""

from __future__ import annotations

import logging
import os
import secrets
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from loco_diffusion.errors import NotFiniteError, UserError

# Pillow logs damage that it then raises; without a handler of the user's, Python would print it.
logging.getLogger("PIL").addHandler(logging.NullHandler())

MIN_SIDE = 16
"""The smallest side, in pixels, of a picture that `load_image` accepts."""

SAVE_FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
"""File name extensions that `save_image` writes, with their formats."""


def load_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read a picture file as 8-bit RGB, upright, whatever its kind.

    Rotation by EXIF is applied, the first frame of an animation is taken, and the rest is `to_rgb`.

    Args:
        path: a picture file in any format that Pillow reads.

    Returns:
        An RGB picture whose sides are at least `MIN_SIDE` pixels.

    Raises:
        UserError: the file is missing, not a regular file, empty, unreadable, of an unknown format, damaged
            or truncated, a decompression bomb, or smaller than `MIN_SIDE` pixels.
    """
    file = _readable_file(path)
    return decode_image(file, str(file))


def decode_image(source: Path | bytes, name: str) -> Image.Image:
    """What `load_image` does with a file, also for the content of one.

    Args:
        source: the path of an existing file, or what is in it.
        name: of the picture, for messages.

    Raises:
        UserError: see `load_image`.
    """
    with _opened(source, name) as opened:
        opened.load()
        image = to_rgb(_upright(opened))
    if min(image.size) < MIN_SIDE:
        raise UserError(
            f"{name} is {image.width}x{image.height} px, but a picture needs at least {MIN_SIDE} px "
            "on each side; use a larger one."
        )
    return image


def image_size(source: Path | bytes, name: str) -> tuple[int, int]:
    """Width and height, in pixels, that `decode_image` will give, from the file's header alone.

    Args:
        source: see `decode_image`.
        name: of the picture, for messages.

    Raises:
        UserError: the header is not one of a picture.
    """
    with _opened(source, name) as opened:
        turned = False
        with suppress(Exception):  # of damaged EXIF data, which `_upright` takes no notice of either
            turned = opened.getexif().get(ExifTags.Base.Orientation) in range(5, 9)
        return (opened.height, opened.width) if turned else opened.size


@contextmanager
def _opened(source: Path | bytes, name: str) -> Iterator[Image.Image]:
    """The picture file, opened by Pillow; what Pillow raises in the block becomes UserError."""
    try:
        # Pillow warns above 89 megapixels, which phones take, and of odd metadata; it refuses above 179.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as opened:
                yield opened
    except UnidentifiedImageError as error:
        raise UserError(
            f"{name} is damaged or not a picture of a known format; convert an intact copy to PNG or JPEG."
        ) from error
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise UserError(f"{name} has more than {limit:,} pixels; make it smaller first.") from error
    except FileNotFoundError as error:
        raise UserError(f"{name} does not exist; check the path of the picture.") from error
    except PermissionError as error:
        raise UserError(f"{name} cannot be read (permission denied); change its permissions.") from error
    except Exception as error:  # decoders meet damaged files with nearly any exception type
        cause = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name} is damaged or truncated ({cause}); use an intact copy of it.") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a Pillow picture of any mode to 8-bit RGB, without its metadata.

    Transparency (an alpha channel or a transparent colour) is composited over white. Grayscale of more than
    8 bits is scaled, not clipped: 16-bit by 1/257, floats in [0, 1] by 255, and any other range that does not
    fit linearly from its minimum to its maximum.
    """
    if image.mode.startswith("I") or image.mode == "F":
        rgb = Image.fromarray(_gray_to_8bit(np.asarray(image))).convert("RGB")
    elif image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        straight = image.convert("LA") if image.mode == "La" else image  # Pillow has no La -> RGBA
        rgba = straight.convert("RGBA")
        rgb = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    else:
        rgb = image.convert("RGB")
    rgb.info.clear()  # an orientation or colour profile left here would be applied twice by whoever reads it
    return rgb


def fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """Resize (Lanczos) until the picture covers `width` x `height` pixels, then crop the centre.

    A picture that already has the size comes back unchanged, pixel for pixel.

    Raises:
        UserError: `width` or `height` is less than 1.
    """
    if width < 1 or height < 1:
        raise UserError(f"A picture cannot be {width}x{height} px; give a width and a height of at least 1.")
    return ImageOps.fit(image, (width, height), method=Image.Resampling.LANCZOS)


def check_output(path: str | os.PathLike[str]) -> Path:
    """Check that `save_image` can write to `path`, before any costly work.

    Returns:
        The path with symbolic links resolved, so that a link is written through instead of replaced.

    Raises:
        UserError: the path is a folder or a special file, its extension is unknown, or its folder is missing
            or not writable.
    """
    try:
        target = Path(os.path.realpath(path))
        exists, is_file, is_dir = target.exists(), target.is_file(), target.is_dir()
        parent_is_dir, writable = target.parent.is_dir(), os.access(target.parent, os.W_OK | os.X_OK)
    except (OSError, ValueError) as error:
        raise UserError(f"{str(path)!r} is not a usable output path; choose another one.") from error
    if is_dir:
        raise UserError(f"{path} is a folder; give the name of a picture file in it.")
    if exists and not is_file:
        raise UserError(f"{path} is not a regular file; choose another output path.")
    if Path(path).suffix.lower() not in SAVE_FORMATS:
        known = ", ".join(SAVE_FORMATS)
        raise UserError(f"{path} does not end in a known picture extension; use one of {known}.")
    if not parent_is_dir:
        raise UserError(f"The folder of {path} does not exist; create it first.")
    if not writable:
        raise UserError(f"The folder of {path} is not writable; choose another one.")
    return target


def save_image(image: Image.Image, path: str | os.PathLike[str]) -> None:
    """Write a picture atomically: the file at `path` is either the complete picture or what it was before.

    The format follows the extension (see `SAVE_FORMATS`); JPEG and WebP are written at quality 95.

    Raises:
        UserError: the path cannot be written (see `check_output`), or writing fails, as on a full disk.
    """
    target = check_output(path)
    temporary = target.parent / f".{secrets.token_hex(8)}.tmp"  # same folder: the rename is atomic
    try:
        with open(temporary, "xb") as stream:
            image.save(stream, format=SAVE_FORMATS[Path(path).suffix.lower()], quality=95)
        os.replace(temporary, target)
    except OSError as error:
        cause = error.strerror or error
        raise UserError(f"{path} cannot be written ({cause}); choose another output path.") from error
    finally:
        with suppress(OSError):  # already renamed when all went well
            temporary.unlink(missing_ok=True)


def to_tensor(image: Image.Image) -> Tensor:
    """Convert an RGB picture to a float32 tensor of shape (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def to_pil(picture: Tensor) -> Image.Image:
    """Convert a float tensor of shape (3, H, W) to an RGB picture; values are clipped to [0, 1] and rounded.

    `to_pil(to_tensor(image))` equals an RGB `image` exactly.

    Raises:
        ValueError: the shape is not (3, H, W).
        UserError: the tensor has NaN, which means damaged weights or an overflow in half precision.
    """
    if picture.ndim != 3 or picture.shape[0] != 3:
        raise ValueError(f"expected a tensor of shape (3, H, W), got {tuple(picture.shape)}")
    values = picture.detach().float()
    if bool(values.isnan().any()):
        raise NotFiniteError("The picture contains NaN; check the weights, or compute in float32.")
    pixels = (values.clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())


def _readable_file(path: str | os.PathLike[str]) -> Path:
    """The path of an existing, regular, non-empty file; UserError otherwise."""
    file = Path(path)
    try:
        status = file.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{file} does not exist; check the path of the picture.") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{str(file)!r} cannot be read ({error}); check the path of the picture.") from error
    if file.is_dir():
        raise UserError(f"{file} is a folder; give the path of a picture file.")
    if not file.is_file():
        raise UserError(f"{file} is not a regular file; give the path of a picture file.")
    if status.st_size == 0:
        raise UserError(f"{file} is empty (0 bytes); use an intact copy of the picture.")
    return file


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; a picture with damaged EXIF data stays as it is."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # the pixels are good; only the metadata, which any exception type may report, is not
        return image


def _gray_to_8bit(values: np.ndarray) -> np.ndarray:
    """Scale grayscale values (H, W) of integer or float type to uint8; see `to_rgb`."""
    is_float = np.issubdtype(values.dtype, np.floating)
    gray = values.astype(np.float64)
    finite = np.isfinite(gray)
    low, high = (gray[finite].min(), gray[finite].max()) if finite.any() else (0.0, 0.0)
    gray = np.nan_to_num(gray, nan=low, posinf=high, neginf=low)
    if is_float and low >= 0 and high <= 1:
        scaled = gray * 255
    elif is_float and low >= 0 and high <= 255:
        scaled = gray
    elif low >= 0 and high <= 65535:
        scaled = gray / 257
    else:
        scaled = (gray - low) / max(high - low, np.finfo(np.float64).tiny) * 255
    return np.rint(scaled).astype(np.uint8)
