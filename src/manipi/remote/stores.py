"""Files and folders in stores, listed and read with bounded patience.

One interface over fsspec: `gs://` by gcsfs, `s3://` by s3fs, `hf://` by huggingface_hub, `https://` by aiohttp; each is
imported when its store is asked, because the first two are optional and all are slow to import.
"""

import base64
import importlib
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from manipi.errors import FetchError
from manipi.storage import home

T = TypeVar("T")

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
        size, block, ranges = file.size or 0, BLOCK, True

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
            ranges = False
        if not ranges or file.size is None:  # all of it at once, from the beginning
            self.patiently(lambda: self.fs.get_file(file.path, str(part)))

    def patiently(self, call: Callable[[], T]) -> T:
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
    for pause in (1.0, 2.0, None):
        try:
            socket.create_connection((host, port), timeout=LOOK).close()
        except OSError as error:
            failure.append(error)
        except UnicodeError as error:
            failure.append(OSError(f"{host!r} is no name of a host: {error}"))
        else:
            failure.clear()
        if not failure or pause is None:
            return
        time.sleep(pause)


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
