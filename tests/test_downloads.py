"""Images behind URLs: over http and https only, and within limits of size and time, whatever a server sends."""

import contextlib
import gzip
import http.server
import io
import threading
import time

import numpy as np
import pytest
from PIL import Image

from hf_maskformer import MaskFormerImageProcessor
from hf_maskformer import image_processing_maskformer_images as images
from hf_maskformer.evaluation.pipeline import _as_rgb
from hf_maskformer.evaluation.prediction import read_images

PAUSE = 0.05


def photo() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), "red").save(buffer, "PNG")
    return buffer.getvalue()


class Server(http.server.BaseHTTPRequestHandler):
    """Answers as the path says."""

    sent = 0

    def do_GET(self):
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the reader had enough
            getattr(self, self.path.strip("/"))()

    def log_message(self, *_):
        pass

    def start(self, status=200, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def good(self):
        self.start()
        self.wfile.write(photo())

    def endless(self):
        self.start(Content_Type="image/png")
        while Server.sent < 64 * 2**20:
            Server.sent += self.wfile.write(bytes(2**16))

    def slow(self):
        self.start()
        for byte in photo():
            self.wfile.write(bytes([byte]))
            time.sleep(PAUSE)

    def slow_header(self):
        for _ in range(1000):
            self.wfile.write(b"H")
            time.sleep(PAUSE)

    def silent(self):
        time.sleep(3)

    def to_file(self):
        self.start(302, Location="file:///etc/hostname")

    def to_ftp(self):
        self.start(302, Location="ftp://127.0.0.1/photo.png")

    def circle(self):
        self.start(302, Location="/circle")

    def page(self):
        self.start(Content_Type="image/png")
        self.wfile.write(b"<html>sign in</html>")

    def packed(self):
        self.start(Content_Encoding="gzip")
        self.wfile.write(gzip.compress(bytes(2**26)))

    def packed_if_asked(self):
        is_packed = "gzip" in self.headers.get("Accept-Encoding", "")
        self.start(**({"Content_Encoding": "gzip"} if is_packed else {}))
        self.wfile.write(gzip.compress(photo()) if is_packed else photo())

    def missing(self):
        self.start(404, Content_Type="image/png")
        self.wfile.write(photo())

    def cut(self):
        self.start(Content_Length=str(len(photo())))
        self.wfile.write(photo()[:20])


@pytest.fixture
def address(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    Server.sent = 0
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


READERS = {
    "processor": lambda url: MaskFormerImageProcessor()(url),
    "predict": lambda url: list(read_images(url)),
    "pipeline": lambda url: _as_rgb(url, timeout=None, index=0),
}


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_has_the_limits(address, reader, monkeypatch):
    READERS[reader](f"{address}/good")
    monkeypatch.setattr(images, "MAX_DOWNLOAD_BYTES", 2**20)
    with pytest.raises((ValueError, OSError), match="larger than 1 MiB"):
        READERS[reader](f"{address}/endless")
    # What the connection holds on its way is all that comes beyond the limit.
    assert Server.sent < 2**25


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://127.0.0.1/x.png", "FILE:///x", "zip://x::http://y/z"])
def test_only_http_is_read(reader, url):
    with pytest.raises(ValueError, match=r"read over http and https, not (file|ftp|FILE|zip)"):
        READERS[reader](url)


@pytest.mark.parametrize("path", ["slow", "slow_header", "silent"])
def test_a_slow_server_is_left_in_time(address, path):
    started = time.monotonic()
    with pytest.raises(Exception, match=r"not arrived after 0\.5 seconds|timed out"):
        images.download_image(f"{address}/{path}", seconds=0.5)
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("path", ["to_file", "to_ftp", "circle", "page", "packed", "cut"])
def test_what_leads_to_no_image_is_named(address, path):
    with pytest.raises(ValueError, match=rf"Image 0 \({address}/{path}\) cannot be read"):
        MaskFormerImageProcessor()(f"{address}/{path}")


def test_a_path_that_looks_like_none_of_them_is_a_path(tmp_path):
    Image.fromarray(np.zeros((3, 4), dtype=np.uint8)).save(tmp_path / "a:b.png")
    assert MaskFormerImageProcessor(do_resize=False)(str(tmp_path / "a:b.png"))["pixel_values"].shape[-2:] == (32, 32)


def test_an_image_that_a_server_could_pack_arrives(address):
    assert images.download_image(f"{address}/packed_if_asked").size == (4, 3)


def test_the_picture_of_an_error_is_not_taken_for_the_image(address):
    with pytest.raises(ValueError, match="404"):
        MaskFormerImageProcessor()(f"{address}/missing")


def test_an_image_at_an_address_without_a_path_has_a_name(monkeypatch):
    monkeypatch.setattr("hf_maskformer.evaluation.prediction._download", lambda url: Image.new("RGB", (4, 3)))
    assert [name for name, _ in read_images("http://127.0.0.1/")] == ["image"]
