"""HTML pages that need nothing beside themselves: one frame and style, and the parts that they share.

A page is a template's body in the frame of `page.html`. Pictures and films travel inside it as data URIs.
"""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from html import escape
from importlib.resources import files
from string import Template

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image


def render(package: str, template: str, fields: Mapping[str, str]) -> bytes:
    """The page of a template that lies in a package. `fields` are its placeholders, as HTML; `title` is one of them."""
    body = Template(files(package).joinpath(template).read_text(encoding="utf-8")).substitute(fields)
    frame = Template(files("manipi").joinpath("page.html").read_text(encoding="utf-8"))
    return frame.substitute(title=fields["title"], body=body).encode()


def data_uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def thumbnail(image: UInt8[np.ndarray, "h w 3"], width: int) -> str:
    """A small JPEG as a data URI."""
    picture, buffer = Image.fromarray(image), io.BytesIO()
    picture.thumbnail((width, width))
    picture.save(buffer, "JPEG", quality=72)
    return data_uri("image/jpeg", buffer.getvalue())


def encode_mp4(images: Iterable[UInt8[np.ndarray, "h w 3"]], fps: float, *, height: int, width: int) -> bytes:
    """H.264 in yuv420p, which every browser plays; small, where the writer of training data is exact.

    Args:
        height, width: of the film, rounded up to even numbers.
    """
    import av  # which takes long, and most pages have no film

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        options = {"crf": "24", "preset": "medium", "threads": "1"}
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.height, stream.width, stream.pix_fmt = height + height % 2, width + width % 2, "yuv420p"
        stream.gop_size = 10  # jumping in time is quick
        for image in images:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            container.mux(stream.encode(frame.reformat(width=stream.width, height=stream.height)))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def polyline(values: Float[np.ndarray, " n"], low: float, high: float, kind: str) -> str:
    """A curve for a viewBox of 100 × 30; a class gives it its colour."""
    x = np.linspace(0, 100, len(values)) if len(values) > 1 else np.full(len(values), 50.0)
    y = 29 - 28 * (values - low) / (high - low) if high > low else np.full(len(values), 15.0)
    points = " ".join(f"{a:.4g},{b:.4g}" for a, b in zip(x.tolist(), y.tolist(), strict=True))
    return f'<polyline class="{kind}" points="{points}"/>'


def fact_rows(rows: Sequence[tuple[str, str]], *, total: bool = False) -> str:
    """Table rows; with `total`, the last one stands out."""
    marks = [" class=total" if total and i == len(rows) - 1 else "" for i in range(len(rows))]
    return "\n".join(
        f'<tr{mark}><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>'
        for mark, (name, value) in zip(marks, rows, strict=True)
    )


def percent(share: float) -> str:
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"
