"""Images from addresses: what is fetched, what is refused, and that nothing can be reached that was not checked."""

from __future__ import annotations

import io
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

from vlmqual_impl import image_urls
from vlmqual_impl.image_files import ImageError
from vlmqual_impl.image_urls import ImageFetch, fetch_image, is_public, is_url, opened, permission

NOISE = np.random.default_rng(5).integers(0, 256, (20, 30, 3), dtype=np.uint8)
LOCAL = ImageFetch(timeout_s=20, wait_s=20, limit_bytes=100_000, private=True)
Names = Callable[..., None]


def _encoded(kind: str, image: Image.Image | None = None) -> bytes:
    stream = io.BytesIO()
    (image or Image.fromarray(NOISE)).save(stream, kind)
    return stream.getvalue()


CONTENT = {
    "/image": _encoded("PNG"),
    "/p%C3%A4th?q=%C3%A4": _encoded("PNG"),
    "/big": b"\0" * 300_000,
    "/lie": b"<html>",
    "/eps": _encoded("EPS"),  # Pillow hands these to a program outside
    "/many": _encoded("PNG", Image.new("1", (2**13, 2**13 + 1))),
}
MOVES = {
    "/moved": "/image",
    "/relative": "image?x=1",
    "/file": "file:///etc/hostname",
    "/odd": "http://a:99999/",
    "/round": "/round",
    "/inside": "http://inside.example/secret",
    "/number": "http://169.254.169.254/latest/",
    "/user": "http://someone:word@127.0.0.1/",
}


class _Answers(BaseHTTPRequestHandler):
    """One path, one kind of answer; keeps what it was asked for."""

    asked: ClassVar[list[tuple[str, str]]] = []

    def log_message(self, *args: Any) -> None:
        return

    def do_GET(self) -> None:
        self.asked.append((self.headers["Host"], self.path))
        path = self.path.partition("?x")[0]
        try:
            self._answer(path)
        except OSError:
            return  # the client has gone, as it should

    def _answer(self, path: str) -> None:
        if path in MOVES:
            self.send_response(302)
            self.send_header("Location", MOVES[path])
            self.end_headers()
        elif path == "/garbage":
            self.wfile.write(b"garbage\r\n\r\n")
        elif path == "/missing":
            self.send_error(404)
        elif path in ("/silent", "/drip-head"):
            for _ in range(200):
                time.sleep(0.05)
                if path == "/drip-head":
                    self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                    self.wfile.flush()
        elif path == "/page":
            self._start("text/html")
            self.wfile.write(CONTENT["/image"])
        elif path == "/cut":
            self._start("image/png", len(CONTENT["/image"]))
            self.wfile.write(CONTENT["/image"][:200])
        elif path == "/drip":
            self._start("image/png")
            for _ in range(200):
                self.wfile.write(b"\0")
                self.wfile.flush()
                time.sleep(0.05)
        elif path == "/announced":
            self._start("image/png", 10)
            self.wfile.write(CONTENT["/big"])
        else:
            self._start("image/png; q=1")
            self.wfile.write(CONTENT[path])

    def _start(self, kind: str, length: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Answers) as server:
        server.daemon_threads = True
        server.block_on_close = False
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.fixture
def address(port: int) -> str:
    _Answers.asked.clear()
    return f"http://127.0.0.1:{port}"


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    """A name service of this test: each name has a list of answers, one for each time it is asked."""
    real = socket.getaddrinfo
    known: dict[str, list[list[str]]] = {}

    def look(host: str, *args: Any, **kwargs: Any) -> list[Any]:
        if host not in known:
            return real(host, *args, **kwargs)
        answers = known[host]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        return [found for number in answer for found in real(number, *args, **kwargs)]

    def name(host: str, *answers: list[str]) -> None:
        known[host] = list(answers)

    monkeypatch.setattr(socket, "getaddrinfo", look)
    return name


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch, port: int) -> list[str]:
    """Addresses that a connection was tried to; each leads to the local server, so that public ones can be played."""
    tried: list[str] = []
    real = socket.socket.connect

    def connect(self: socket.socket, address: Any) -> None:
        tried.append(str(address[0]))
        real(self, ("127.0.0.1", port))

    monkeypatch.setattr(socket.socket, "connect", connect)
    return tried


# permission ----------------------------------------------------------------------------------------------------------


def test_nothing_is_fetched_unless_asked_for(address: str, connected: list[str]) -> None:
    with pytest.raises(ImageError, match=r"/image: an address is fetched only with fetch=True"):
        opened(f"{address}/image", None)
    assert connected == []
    assert permission(None) is None
    assert permission(False) is None


def test_permission_is_true_or_limits_or_their_names() -> None:
    assert permission(True) == ImageFetch()
    assert ImageFetch().private is False
    assert permission({"private": True, "timeout_s": 3}) == ImageFetch(timeout_s=3, private=True)
    assert permission(LOCAL) is LOCAL
    for wrong in (1, "yes", ["private"], {"unknown": 1}):
        with pytest.raises(TypeError):
            permission(wrong)
    with pytest.raises(TypeError, match="fetch does not know 'timeout'; it knows timeout_s, wait_s, limit_bytes, pri"):
        permission({"timeout": 3})
    for private in ("no", 1, None):
        with pytest.raises(ValueError, match=r"private is .*; it has to be True or False"):
            permission({"private": private})


@pytest.mark.parametrize("limit", ["timeout_s", "wait_s", "limit_bytes"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), "3", True])
def test_limits_are_positive(limit: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{limit} is .*; it has to be positive"):
        ImageFetch(**{limit: value})


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("https://example.org/a.png", True),
        ("http://[::1]/a", True),
        ("ftp://example.org/a.png", True),
        ("s3://bucket/a.png", True),
        ("User:", False),
        ("see https://example.org/a.png", False),
        ("https://example.org/a b.png", False),
        ("example.org/a.png", False),
        ("//example.org/a.png", False),
        ("file:///etc/hostname", False),
        ("data:image/png;base64,AAAA", False),
        ("https://[", False),
        ("", False),
    ],
)
def test_an_address_has_a_scheme_and_a_host_and_no_blank(text: str, wanted: bool) -> None:
    # IDEFICS-PROC-015, ALGORITHMS 4.2
    assert is_url(text) is wanted


def test_paths_and_images_are_opened_without_permission(tmp_path: Path, connected: list[str]) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(CONTENT["/image"])
    for value in (path, str(path)):
        assert np.array_equal(np.asarray(opened(value, None)), NOISE)
    image = Image.new("L", (2, 2))
    assert opened(image, None) is image
    assert connected == []


# what comes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/image", "/moved", "/relative", "/image#part", "/p\u00e4th?q=\u00e4"])
def test_an_image_is_fetched(address: str, path: str) -> None:
    image = fetch_image(address + path, LOCAL)
    assert (image.mode, image.size) == ("RGB", (30, 20))
    assert np.array_equal(np.asarray(image), NOISE)
    assert "#" not in _Answers.asked[-1][1]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/page", "content type text/html is no image$"),
        ("/lie", "what came is no readable image: its format is not known$"),
        ("/eps", "what came is no readable image: its format is not known$"),
        ("/many", "what came is no readable image: 8192 x 8193 pixels are more than 67108864$"),
        ("/missing", "404 Not Found$"),
        ("/cut", "ended after 200 bytes, .* before the end that it announced$"),
        ("/big", "larger than 100000 bytes$"),
        ("/announced", "what came is no readable image: its format is not known$"),
        ("/garbage", "garbage$"),
        ("/with space", "an address holds no blanks or control characters$"),
        ("/with\nline", "an address holds no blanks or control characters$"),
        ("/file", "redirected to file:///etc/hostname: only http and https addresses are fetched$"),
        ("/odd", "redirected to http://a:99999/: Port out of range 0-65535$"),
        ("/user", "an address with a user's name is not fetched$"),
        ("/round", "more than 3 redirects$"),
    ],
)
def test_every_refusal_is_one_sentence_that_names_the_address(address: str, path: str, reason: str) -> None:
    with pytest.raises(ImageError, match=reason) as caught:
        fetch_image(address + path, LOCAL)
    sentence = str(caught.value)
    assert address in sentence
    assert path in sentence or repr(path)[1:-1] in sentence
    assert sentence.isprintable(), "one line"


@pytest.mark.parametrize(
    "url", ["ftp://example.org/a.png", "gopher://example.org/", "file://localhost/etc/hostname", "http://a:99999/"]
)
def test_other_kinds_of_addresses_are_refused(url: str, connected: list[str]) -> None:
    with pytest.raises(ImageError, match=r"only http and https|out of range"):
        fetch_image(url, LOCAL)
    assert connected == []


def test_nobody_answering_is_one_sentence() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(ImageError, match=r"^http://127\.0\.0\.1:\d+/a: .*refused"):
            fetch_image(f"http://127.0.0.1:{unused.getsockname()[1]}/a", LOCAL)


def test_proxies_of_the_environment_are_not_used(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    fetch_image(f"{address}/image", LOCAL)
    assert _Answers.asked[-1][1] == "/image"


# limits of time ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/drip", "/drip-head", "/silent"])
def test_time_is_limited_in_total_however_the_bytes_come(address: str, path: str) -> None:
    start = time.monotonic()
    with pytest.raises(ImageError, match=r"took longer than 0\.3 s$"):
        fetch_image(address + path, ImageFetch(timeout_s=0.3, private=True))
    assert time.monotonic() - start < 4


def test_silence_is_limited_on_its_own(address: str) -> None:
    start = time.monotonic()
    with pytest.raises(ImageError, match=r"nothing came for 0\.2 s$"):
        fetch_image(f"{address}/silent", ImageFetch(timeout_s=30, wait_s=0.2, private=True))
    assert time.monotonic() - start < 4


def test_a_name_service_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: answer.wait(9) and [])
    start = time.monotonic()
    with pytest.raises(ImageError, match=r"nothing came for 0\.2 s$"):
        fetch_image("http://slow.example/a.png", ImageFetch(timeout_s=30, wait_s=0.2))
    assert time.monotonic() - start < 4
    answer.set()


def test_redirects_share_the_time(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_urls, "REDIRECTS", 10**6)
    with pytest.raises(ImageError, match=r"took longer than 0\.3 s$"):
        fetch_image(f"{address}/round", ImageFetch(timeout_s=0.3, private=True))


def test_a_server_that_never_completes_tls_is_not_waited_for() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        start = time.monotonic()
        with pytest.raises(ImageError, match=r"took longer than 0\.3 s$"):
            fetch_image(f"https://127.0.0.1:{silent.getsockname()[1]}/a.png", ImageFetch(timeout_s=0.3, private=True))
        assert time.monotonic() - start < 4


# where it may come from ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    [
        *(
            "127.0.0.1",
            "127.8.9.1",
            "0.0.0.0",
            "10.1.2.3",
            "172.16.0.1",
            "192.168.0.1",
            "100.64.0.1",
            "169.254.169.254",
        ),
        *("192.0.2.1", "198.18.0.1", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255"),
        *("::", "::1", "fe80::1", "fe80::1%lo", "fec0::1", "fc00::1", "fd12::1", "ff02::1", "2001:db8::1", "100::1"),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1", "2002:7f00:1::", "64:ff9b::7f00:1", "64:ff9b::a00:1"),
        *("64:ff9b:1::1", "2001:0:7f00:1::", "4000::1"),
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address",
    ["93.184.216.34", "8.8.8.8", "2606:4700::1111", "2a00:1450:4001:80b::200e", "::ffff:8.8.8.8", "64:ff9b::808:808"],
)
def test_addresses_that_are_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "[::1]", "0.0.0.0", "10.1.2.3", "192.168.0.1", "169.254.169.254", "[::ffff:127.0.0.1]"),
        *("2130706433", "0x7f.1", "0177.0.0.1", "127.1", "\uff11\uff12\uff17.0.0.1", "[fe80::1]", "[64:ff9b::a00:1]"),
    ],
)
def test_hosts_of_this_network_are_refused_in_every_spelling(host: str, connected: list[str]) -> None:
    with pytest.raises(ImageError, match="is not a public address") as caught:
        fetch_image(f"http://{host}/image.png", ImageFetch())
    assert str(caught.value).startswith(f"http://{host}/image.png: ")
    assert connected == []


def test_a_name_is_refused_for_any_address_that_is_not_public(names: Names, connected: list[str]) -> None:
    for answer in (["10.0.0.1"], ["93.184.216.34", "10.0.0.1"], ["2606:4700::1111", "::1"]):
        names("mixed.example", answer)
        with pytest.raises(ImageError, match=r"^http://mixed\.example/image: \S+ is not a public address"):
            fetch_image("http://mixed.example/image", ImageFetch())
    assert connected == []


def test_the_connection_goes_to_the_address_that_was_checked(address: str, names: Names, connected: list[str]) -> None:
    names("public.example", ["93.184.216.34"], ["127.0.0.1"])  # another answer the second time
    image = fetch_image("http://public.example/image", ImageFetch())
    assert np.array_equal(np.asarray(image), NOISE)
    assert connected == ["93.184.216.34"], "the name was looked up again for the connection"
    assert _Answers.asked == [("public.example", "/image")], "the server is told the name, not the address"


def test_all_addresses_of_a_host_are_tried(names: Names, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    real = socket.socket.connect

    def connect(self: socket.socket, address: Any) -> None:
        tried.append(str(address[0]))
        if len(tried) == 1:
            raise ConnectionRefusedError("refused")
        real(self, ("127.0.0.1", port))

    monkeypatch.setattr(socket.socket, "connect", connect)
    names("two.example", ["93.184.216.34", "93.184.216.35"])
    fetch_image("http://two.example/image", ImageFetch())
    assert tried == ["93.184.216.34", "93.184.216.35"]


@pytest.mark.parametrize("path", ["/inside", "/number"])
def test_a_redirect_is_checked_like_an_address(address: str, names: Names, connected: list[str], path: str) -> None:
    names("public.example", ["93.184.216.34"])
    names("inside.example", ["192.168.7.7"])
    with pytest.raises(ImageError, match=r"redirected to http://\S+: \S+ is not a public address") as caught:
        fetch_image(f"http://public.example{path}", ImageFetch())
    assert str(caught.value).startswith(f"http://public.example{path}: ")
    assert connected == ["93.184.216.34"]
    assert len(_Answers.asked) == 1


def test_a_redirect_is_looked_up_anew(address: str, names: Names, connected: list[str]) -> None:
    names("public.example", ["93.184.216.34"], ["10.0.0.1"])
    with pytest.raises(ImageError, match=r"10\.0\.0\.1 is not a public address"):
        fetch_image("http://public.example/moved", ImageFetch())
    assert connected == ["93.184.216.34"]


def test_an_unknown_name_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def look(*args: Any, **kwargs: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", look)
    with pytest.raises(ImageError, match=r"^http://nowhere\.example/: .*Name or service not known$"):
        fetch_image("http://nowhere.example/", ImageFetch())


# https ---------------------------------------------------------------------------------------------------------------


def test_the_certificate_is_checked_for_the_name(
    address: str, names: Names, connected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, bool, ssl.VerifyMode]] = []

    def wrap(self: ssl.SSLContext, sock: socket.socket, *, server_hostname: str, **kwargs: Any) -> socket.socket:
        asked.append((server_hostname, self.check_hostname, self.verify_mode))
        return sock.dup()

    monkeypatch.setattr(ssl.SSLContext, "wrap_socket", wrap)
    names("public.example", ["93.184.216.34"])
    fetch_image("https://public.example/image", ImageFetch())
    assert asked == [("public.example", True, ssl.CERT_REQUIRED)]
    assert _Answers.asked == [("public.example", "/image")]


def test_a_server_without_tls_is_one_sentence(address: str) -> None:
    url = f"{address}/image".replace("http:", "https:")
    with pytest.raises(ImageError, match=r"SSL|handshake|EOF") as caught:
        fetch_image(url, LOCAL)
    assert str(caught.value).startswith(url)
