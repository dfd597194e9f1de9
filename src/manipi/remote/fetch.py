"""Files and folders of stores, fetched once and verified.

    fetch("gs://openpi-assets/checkpoints/pi05_droid")
    home()                                             MANIPI_HOME, or ~/.cache/manipi
    └─ gs+openpi-assets+checkpoints/                   one folder per folder of a store, so that sources never nest
       ├─ pi05_droid/                                  appears by one rename, when all is there and verified
       ├─ .pi05_droid.manifest.json                    source, and size, version and SHA-256 of every file
       ├─ .pi05_droid.partial/                         while it is fetched; continued by the next call
       └─ .pi05_droid.lock                             other processes wait for it, and then find the folder

Every file is read in blocks by byte ranges. When a connection drops, the block is asked for again, smaller and after a
pause; when the process dies, the next call goes on behind the last whole block. The store is listed before and after: a
file whose version changed in between is fetched anew, so that no download mixes two versions.
"""

import hashlib
import os
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from manipi.errors import FetchError, unknown_name
from manipi.records import json_bytes, read_object
from manipi.remote.stores import SCHEMES, Store, StoreFile, fetch_error
from manipi.storage import Lock, atomic_write, home, storage_errors

PARALLEL = 4
ROUNDS = 3
RERELEASED = 1739750400.0
"""2025-02-17, in seconds since 1970: openpi replaced checkpoints until then, and itself drops older copies."""
_ROOM = "free some space or choose another folder with MANIPI_HOME; what was fetched is kept, and continued next time"


def fetch(source: str, *, offline: bool | None = None, show: bool = True) -> Path:
    """The local file or folder that holds `source`, complete and verified; downloaded where it is not here yet.

    Args:
        source: `gs://bucket/path`, `s3://bucket/path`, `hf://owner/name[@revision][/path]`, `https://host/path` (a
            folder's index where it ends in `/`), or a local path, which is returned as it is. `#sha256=HEX` behind
            a file's address is verified too.
        offline: whether to do without the network; MANIPI_OFFLINE decides where None, and HF_HUB_OFFLINE for hf://.
        show: whether to draw a progress bar.

    Raises:
        FetchError: not there, not reachable, offline, or not the bytes that were promised.
        StorageError: a full disk, or a folder that cannot be written.
    """
    url, _, sha256 = source.partition("#sha256=")
    scheme, remote, _ = url.partition("://")
    if remote and scheme not in SCHEMES:
        raise unknown_name("scheme", scheme, SCHEMES, next="name a local path, or an address of one of these stores")
    path = _cached(url) if remote else Path(url).expanduser()
    if path is None:
        _require_network(url, offline)
        target = target_of(url)
        with storage_errors(target, next=_ROOM):
            target.parent.mkdir(parents=True, exist_ok=True)
            with Lock(target.with_name(f".{target.name}.lock")):
                path = _cached(url) or _download(Store(url), target, sha256, show)
    if not path.exists():
        next = f"check the path; an address begins with {', '.join(f'{scheme}://' for scheme in SCHEMES)}"
        raise fetch_error("a file or folder", "nothing of that name", url, next)
    if sha256:
        found = "a folder, which has no hash of its own" if path.is_dir() else f"SHA-256 {_digest(path, 'sha256')}"
        if found != f"SHA-256 {sha256}":
            next = "correct the hash behind #sha256=, or delete the file and fetch it again"
            raise fetch_error(f"SHA-256 {sha256}", found, str(path), next)
    return path


def origin(path: Path) -> str:
    """The address that a file or folder was fetched from; empty where it was not fetched by itself."""
    return _manifest(path).get("source", "")


def listing(url: str) -> dict[str, StoreFile]:
    """The files of a folder in its store as they are now, by relative path. Raises FetchError."""
    _require_network(url, None)
    return Store(url).files()


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, from its manifest where it was fetched by itself."""
    return _manifest(path)["files"].get(".", {}).get("sha256") or _digest(path, "sha256")


def is_here(url: str) -> bool:
    """Whether `fetch` would find it without asking the store."""
    return _cached(url) is not None


def verify(path: Path) -> None:
    """Hash every file of a download again. Raises FetchError where one differs from what was fetched."""
    files = _manifest(path)["files"]
    for name, entry in files.items():
        if not (path / name).is_file() or _digest(path / name, "sha256") != entry["sha256"]:
            raise _altered(path, name)


def _cached(url: str) -> Path | None:
    """What is here already: a download of this source or of a folder around it, or openpi's copy."""
    _require_address(url)
    parts = url.rstrip("/").split("/")
    for end in range(len(parts), 2, -1):
        target, inner = target_of("/".join(parts[:end])), "/".join(parts[end:])
        files = _manifest(target)["files"] if target.exists() else {}
        if target.exists() and not files:
            raise _altered(target, "its manifest")
        wanted = [name for name in files if name == inner or not inner or name.startswith(f"{inner}/")]
        for name in wanted:
            if not (target / name).is_file() or (target / name).stat().st_size != files[name]["size"]:
                raise _altered(target, name)
        if wanted:
            return target / inner
    path = _openpi_path(url)
    if path is None or path.is_file():
        return path
    # A folder may hold only what was fetched from inside it. openpi leaves a lock beside what it fetched as a whole.
    around = (path, *path.parents[: len(parts) - 3])
    whole = [p for p in around if p.with_suffix(".lock").is_file()]
    return path if whole and not whole[0].with_suffix(".partial").exists() else None


def _require_address(url: str) -> None:
    """Raises FetchError where there is no name of a store, or a port that is none."""
    scheme, _, rest = url.partition("://")
    try:
        named = urlsplit(f"//{rest}")
        if named.netloc and (scheme not in ("http", "https") or (named.hostname and named.port != 0)):
            return
        fault = "no name of a store"
    except ValueError as error:
        fault = str(error)
    next = "name bucket or host behind ://, as in gs://bucket/path or https://host/path"
    raise fetch_error("an address of a file or folder in a store", fault, url, next)


def _openpi_path(url: str) -> Path | None:
    root = Path(os.environ.get("OPENPI_DATA_HOME") or "~/.cache/openpi").expanduser().absolute()
    path = root / url.removeprefix("gs://").rstrip("/")
    usable = url.startswith("gs://") and path.exists()
    old = usable and "openpi-assets/checkpoints" in url and path.stat().st_mtime <= RERELEASED
    return path if usable and not old else None


def _require_network(url: str, offline: bool | None) -> None:
    names = ("MANIPI_OFFLINE", "HF_HUB_OFFLINE") if url.startswith("hf://") else ("MANIPI_OFFLINE",)
    switches = [name for name in names if os.environ.get(name, "").lower() in ("1", "on", "yes", "true")]
    if offline or (offline is None and switches):
        raise fetch_error(
            f"{url} among the downloads, as {switches[0] if offline is None else 'offline=True'} forbids the network",
            f"nothing at {target_of(url)}",
            url,
            f"where there is a network, run fetch({url!r}) of manipi.remote.fetch, then copy {home()} here",
        )


def _download(store: Store, target: Path, sha256: str, show: bool) -> Path:
    """Fetch, verify and rename; the caller holds the lock."""
    partial = target.with_name(f".{target.name}.partial")
    known = {name: entry["version"] for name, entry in _manifest(target)["files"].items()}
    for _ in range(ROUNDS):
        files = store.files()
        if (copy := _openpi_path(store.url)) and all(_size(copy / name) == f.size for name, f in files.items()):
            return copy
        for name, file in files.items():
            if known.get(name) != file.version or file.size is None or _size(partial / name) > file.size:
                (partial / name).unlink(missing_ok=True)
        for stray in (p for p in partial.rglob("*") if p.is_file() and str(p.relative_to(partial)) not in files):
            stray.unlink()  # it was in the store once, and is no more
        known = {name: file.version for name, file in files.items()}
        _write_manifest(target, store.url, files, partial, {})
        try:
            _fetch_all(store, files, partial, show)
        except FetchError:
            if store.files() == files:
                raise
        if store.files() == files:
            break
    else:
        raise fetch_error(
            "files that stay as they are", f"changes in all of {ROUNDS} rounds", store.url, "try again later"
        )

    def verified(name: str) -> str:
        """SHA-256 of a fetched file that has all its checksums; another one is deleted."""
        path, file = partial / name, files[name]
        for algorithm, expected in ({**file.checksums} | ({"sha256": sha256} if sha256 else {})).items():
            if (found := _digest(path, algorithm)) != expected:
                path.unlink()
                next = "run the same again; it starts from nothing"
                raise fetch_error(f"{algorithm} {expected}", found, file.path, next)
        return _digest(path, "sha256")

    with ThreadPoolExecutor(PARALLEL) as pool:
        _write_manifest(target, store.url, files, partial, dict(zip(files, pool.map(verified, files))))
    partial.rename(target)
    return target


def _fetch_all(store: Store, files: Mapping[str, StoreFile], partial: Path, show: bool) -> None:
    from tqdm import tqdm

    stop, total = threading.Event(), sum(file.size or 0 for file in files.values())
    here = sum(_size(partial / name) for name in files)
    bar = tqdm(desc=store.url, total=total, initial=here, unit="B", unit_scale=True, disable=not show)
    with bar, ThreadPoolExecutor(PARALLEL) as pool:
        tasks = [pool.submit(store.append, file, partial / name, stop, bar.update) for name, file in files.items()]
        try:
            for task in as_completed(tasks):
                task.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _digest(path: Path, algorithm: str) -> str:
    with path.open("rb") as file:
        if algorithm == "crc32c":
            import google_crc32c  # only Google's store gives this sum

            checksum = google_crc32c.Checksum()
            while data := file.read(1 << 20):
                checksum.update(data)
            return checksum.digest().hex()
        return hashlib.file_digest(file, algorithm).hexdigest()


def target_of(url: str) -> Path:
    """Where a source lies once it is fetched by itself. Quoted and joined by `+`, two sources never share a name."""
    scheme, *parts = (quote(part, safe="@=:") for part in url.rstrip("/").replace("://", "/").split("/"))
    folder = "+".join((scheme, *parts[:-1]))
    if len(folder) > 200:  # a file system takes 255 bytes
        folder = f"{scheme}+{hashlib.sha256(folder.encode()).hexdigest()}"
    name = parts[-1]
    return home() / folder / (name if len(name) <= 200 else hashlib.sha256(name.encode()).hexdigest())


def _manifest(target: Path) -> dict[str, Any]:
    path = target.with_name(f".{target.name}.manifest.json")
    return read_object(path) if path.is_file() else {"files": {}}


def _write_manifest(
    target: Path, url: str, files: Mapping[str, StoreFile], partial: Path, hashes: Mapping[str, str]
) -> None:
    entries = {}
    for name, file in files.items():
        size = _size(partial / name) if hashes else file.size
        entries[name] = {"size": size, "version": file.version, "sha256": hashes.get(name)}
    atomic_write(target.with_name(f".{target.name}.manifest.json"), json_bytes({"source": url, "files": entries}))


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _altered(path: Path, name: str) -> FetchError:
    next = f"delete {path} and fetch it again; an altered download is never used"
    return fetch_error("the file that was fetched", "no such file, or another content", str(path / name), next)
