"""Where images come from: files, and URLs for those who ask for them."""

from __future__ import annotations

import http.client
import io
import ipaddress
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

URL_LIMIT_BYTES = 32 * 2**20
URL_LIMIT_S = 20.0
_CHUNK = 2**16


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
    return _decoded(path, f"image file {path} cannot be read")


def opened(value: Any, *, allow_urls: bool = False, allow_private: bool = False) -> Any:
    """An image named by a path or an address, read; anything else as it is.

    Args:
        value: a path, an http or https address, or an image.
        allow_urls: fetch addresses.
        allow_private: fetch also from loopback, link-local and private addresses.

    Raises:
        ImageError: it cannot be had or read, or is an address and those are not allowed.
    """
    if is_url(value):
        if not allow_urls:
            raise ImageError(f"{value}: addresses are fetched only with allow_urls=True")
        return fetch_image(value, allow_private=allow_private)
    return read_image(value) if isinstance(value, (str, Path)) else value


def is_url(value: Any) -> bool:
    """True for text that begins with http:// or https://."""
    return isinstance(value, str) and value.lower().startswith(("http://", "https://"))


def fetch_image(url: str, *, allow_private: bool = False) -> Image.Image:
    """Fetch an image over HTTP, at most `URL_LIMIT_BYTES` in about `URL_LIMIT_S` seconds.

    A host's addresses are looked up and checked before it is asked, for every redirect too. A name server that answers
    differently a moment later is not caught.

    Args:
        url: http or https.
        allow_private: also fetch from loopback, link-local and private addresses.

    Raises:
        ImageError: the address is not allowed, nothing came in time, or what came is no image.
    """
    opener = urllib.request.build_opener(_Redirects(allow_private))
    _check_address(url, allow_private)
    end = time.monotonic() + URL_LIMIT_S
    try:
        with opener.open(urllib.request.Request(url, headers={"User-Agent": "vlmqual"}), timeout=URL_LIMIT_S) as answer:
            kind = answer.headers.get_content_type()
            if not kind.startswith("image/"):
                raise ImageError(f"{url}: content type {kind} is no image")
            data = bytearray()
            while part := answer.read1(_CHUNK):
                data += part
                if len(data) > URL_LIMIT_BYTES:
                    raise ImageError(f"{url}: larger than {URL_LIMIT_BYTES} bytes")
                if time.monotonic() > end:
                    raise ImageError(f"{url}: took longer than {URL_LIMIT_S:g} s")
    except ImageError:
        raise
    except urllib.error.HTTPError as error:
        error.close()
        raise ImageError(f"{url}: {_reason(error)}") from error
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        raise ImageError(f"{url}: {_reason(error)}") from error
    return _decoded(io.BytesIO(data), f"{url}: what came is no readable image")


def _decoded(source: str | Path | io.BytesIO, trouble: str) -> Image.Image:
    try:
        with Image.open(source) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)  # IDEFICS3-FILE-001
            if upright.mode == "P" and isinstance(upright.info.get("transparency"), bytes):
                upright = upright.convert("RGBA")  # the same colours; Pillow warns when this step is left out
            return upright.convert("RGB")  # IDEFICS3-FILE-002
    except Exception as error:  # Pillow's decoders raise nearly everything on damaged files
        reason = "its format is not known" if isinstance(error, UnidentifiedImageError) else _reason(error)
        raise ImageError(f"{trouble}: {reason}") from error


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows a redirect only to an address that could have been asked for directly."""

    def __init__(self, allow_private: bool) -> None:
        self._allow_private = allow_private

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        try:
            _check_address(newurl, self._allow_private)
        except ImageError:
            fp.close()
            raise
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_address(url: str, allow_private: bool) -> None:
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        host = parts.hostname
    except ValueError as error:
        raise ImageError(f"{url}: {_reason(error)}") from error
    if parts.scheme not in ("http", "https") or not host:
        raise ImageError(f"{url}: only http and https addresses are fetched")
    try:
        found = socket.getaddrinfo(host, port)
    except (OSError, ValueError) as error:
        raise ImageError(f"{url}: {_reason(error)}") from error
    for *_, address in found:
        if not allow_private and not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_global:
            raise ImageError(f"{url}: {address[0]} is not a public address; allow_private_urls=True permits it")


def _reason(error: BaseException) -> str:
    text = str(getattr(error, "reason", None) or error) or type(error).__name__
    return " ".join(text.split())
