"""Where images come from: files here, addresses in `image_urls`."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError


class ImageError(ValueError):
    """An image that cannot be had or read; one sentence that names it."""


def read_image(path: str | Path) -> Image.Image:
    """Read an image file as the reference's `load_image` does: EXIF orientation applied, then converted to RGB.

    The conversion is PIL's own, so transparency is dropped, not composited (IDEFICS3-FILE-001, IDEFICS3-FILE-002).

    Raises:
        ImageError: the file is missing, truncated, or no image.
    """
    if not Path(path).exists():
        raise ImageError(f"image file {path} does not exist")
    return decoded(path, f"image file {path} cannot be read")


def decoded(
    source: str | Path | io.BytesIO,
    trouble: str,
    formats: tuple[str, ...] | None = None,
    limit_pixels: int | None = None,
) -> Image.Image:
    """A picture from a file or from bytes, upright and in three channels; see `read_image`.

    Args:
        source: a path or a stream.
        trouble: how the sentence of an error begins.
        formats: Pillow's names of those that are tried, None for all.
        limit_pixels: height times width at most, whatever the file's size; None for Pillow's own limit.

    Raises:
        ImageError: it cannot be read, or has more pixels.
    """
    try:
        with Image.open(source, formats=formats) as image:
            if limit_pixels is not None and image.width * image.height > limit_pixels:
                raise ImageError(f"{image.width} x {image.height} pixels are more than {limit_pixels}")
            image.load()
            upright = ImageOps.exif_transpose(image)  # IDEFICS3-FILE-001
            if upright.mode == "P" and isinstance(upright.info.get("transparency"), bytes):
                upright = upright.convert("RGBA")  # the same colours; Pillow warns when this step is left out
            picture = upright.convert("RGB")  # IDEFICS3-FILE-002
            picture.info.pop("transparency", None)  # else the colour that stood for it would be laid on white later
            return picture
    except Exception as error:  # Pillow's decoders raise nearly everything on damaged files
        reason = "its format is not known" if isinstance(error, UnidentifiedImageError) else _reason(error)
        raise ImageError(f"{trouble}: {reason}") from error


def _reason(error: BaseException) -> str:
    text = str(getattr(error, "reason", None) or error) or type(error).__name__
    return " ".join(text.split())
