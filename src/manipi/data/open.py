"""Which reader opens a folder or URL."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from manipi import extensions
from manipi.data.dataset import Dataset, EpisodeSubset
from manipi.errors import (
    ConfigError,
    DatasetFormatError,
    DatasetNotFoundError,
    FetchError,
    ManipiError,
    one_line,
    quoted,
    shown,
    unknown_name,
)
from manipi.remote.fetch import fetch, is_here

_FOLDER = "the folder of a LeRobot dataset, with meta/info.json in it, or of an RLDS dataset's version"


class DatasetReader(Protocol):
    """What an entry point of the group `manipi.datasets` stands for: an object or a module with these functions."""

    def recognises(self, root: Path) -> bool:
        """Whether the folder is in this reader's format; asked where it is neither LeRobot nor RLDS."""
        ...

    def open(self, root: Path, episodes: Sequence[int]) -> Dataset:
        """The dataset in that folder. Episodes: the numbers of those to use; none named: all of them."""
        ...


@contextmanager
def _faults_of(name: str, root: Path) -> Iterator[None]:
    """What a reader raises, as an error that names its package and the folder; our own errors keep their type."""
    try:
        yield
    except ManipiError:
        raise
    except Exception as error:
        package = extensions.package_of(extensions.entries("manipi.datasets")[name][0])
        raise DatasetFormatError(
            expected=f"a folder that the dataset reader {name} of the package {package} can read",
            found=f"{type(error).__name__}: {one_line(str(error), 400)}",
            where=str(root),
            next=f"correct the folder, or pip install --upgrade {quoted(package)}",
        ) from error


def find_reader(root: Path) -> tuple[str, DatasetReader] | None:
    """Name and reader of an installed package that recognises the folder; None: there is none.

    Raises:
        ConfigError: several of them do, or one cannot be imported, or is no reader.
        DatasetFormatError: one of them fails; names its package.
    """
    readers: dict[str, DatasetReader] = {}
    for name in extensions.entries("manipi.datasets"):
        reader = extensions.find("manipi.datasets", name)
        with _faults_of(name, root):
            if reader.recognises(root):
                readers[name] = reader
    if len(readers) > 1:
        raise ConfigError(
            expected="a folder in one format",
            found=f"one that these dataset readers recognise: {', '.join(readers)}",
            where=str(root),
            next="uninstall the package of all but one of them",
        )
    return next(iter(readers.items()), None)


def fetch_tables(url: str) -> Path:
    """The local folder of a dataset elsewhere, with its metadata and, of LeRobot, its tables."""
    from manipi.data.rlds.fields import fetch_metadata

    url = url.rstrip("/")
    if is_here(f"{url}/dataset_info.json"):
        return fetch_metadata(url)
    try:
        meta = fetch(f"{url}/meta/")
    except FetchError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        return fetch_metadata(url)
    fetch(f"{url}/data/")
    return meta.parent


def open_dataset(
    path: str | Path, episodes: Sequence[int] = (), *, fields: str = "", split: str = "train", seed: int = 0
) -> Dataset:
    """Open a dataset with the reader of its format and version.

    Of a URL, metadata and tables are fetched; LeRobot's videos are when they are first needed. RLDS record files come
    one after the other while their index is made, and again when pictures of them are needed (`CachedFile`).
    LeRobot has meta/info.json in it; RLDS features.json, dataset_info.json and *.tfrecord* files; any other folder on
    this disk is shown to the dataset readers that installed packages add (`DatasetReader`).

    Args:
        episodes: the numbers of those to use; none named: all of them.
        fields, split, seed: of RLDS, as `open_rlds` takes them; `fields` names a map of `data.rlds.fields.BY_NAME`.

    Raises:
        DatasetNotFoundError: no such folder, or no frames in it.
        FetchError: the URL cannot be read.
        DatasetFormatError: an unknown version, or metadata that are missing or broken; or a package's reader fails.
        ConfigError: no episode of that number; several readers of installed packages recognise the folder; of RLDS:
            several versions, or no map of its features.
    """
    # The readers build on this module, so that they can only be imported from inside the function.
    from manipi.data.lerobot.reader import LeRobotDataset
    from manipi.data.lerobot.writer import how_to_finish
    from manipi.data.rlds.fields import BY_NAME, find_version
    from manipi.data.rlds.reader import open_rlds

    root = fetch_tables(str(path)) if "://" in str(path) else Path(path).expanduser().resolve()
    if not root.is_dir():
        waiting = how_to_finish(root)
        raise DatasetNotFoundError(
            expected=_FOLDER,
            found="a file" if root.exists() else "nothing" + (", but its episodes wait beside it" if waiting else ""),
            where=str(root),
            next=waiting
            or f"ls {quoted(root.parent)}  # then give the right path (--data.path, or --data.root for mixtures)",
        )
    is_lerobot = (root / "meta/info.json").is_file()
    if not is_lerobot and find_version(root):
        if fields and fields not in BY_NAME:
            raise unknown_name("map of RLDS features", fields, BY_NAME, next="name one of them (DatasetConfig.fields)")
        dataset = open_rlds(root, fields=BY_NAME[fields] if fields else None, split=split, seed=seed)
        return EpisodeSubset(dataset, episodes) if episodes else dataset
    if not is_lerobot and (found := find_reader(root)):
        name, reader = found
        with _faults_of(name, root):
            dataset = reader.open(root, tuple(episodes))
        if not isinstance(dataset, Dataset):
            raise ConfigError(
                expected="a manipi.Dataset, which a dataset reader opens",
                found=shown(dataset),
                where=str(root),
                next="correct `open` of that reader",
            )
    elif is_lerobot or any((root / name).is_dir() for name in ("meta", "data", "videos")):
        dataset = LeRobotDataset(root, sorted(episodes))
    else:
        raise DatasetNotFoundError(
            expected=_FOLDER,
            found=shown(sorted(path.name for path in root.iterdir()), 300),
            where=str(root),
            next=f"give the folder of one dataset; recordings of other formats: manipi convert {quoted(root)} TARGET",
        )
    chosen = not episodes or [episode.index for episode in dataset.episodes] == list(episodes)
    return dataset if chosen else EpisodeSubset(dataset, episodes)
