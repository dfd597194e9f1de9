"""Whether the files that hold a dataset's pictures are still the same, without reading them.

A video is known by its size and by its head and tail: an MP4 file's table of frames, with the size of each of them, is
at one of its ends. Of a video in a store, the store's own size and version are asked for. Two states of a file that one
copy in a store and another one elsewhere gave have the size in common, and are compared by that alone:

    SIZE ends DIGEST        on a disk
    SIZE ADDRESS VERSION    in the store of a dataset with that address
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from manipi.errors import FetchError
from manipi.remote.fetch import StoreFile, listing

logger = logging.getLogger(__name__)

_ENDS = 4096
"""Bytes that are read at each end of a file."""


def replaced(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The files that were known and are others now."""
    names = []
    for name, state in now.items():
        (size, source, *_), (size_before, source_before, *_) = state.split(" "), before.get(name, state).split(" ")
        if size != size_before or (source == source_before and state != before.get(name, state)):
            names.append(name)
    return names


def states_on_disk(root: Path, names: Sequence[str]) -> dict[str, str]:
    """Size and digest of each file that is there, by its path in `root`."""
    with ThreadPoolExecutor(8) as pool:  # on a disk over the network, opening is what takes time
        states = pool.map(_state, [root / name for name in names])
        return {name: state for name, state in zip(names, states, strict=True) if state}


def _state(path: Path) -> str:
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            ends = hashlib.sha256(file.read(_ENDS))
            file.seek(max(0, size - _ENDS))
            ends.update(file.read(_ENDS))
    except FileNotFoundError:  # what needs it says so
        return ""
    return f"{size} ends {ends.hexdigest()[:32]}"


def states_in_store(url: str, names: Sequence[str]) -> dict[str, str]:
    """The same of a dataset that is read from a store, as the store tells it now; nothing of a web server, which would
    have to be asked once per file. A store that cannot be reached is said in the log, and leaves the files unknown."""
    files = _videos(url) if names and not url.startswith("http") else {}
    known = {name: files.get(name.removeprefix("videos/")) for name in names}
    return {name: f"{file.size} {url} {file.version}" for name, file in known.items() if file}


@cache
def _videos(url: str) -> dict[str, StoreFile]:
    try:
        return listing(f"{url}/videos")
    except FetchError as error:
        logger.warning("whether the videos of %s were replaced is not known: %s", url, error.found)
        return {}
