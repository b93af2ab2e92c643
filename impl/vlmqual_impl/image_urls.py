"""Images from addresses of the network: fetched only for those who ask, within limits, with the standard library alone.

Whoever writes a prompt chooses the address. So it must not reach hosts of this network (`private`), not even by a
redirect or by a name that changes its meaning between check and use, and what comes back must be an image of bounded
size in bounded time. Proxies that the environment names are not used: behind one the address could not be checked.
"""

from __future__ import annotations

import http.client
import io
import ipaddress
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from PIL import Image

from vlmqual_impl.image_files import ImageError, decoded, read_image

REDIRECTS = 3
LIMIT_PIXELS = 2**26  # 192 MiB as RGB; far less than that can be a few bytes in a file
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # Pillow hands some others to programs outside
_CHUNK = 2**16
_MOVED = (301, 302, 303, 307, 308)
_PORTS = {"http": 80, "https": 443}
_TRANSLATED = ipaddress.ip_network("64:ff9b::/96")  # IPv4 addresses behind a translator
_UNICAST = ipaddress.ip_network("2000::/3")
_SAFE = "!#$%&'()*+,/:;=?@[]~"  # what an address may hold beside letters, digits and -._


@dataclass(frozen=True)
class ImageFetch:
    """Permission to fetch images, and its limits.

    Attributes:
        timeout_s: seconds for all of it: name look-up, redirects, connections and content.
        wait_s: seconds for any one thing that is waited for: a name, a connection, the next bytes.
        limit_bytes: of the content.
        private: also from addresses that are not public: loopback, this network, link-local.

    Raises:
        ValueError: a limit is no positive number, or `private` is neither True nor False.
    """

    timeout_s: float = 20.0
    wait_s: float = 10.0
    limit_bytes: int = 32 * 2**20
    private: bool = False

    def __post_init__(self) -> None:
        for name in ("timeout_s", "wait_s", "limit_bytes"):
            limit = getattr(self, name)
            if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit > 0:
                raise ValueError(f"{name} is {limit!r}; it has to be positive, a number")
        if not isinstance(self.private, bool):
            raise ValueError(f"private is {self.private!r}; it has to be True or False")


def permission(fetch: Any) -> ImageFetch | None:
    """What a `fetch` argument permits.

    Args:
        fetch: None or False for nothing, True for the default limits, an `ImageFetch`, or a mapping of its fields.

    Raises:
        TypeError: it is something else, or the mapping has another key.
        ValueError: a value is not valid, see `ImageFetch`.
    """
    if fetch is None or fetch is False:
        return None
    if isinstance(fetch, ImageFetch):
        return fetch
    if fetch is True:
        return ImageFetch()
    if not isinstance(fetch, Mapping):
        raise TypeError(f"fetch is {fetch!r}; it has to be True, False, an ImageFetch or a mapping of its fields")
    known = [field.name for field in fields(ImageFetch)]
    for key in fetch:
        if key not in known:
            raise TypeError(f"fetch does not know {key!r}; it knows {', '.join(known)}")
    return ImageFetch(**fetch)


def is_url(text: str) -> bool:
    """True for text that has a scheme and a host and no blank, `https://example.org/a.png` (IDEFICS-PROC-015)."""
    try:
        parts = urllib.parse.urlsplit(text)
    except ValueError:  # such as an opened bracket in the host's place: no address
        return False
    return " " not in text and bool(parts.scheme and parts.netloc)


def opened(value: Any, limits: ImageFetch | None = None) -> Any:
    """An image named by a path or an address, read; anything else as it is.

    Args:
        value: a path, an address, or an image.
        limits: for addresses; None where they are not to be fetched.

    Raises:
        ImageError: it cannot be had or read, or it is an address and there are no limits.
    """
    if not isinstance(value, (str, Path)):
        return value
    if isinstance(value, Path) or not is_url(value):
        return read_image(value)
    if limits is None:
        raise ImageError(
            f"{_shown(value)}: an address is fetched only with fetch=True, "
            "in the call, the constructor or from_pretrained"
        )
    return fetch_image(value, limits)


def fetch_image(url: str, limits: ImageFetch) -> Image.Image:
    """Fetch an image, upright and RGB as `image_files.read_image` gives it.

    Args:
        url: http or https, without a user's name.
        limits: time, size, and whether it may come from an address that is not public.

    Raises:
        ImageError: it is not allowed, did not come within the limits, or is no image; the sentence names the address.
    """
    clock = _Clock(limits)
    place = url
    try:
        for _ in range(REDIRECTS + 1):
            answer = _asked(place, limits, clock)
            if isinstance(answer, bytes):
                return decoded(io.BytesIO(answer), "what came is no readable image", FORMATS, LIMIT_PIXELS)
            place = answer
        raise ImageError(f"more than {REDIRECTS} redirects")
    except TimeoutError as error:
        raise ImageError(f"{_shown(url)}: {clock.reason()}") from error
    except (http.client.HTTPException, OSError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        redirected = "" if place == url else f"redirected to {_shown(place)}: "
        raise ImageError(f"{_shown(url)}: {redirected}{reason}") from error


def _shown(url: str) -> str:
    return url if url.isprintable() else ascii(url)


class _Clock:
    """How long the next wait may take."""

    def __init__(self, limits: ImageFetch) -> None:
        self._limits = limits
        self._end = time.monotonic() + limits.timeout_s

    def left(self) -> float:
        """Seconds, more than 0.

        Raises:
            TimeoutError: the time for all of it is over.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return min(left, self._limits.wait_s)

    def reason(self) -> str:
        if time.monotonic() >= self._end:
            return f"took longer than {self._limits.timeout_s:g} s"
        return f"nothing came for {self._limits.wait_s:g} s"


def _asked(url: str, limits: ImageFetch, clock: _Clock) -> bytes | str:
    """What an address answers: content, or the address that it redirects to."""
    scheme, host, port, target = _parsed(url)
    with _connected(host, port, limits, clock) as plain:
        if scheme == "https":
            plain.settimeout(clock.left())
            with ssl.create_default_context().wrap_socket(plain, server_hostname=host) as secured:
                return _answer(http.client.HTTPSConnection(host, port), secured, target, url, limits, clock)
        return _answer(http.client.HTTPConnection(host, port), plain, target, url, limits, clock)


def _answer(
    client: http.client.HTTPConnection, via: socket.socket, target: str, url: str, limits: ImageFetch, clock: _Clock
) -> bytes | str:
    client.auto_open = 0  # only by the connection that was checked
    client.sock = _Connection(via, clock)
    client.request("GET", target, headers={"User-Agent": "vlmqual", "Accept": "image/*", "Connection": "close"})
    with client.getresponse() as response:
        where = response.getheader("Location")
        if response.status in _MOVED and where:
            return urllib.parse.urljoin(url, where)
        if response.status != 200:
            raise ImageError(f"{response.status} {response.reason}")
        kind = response.headers.get_content_type()
        if not kind.startswith("image/"):
            raise ImageError(f"content type {kind} is no image")
        data = bytearray()
        while part := response.read(_CHUNK):  # whatever Content-Length says
            data += part
            if len(data) > limits.limit_bytes:
                raise ImageError(f"larger than {limits.limit_bytes} bytes")
        if response.length:
            raise ImageError(f"ended after {len(data)} bytes, {response.length} before the end that it announced")
        return bytes(data)


def _parsed(url: str) -> tuple[str, str, int, str]:
    """(scheme, host, port, path and query) of an address, in ASCII."""
    if any(sign <= " " or sign == "\x7f" for sign in url):
        raise ImageError("an address holds no blanks or control characters")
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in _PORTS or not parts.hostname:
        raise ImageError("only http and https addresses are fetched")
    if "@" in parts.netloc:
        raise ImageError("an address with a user's name is not fetched")
    host = parts.hostname if parts.hostname.isascii() else parts.hostname.encode("idna").decode("ascii")
    target = urllib.parse.quote(parts.path or "/", safe=_SAFE)
    query = urllib.parse.quote(parts.query, safe=_SAFE)
    return parts.scheme, host, parts.port or _PORTS[parts.scheme], f"{target}?{query}" if query else target


# the connection ------------------------------------------------------------------------------------------------------


def is_public(address: str) -> bool:
    """True for an IP address that anyone can reach, and for no other spelling of one that is not."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour
        if found in _TRANSLATED:
            inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        return found.is_global and found in _UNICAST
    return found.is_global and not (found.is_multicast or found.is_reserved)


def _resolved(host: str, port: int, clock: _Clock) -> list[Any]:
    """What the name service says, not waited for longer than allowed."""
    found: list[Any] = []

    def look() -> None:
        try:
            found.append(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, ValueError) as error:
            found.append(error)

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    looking.join(clock.left())
    if not found:
        raise TimeoutError
    if isinstance(found[0], Exception):
        raise found[0]
    return list(found[0])


def _connected(host: str, port: int, limits: ImageFetch, clock: _Clock) -> socket.socket:
    """A connection to the first address of a host that takes one; all of its addresses have to be allowed.

    The name is looked up once and the very addresses that were checked are connected to: a name server that answers
    differently a moment later is not asked again.
    """
    found = _resolved(host, port, clock)
    for *_, address in found:
        if not limits.private and not is_public(str(address[0])):
            raise ImageError(f"{address[0]} is not a public address; fetch={{'private': True}} permits it")
    trouble: OSError = OSError("the host has no address")
    for index, (family, kind, protocol, _, address) in enumerate(found):
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(clock.left() / (len(found) - index))
            connection.connect(address)
            return connection
        except OSError as error:
            connection.close()
            trouble = error
    raise trouble


class _Connection:
    """What http.client needs of a socket. Every wait is bounded by one clock."""

    def __init__(self, connection: socket.socket, clock: _Clock) -> None:
        self._connection = connection
        self._clock = clock

    def sendall(self, data: bytes) -> None:
        self._connection.settimeout(self._clock.left())
        self._connection.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Content(self._connection, self._clock))

    def close(self) -> None:
        """Nothing: http.client closes while the answer is still being read, whoever connected closes after that."""


class _Content(io.RawIOBase):
    def __init__(self, connection: socket.socket, clock: _Clock) -> None:
        self._connection = connection
        self._clock = clock

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._connection.settimeout(self._clock.left())
        return self._connection.recv_into(buffer)
