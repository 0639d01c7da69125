"""The page of a run, opened by a real browser from a file."""

from __future__ import annotations

import functools
import http.server
import re
import shutil
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "cli"))

import bench_runs
from bench_runs import outcome

from lmcache_cli.bench import page, plots, summary

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
    pytest.mark.skipif(plots.library() is None, reason="plotly is not installed"),
]
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


def browse(tmp_path: Path, file: Path, *words: str) -> str:
    """What chromium prints for a page, once its scripts have run."""
    assert CHROMIUM is not None
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [CHROMIUM, *FLAGS, profile, "--virtual-time-budget=10000", *words, file.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.fixture
def file(tmp_path: Path) -> Path:
    run = bench_runs.run(bench_runs.four())
    run.warmup = [outcome("w", 990.0, [992.0], 992.5, is_first=True)]
    path = tmp_path / "report.html"
    path.write_text(page.run_page(summary.summarise(run, {"ttft": 500.0}), run.warmup, run.outcomes))
    return path


def test_every_plot_is_drawn_with_its_groups(tmp_path: Path, file: Path) -> None:
    dom = browse(tmp_path, file, "--dump-dom")
    assert dom.count('class="main-svg"') >= 4
    # the legends of the curves, the boxes of cold and warm, the three kinds of line on the timeline
    for words in ("cold (1)", "warm (2)", "cold, warm-up (1)", "failed or cancelled", "seconds since the first send"):
        assert words in dom
    assert len(re.findall(r'class="trace boxes"', dom)) == 3


@pytest.mark.parametrize("scheme", [0, 1])
@pytest.mark.parametrize("width", [400, 1000])
def test_the_page_is_painted_in_light_and_dark_and_on_a_narrow_screen(
    tmp_path: Path, file: Path, scheme: int, width: int
) -> None:
    shot = tmp_path / "shot.png"
    words = [f"--window-size={width},1600", f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={shot}"]
    browse(tmp_path, file, *words)
    corner, colours = seen(shot)
    assert (sum(corner) < 150) == (scheme == 0)  # dark is 0
    assert len(colours) > 50  # plots have many colours, an empty page two
    for colour in (plots.COLD, plots.WARM):
        assert bytes.fromhex(colour[1:]) in colours


def test_a_page_wider_than_the_screen_is_not_made(tmp_path: Path, file: Path) -> None:
    probe = "<script>document.title = 'width ' + document.documentElement.scrollWidth + ' ' + innerWidth;</script>"
    file.write_text(file.read_text().replace("</body>", f"{probe}</body>"))
    found = re.search(
        r"<title>width (\d+) (\d+)</title>", browse(tmp_path, file, "--dump-dom", "--window-size=500,900")
    )
    assert found is not None
    assert int(found[1]) <= int(found[2])


def test_nothing_is_asked_of_any_server(tmp_path: Path, file: Path, asked: list[str], origin: str) -> None:
    """The same page, but with an image of a server that is there, which its policy must keep out."""
    text = file.read_text()
    file.write_text(text.replace("<main>", f"<main><img src='{origin}/leak.png'>"))
    browse(tmp_path, file, "--dump-dom")
    assert asked == []
    file.write_text(re.sub("<meta http-equiv=[^>]*>", "", file.read_text()))
    browse(tmp_path, file, "--dump-dom")
    assert asked == ["/leak.png"]  # so the test can fail


@pytest.fixture
def asked() -> list[str]:
    return []


@pytest.fixture
def origin(asked: list[str]) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=functools.partial(server.serve_forever, poll_interval=0.05))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join(30)


def seen(path: Path) -> tuple[bytes, set[bytes]]:
    """The first pixel of a PNG, and all colours in it."""
    data = path.read_bytes()
    width, height, depth, kind = struct.unpack(">IIBB", data[16:26])
    size = {2: 3, 6: 4}[kind]
    assert depth == 8
    packed, place = b"", 8
    while place < len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        if data[place + 4 : place + 8] == b"IDAT":
            packed += data[place + 8 : place + 8 + length]
        place += length + 12
    raw, row = zlib.decompress(packed), bytearray(width * size)
    colours: set[bytes] = set()
    first = b""
    for y in range(height):
        start = y * (width * size + 1)
        row = _unfiltered(raw[start], bytearray(raw[start + 1 : start + 1 + width * size]), row, size)
        pixels = {bytes(row[i : i + 3]) for i in range(0, len(row), size)}
        first = first or bytes(row[:3])
        colours |= pixels
    return first, colours


def _unfiltered(kind: int, line: bytearray, above: bytearray, size: int) -> bytearray:
    """A line of a PNG, with its filter undone."""
    for i in range(len(line)):
        left = line[i - size] if i >= size else 0
        corner = above[i - size] if i >= size else 0
        up = above[i]
        if kind == 1:
            line[i] = (line[i] + left) & 255
        elif kind == 2:
            line[i] = (line[i] + up) & 255
        elif kind == 3:
            line[i] = (line[i] + (left + up) // 2) & 255
        elif kind == 4:
            guess = left + up - corner
            nearest = min((abs(guess - left), 0, left), (abs(guess - up), 1, up), (abs(guess - corner), 2, corner))
            line[i] = (line[i] + nearest[2]) & 255
    return line
