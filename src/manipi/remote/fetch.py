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

Stores are read by fsspec: `gs://` by gcsfs, `s3://` by s3fs, `hf://` by huggingface_hub, `https://` by aiohttp; each is
imported when its store is asked, because the first two are optional and all are slow to import.
"""

import base64
import hashlib
import importlib
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import quote, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from manipi.errors import FetchError, unknown_name
from manipi.records import json_bytes, read_object
from manipi.storage import Lock, atomic_write, home, storage_errors

_T = TypeVar("_T")

SCHEMES = ("gs", "s3", "hf", "https", "http")
PUBLIC_BUCKETS = ("openpi-assets", "big_vision", "vertex-model-garden-paligemma-us", "gresearch")
"""Read without an account; stale credentials would only be in the way."""
BLOCK = 16 << 20
"""Bytes of one request; a quarter after each failure, down to SMALLEST_BLOCK, and twice as many after each success."""
SMALLEST_BLOCK = 64 << 10
LOOK = 10.0
"""Seconds within which the way to a store is found or not."""
_ENDPOINTS = {
    "gs": ("STORAGE_EMULATOR_HOST", "https://storage.googleapis.com"),
    "hf": ("HF_ENDPOINT", "https://huggingface.co"),
}
"""Variables that name another one, which the libraries read too, and the usual one."""
_PACKAGES = {"gs": "gcsfs", "s3": "s3fs", "hf": "huggingface_hub", "https": "aiohttp", "http": "aiohttp"}
_LIBRARIES = ("gcsfs", "s3fs", "fsspec", "aiohttp", "botocore", "aiobotocore", "huggingface_hub", "google.auth")
_NO_ACCOUNT = ("NoCredentialsError", "DefaultCredentialsError", "RefreshError", "ProfileNotFound")
PAUSES = (0.1, 0.5, 2.0, 8.0, 30.0)
"""Seconds before each new attempt; after the last one the error is given to the caller."""
PARALLEL = 4
ROUNDS = 3
RERELEASED = 1739750400.0
"""2025-02-17, in seconds since 1970: openpi replaced checkpoints until then, and itself drops older copies."""
_ROOM = "free some space or choose another folder with MANIPI_HOME; what was fetched is kept, and continued next time"


# Stores ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StoreFile:
    """One file of a store: how to read it, when it is another one, and what it must hash to."""

    path: str
    size: int | None
    """None where the server does not tell."""
    version: str
    checksums: Mapping[str, str]
    """Hex digests by algorithm, as far as the store gives them: sha256, md5, crc32c."""


class Store:
    """A source in its store, asked with bounded patience.

    Raises:
        FetchError: the store cannot be reached, within seconds where this process has never reached it; or it does not
            answer.
    """

    def __init__(self, url: str):
        self.url, self.scheme = url, url.partition("://")[0]
        for library in _LIBRARIES:  # without a handler they would print a traceback per attempt
            logging.getLogger(library).addHandler(logging.NullHandler())
        self.patiently(lambda: importlib.import_module(_PACKAGES[self.scheme]))
        _require_reachable(url, self.scheme, self.patiently(lambda: _endpoint(url, self.scheme)))
        self.fs, self.root = self.patiently(self._open)

    def _open(self) -> tuple[Any, str]:
        import fsspec

        options: dict[str, Any] = {}
        if self.scheme == "gs":
            # Not the class that fsspec would take, which asks a gRPC service about the bucket before every request.
            from gcsfs.core import GCSFileSystem  # pyright: ignore[reportMissingImports]

            options = {"token": "anon"} if self.url.split("/")[2] in PUBLIC_BUCKETS else {}
            return GCSFileSystem(**options), self.url.removeprefix("gs://").rstrip("/")
        if self.scheme in ("http", "https"):
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
            # Bytes as they are stored: ranges of a compressed stream would not fit together.
            options = {"headers": {"Accept-Encoding": "identity"}}
            options["client_kwargs"] = {"trust_env": True, "timeout": timeout}
        return fsspec.url_to_fs(self.url, **options)

    def files(self) -> dict[str, StoreFile]:
        """All files by relative path, `.` for a source that is a file itself."""
        return self.patiently(self._files)

    def _files(self) -> dict[str, StoreFile]:
        self.fs.invalidate_cache()
        web = self.scheme in ("http", "https")
        top = {"type": "directory", "name": self.root} if web and self.root.endswith("/") else self.fs.info(self.root)
        if top["type"] != "directory":
            return {".": self._file(top)}
        root, files = top["name"].rstrip("/") + "/", {}
        # Without `on_error`, a folder of a web server that cannot be read would count as an empty one.
        for path, info in self.fs.find(self.root, detail=True, **({"on_error": "raise"} if web else {})).items():
            name = path.removeprefix(root)
            # Stores without folders mark them by empty objects; web servers link to other orders of the same index.
            if path.startswith(root) and name and not name.endswith("/") and not (web and "?" in name):
                name = unquote(name) if web else name
                if name.startswith("/") or ".." in PurePosixPath(name).parts:  # it would be written outside
                    raise PermissionError(f"{self.url} lists {name!r}, which lies outside of it")
                files[name] = self._file(self.fs.info(path) if web else info)
        if not files:
            raise FileNotFoundError(self.url)
        return files

    def _file(self, info: Mapping[str, Any]) -> StoreFile:
        etag = str(info.get("ETag", "")).strip('"')
        sums = {
            "sha256": info["lfs"].sha256 if info.get("lfs") else "",
            "md5": _hex(info.get("md5Hash") or info.get("Content-MD5")),
            "crc32c": _hex(info.get("crc32c")),
        }
        if self.scheme == "s3" and re.fullmatch("[0-9a-f]{32}", etag):
            bucket, _, key = info["name"].partition("/")
            head = self.fs.call_s3("head_object", Bucket=bucket, Key=key)
            # Under a key of one's own the ETag is not the MD5 of the content.
            if "SSEKMSKeyId" not in head and "SSECustomerAlgorithm" not in head:
                sums["md5"] = etag
        marks = ("size", "generation", "etag", "ETag", "blob_id", "Last-Modified")
        return StoreFile(
            path=info["name"],
            size=info["size"] if info.get("partial", True) else None,
            version=" ".join(str(info[mark]) for mark in marks if info.get(mark) is not None),
            checksums={algorithm: digest for algorithm, digest in sums.items() if digest},
        )

    def append(self, file: StoreFile, part: Path, stop: threading.Event, count: Callable[[int], object]) -> None:
        """Fetch what `part` lacks; `count` is told every number of bytes."""
        size, block, whole = file.size or 0, BLOCK, file.size is None

        def read() -> bytes:
            nonlocal block
            end = min(start + block, size)
            block = max(SMALLEST_BLOCK, (end - start) // 4)  # for the next attempt, if this one fails
            if self.scheme in ("gs", "s3"):
                data = self.fs.cat_file(file.path, start=start, end=end)
            else:
                with self.fs.open(file.path, "rb", cache_type="none", size=size) as stream:
                    stream.seek(start)
                    data = stream.read(end - start)
            if len(data) != end - start:
                raise ConnectionError(f"{len(data)} bytes where {end - start} were asked for")
            block = min(BLOCK, block * 8)
            return data

        part.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("ab") as output:
                while (start := output.tell()) < size and not stop.is_set():
                    data = self.patiently(read)
                    output.write(data)
                    output.flush()
                    count(len(data))
                os.fsync(output.fileno())
        except FetchError as error:
            if not isinstance(error.__cause__, ValueError):  # with which fsspec says that a server has no ranges
                raise
            whole = True
        if whole:  # all of it at once, from the beginning
            self.patiently(lambda: self.fs.get_file(file.path, str(part)))

    def patiently(self, call: Callable[[], _T]) -> _T:
        for pause in (*PAUSES, None):
            try:
                return call()
            except Exception as error:  # each store's package has errors of its own
                if pause is None or _is_final(error):
                    next = "check address, network and account, then run the same again: it goes on where it stopped"
                    if isinstance(error, ImportError):
                        next = "pip install 'manipi[cloud]'"
                    found = f"{type(error).__name__}: {error.__cause__ or error}"
                    raise fetch_error("an answer of the store", found, self.url, next) from error
                time.sleep(pause)
        raise AssertionError


_reached: set[str] = set()
"""Endpoints that this process has found reachable. They are asked with full patience: a run survives an outage."""


def _endpoint(url: str, scheme: str) -> str:
    """Where a store is, as its library will find it."""
    if scheme in ("http", "https"):
        return f"{scheme}://{url.split('/')[2]}"
    if scheme != "s3":
        name, default = _ENDPOINTS[scheme]
        return os.environ.get(name) or default
    import fsspec.config
    from botocore.session import get_session  # pyright: ignore[reportMissingImports]

    # Of region, profile and partition; a network of one's own may have a way to that region's endpoint alone. With
    # keys, because it would look for some otherwise, also in the network.
    client = get_session().create_client("s3", aws_access_key_id="none", aws_secret_access_key="none")
    return fsspec.config.conf.get("s3", {}).get("endpoint_url") or client.meta.endpoint_url


def _require_reachable(url: str, scheme: str, endpoint: str) -> None:
    """One look at the way to a store, by itself: some libraries try for minutes, and cannot be told otherwise."""
    parts = urlsplit(endpoint if "://" in endpoint else f"https://{endpoint}")
    proxy = getproxies().get(parts.scheme)
    if proxy and not proxy_bypass(parts.hostname or ""):
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    host, port = parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443)
    if endpoint in _reached:
        return
    failure: list[OSError] = [TimeoutError(f"no answer within {LOOK:g} s")]
    # In a thread, because nothing bounds how long a name is looked up.
    looking = threading.Thread(target=_look, args=(host, port, failure), daemon=True)
    looking.start()
    looking.join(LOOK)
    if failure:
        copy = f"copy here what another machine has fetched to its {home()}"
        next = f"check the network, and HTTPS_PROXY where there is a proxy; or {copy}"
        way = f"a way to {host}:{port}, where {scheme}:// is"
        raise fetch_error(way, str(failure[-1]), url, next)
    _reached.add(endpoint)


def _look(host: str, port: int, failure: list[OSError]) -> None:
    """Adds to `failure` what is wrong, and empties it once there is a connection."""
    for pause in (0.0, 1.0, 2.0):
        time.sleep(pause)
        try:
            socket.create_connection((host, port), timeout=LOOK).close()
            failure.clear()
            return
        except OSError as error:
            failure.append(error)
        except UnicodeError as error:
            failure.append(OSError(f"{host!r} is no name of a host: {error}"))


def _hex(base64_digest: str | None) -> str:
    return base64.b64decode(base64_digest or "").hex()


def _is_final(error: Exception) -> bool:
    """Whether another attempt would say the same."""
    cause = error.__cause__ or error
    if type(cause).__name__ in _NO_ACCOUNT or "certificate" in str(cause).lower():
        return True
    status = getattr(cause, "status", None) or getattr(getattr(cause, "response", None), "status_code", None)
    if isinstance(status, int):
        return 400 <= status < 500 and status not in (408, 416, 429)
    # fsspec also says "not found" of a web server that does not answer.
    silent = type(cause).__module__.startswith("aiohttp") or isinstance(cause, TimeoutError)
    return isinstance(error, (FileNotFoundError, PermissionError, ImportError, ValueError)) and not silent


def fetch_error(expected: str, found: str, where: str, next: str) -> FetchError:
    return FetchError(expected=expected, found=found, where=where, next=next)


# Downloads ------------------------------------------------------------------------------------------------------------


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
            with Lock(_beside(target, "lock")):
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
        named, fault = urlsplit(f"//{rest}"), "no name of a store"
        if named.netloc and (scheme not in ("http", "https") or (named.hostname and named.port != 0)):
            return
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
    partial = _beside(target, "partial")
    known = {name: entry["version"] for name, entry in _manifest(target)["files"].items()}

    def write_manifest(hashes: Mapping[str, str]) -> None:
        entries = {}
        for name, file in files.items():
            size = _size(partial / name) if hashes else file.size
            entries[name] = {"size": size, "version": file.version, "sha256": hashes.get(name)}
        atomic_write(_beside(target, "manifest.json"), json_bytes({"source": store.url, "files": entries}))

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
        write_manifest({})
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
        write_manifest(dict(zip(files, pool.map(verified, files))))
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


def _beside(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{kind}")


def _manifest(target: Path) -> dict[str, Any]:
    path = _beside(target, "manifest.json")
    return read_object(path) if path.is_file() else {"files": {}}


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _altered(path: Path, name: str) -> FetchError:
    next = f"delete {path} and fetch it again; an altered download is never used"
    return fetch_error("the file that was fetched", "no such file, or another content", str(path / name), next)
