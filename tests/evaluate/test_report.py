"""The report stands alone, holds every number, and its films play."""

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import av
import pytest

from manipi.evaluate.report import write_report
from manipi.evaluate.statistics import SuccessRate, success_rate
from manipi.records import from_json, read_json

VOID = {"meta", "br", "img", "link", "input", "hr"}
SVG_VOID = {"line", "rect"}


class Page(HTMLParser):
    """Checks that tags nest, and collects what they refer to."""

    def __init__(self, html: str):
        super().__init__()
        self.open, self.sources, self.text = [], [], []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.sources += [(tag, value) for name, value in attrs if name in ("src", "href", "srcset", "poster", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in SVG_VOID

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def html(report, tmp_path) -> str:
    write_report(tmp_path / "report.html", report)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_stands_alone(html):
    page = Page(html)
    assert {tag for tag, _ in page.sources} == {"img", "video"}
    assert all(source.startswith("data:") for _, source in page.sources)
    assert not re.search(r"https?://|//\w|url\(|@import", re.sub(r"base64,[\w+/=]+", "", html))


def test_every_number_is_there(html, report):
    text = " ".join(Page(html).text).replace("\N{NO-BREAK SPACE}", " ")
    for rate in report.success.values():
        assert f"{rate.k} of {rate.n}" in text
        assert f"{rate.low:.1%} to {rate.high:.1%}".replace("%", " %") in text
    for stage, seconds in report.seconds.items():
        assert stage in text
        assert f"{seconds:.1f} s" in text
    for number in ("5.3 ms", "8.9 ms", "7,991", "234,567", "0.02345", "1.4 MB", "479.2 s", "torch 2.13.0"):
        assert number in text
    for film in report.films:
        assert film.trial["prompt"] in text
        assert f"seed {film.trial['seed']}" in text
    assert "Successes: 2" in text
    assert "Failures: 2" in text
    assert "touched the wrong block" in text


def test_films_play(html, report):
    sources = [source for tag, source in Page(html).sources if tag == "video"]
    assert len(sources) == len(report.films)
    for source, film in zip(sources, report.films, strict=True):
        kind, _, data = source.partition(";base64,")
        assert kind == "data:video/mp4"
        with av.open(io.BytesIO(base64.b64decode(data)), "r") as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
            decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert len(decoded) == len(film.frames) + 10  # the last one stands for a second
        error = abs(decoded[5].astype(int) - film.frames[5])
        assert error.mean() < 4


def test_says_what_the_intervals_allow(report, tmp_path):
    path = tmp_path / "report.html"
    write_report(path, report)
    assert "above those of all three controls" in path.read_text()
    close = {**report.success, "blind": success_rate(180, 200), "untrained": success_rate(181, 200)}
    write_report(path, replace(report, success=close))
    assert "not</b> lie above that of untrained and blind" in path.read_text()


def test_json_reads_back(report, tmp_path):
    report.write_json(tmp_path / "report.json")
    data = read_json(tmp_path / "report.json")
    assert set(data) == {"success", "seconds", "latency_ms", "settings", "comparison"}
    assert {k: from_json(v, [SuccessRate], "report.json") for k, v in data["success"].items()} == report.success
    assert data["latency_ms"] == report.latency_ms
