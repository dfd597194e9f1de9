"""HTML pages that need nothing beside themselves, from Jinja2 templates, and the parts that they share.

A page is a template that fills the frame and style of `page.html`. Pictures and films travel inside it as data URIs.
"""

import base64
import io
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image


def render(template: str, **values: Any) -> bytes:
    """The page of a template, named by its path in this package such as `serve/dashboard.html`.

    What stands in `values` is escaped. Raises jinja2.UndefinedError for a value that the template reads and lacks.
    """
    import jinja2  # which takes long, and most commands write no page

    loader = jinja2.PackageLoader("manipi", ".")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": percent, "counted": counted}
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return environment.get_template(template).render(values).encode()


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


def polyline(values: Float[np.ndarray, " n"], low: float, high: float) -> str:
    """The points of a curve for an SVG polyline in a viewBox of 100 × 30."""
    x = np.linspace(0, 100, len(values)) if len(values) > 1 else np.full(len(values), 50.0)
    y = 29 - 28 * (values - low) / (high - low) if high > low else np.full(len(values), 15.0)
    return " ".join(f"{a:.4g},{b:.4g}" for a, b in zip(x.tolist(), y.tolist(), strict=True))


def percent(share: float) -> str:
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def counted(count: int, noun: str) -> str:
    """`1 episode`, `2,000 episodes`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
