"""`manipi view`: cameras and curves of an episode, as a page for the browser."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from manipi.cli.arguments import NewFile, parse
from manipi.errors import one_line
from manipi.storage import require_new_file


@dataclass(frozen=True, kw_only=True)
class _View:
    """Write cameras and curves of an episode as one HTML file, which needs nothing beside itself.

    manipi view path/to/dataset

    manipi view path/to/dataset 17 --out episode.html

    manipi view path/to/dataset 17 --rerun

    manipi view path/to/dataset 17 --without observation.images.wrist
    """

    dataset: tyro.conf.Positional[str]
    """Folder or URL of a dataset."""
    episode: tyro.conf.Positional[int | None] = None
    """Number of the episode; the first one unless given."""
    without: tuple[str, ...] = ()
    """Cameras and vectors to leave out, such as a camera whose files are not there."""
    out: NewFile | None = None
    """The file to write; view-<dataset>-<episode>.html, or .rrd with --rerun, unless given."""
    rerun: bool = False
    """Write a recording for the rerun viewer instead: pip install 'manipi[view]'."""


def main(arguments: Sequence[str]) -> None:
    """Write the page or the recording."""
    args = parse(_View, arguments, "view")

    from manipi.data.open import open_dataset
    from manipi.data.review.view import write_rerun, write_view

    number = args.episode if args.episode is not None else open_dataset(args.dataset).episodes[0].index
    dataset = open_dataset(args.dataset, episodes=(number,))
    kind, write = ("rrd", write_rerun) if args.rerun else ("html", write_view)
    path = args.out or Path(f"view-{dataset.name}-{number}.{kind}")
    require_new_file(path)
    write(path, dataset, without=args.without)
    opens = f"rerun {path}" if args.rerun else "open it in a browser"
    if depth := [key for key, feature in dataset.features.items() if feature.kind == "depth"]:
        print(f"left out: {one_line(', '.join(depth), 1000)}, which record depth, not colours")
    print(f"{path}  ({path.stat().st_size / 1e6:.1f} MB): {opens}")
