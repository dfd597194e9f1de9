"""A store on the loopback address: files over HTTP with ranges, and the misbehaviour of real networks."""

import base64
import hashlib
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, quote, unquote, urlsplit

import numpy as np
import pytest

from manipi.remote import fetch as remote

GCS = "/storage/v1/b/openpi-assets/o"


class Store(ThreadingHTTPServer):
    """What it serves, how it misbehaves, and what it was asked for.

    The same files are a web folder, the bucket `openpi-assets` of Google's store, the bucket `bucket` of Amazon's and
    the model `owner/name` of a hub, each in as much of its protocol as reading needs.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes] = {}
        self.log: list[tuple[str, int, int]] = []
        """Every answered request for content: name, first byte, and the byte behind the last one sent."""
        self.drop_after: int | None = None
        """Bytes of content after which a connection is closed."""
        self.ranges = True
        self.md5: str | None = None
        """Said instead of the true one."""
        self.kms = False
        """Whether Amazon's store encrypts with a key of the owner's, so that an ETag is no MD5."""
        self.before_content: Callable[[str, int], None] = lambda name, start: None

    def handle_error(self, request, client_address):
        """A client that hangs up, which is what killed processes do, is no news."""

    def add(self, **sizes: int) -> None:
        """Random files; `a__b=10` is `a/b` with ten bytes."""
        for name, size in sizes.items():
            rng = np.random.default_rng(len(self.files))
            self.files[name.replace("__", "/")] = rng.integers(0, 256, size, dtype=np.uint8).tobytes()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Store

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path, query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        if path.startswith(("/api/models/owner/name", "/owner/name/resolve")):
            self.hub(path)
        elif path.removeprefix("/download").startswith(GCS):
            self.google(path.removeprefix("/download").removeprefix(GCS).strip("/"), query)
        elif path.startswith("/bucket"):
            self.amazon(path.removeprefix("/bucket").strip("/"), query)
        else:
            self.web(unquote(path).strip("/"))

    def web(self, name):
        if name in self.server.files:
            return self.content(name)
        here = [PurePosixPath(f).relative_to(name) for f in self.server.files if PurePosixPath(f).is_relative_to(name)]
        links = {quote(p.parts[0]) + ("/" if len(p.parts) > 1 else "") for p in here}
        index = "".join(f'<a href="{link}">x</a>' for link in ["../", "?C=N;O=D", *sorted(links)])
        return self.answer(index.encode(), "text/html") if here else self.send_error(404)

    def hub(self, path):
        files = {f: {"type": "file", "path": f, "size": len(b), "oid": _sha1(b)} for f, b in self.server.files.items()}
        for name, entry in files.items():
            if name.endswith(".bin"):
                digest = hashlib.sha256(self.server.files[name]).hexdigest()
                entry["lfs"] = {"oid": digest, "size": entry["size"], "pointerSize": 130}
        if "/resolve/" in path:
            return self.content(unquote(path.partition("/resolve/")[2].partition("/")[2]))
        if "/tree/" in path:
            return self.answer(json.dumps(list(files.values())).encode())
        siblings = [{"rfilename": name} for name in files]
        return self.answer(json.dumps({"id": "owner/name", "sha": "c" * 40, "siblings": siblings}).encode())

    def google(self, name, query):
        name = unquote(name)
        if query.get("alt") == ["media"]:
            return self.content(name)
        items = [_google_item(n, b) for n, b in self.server.files.items()]
        if name:
            found = [i for i in items if i["name"] == name]
            return self.answer(json.dumps(found[0]).encode()) if found else self.send_error(404)
        items = [i for i in items if i["name"].startswith(query.get("prefix", [""])[0])]
        return self.answer(json.dumps({"items": items}).encode())

    def amazon(self, name, query):
        name = unquote(name)
        if name:
            return self.content(name) if name in self.server.files else self.send_error(404)
        rows = "".join(
            f'<Contents><Key>{n}</Key><Size>{len(b)}</Size><ETag>"{self.etag(b)}"</ETag></Contents>'
            for n, b in sorted(self.server.files.items())
            if n.startswith(query.get("prefix", [""])[0])
        )
        xml = f"<ListBucketResult><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>"
        return self.answer(xml.encode(), "application/xml")

    def etag(self, data):
        return hashlib.md5(data + b"encrypted" * self.server.kms).hexdigest()

    def answer(self, body, kind="application/json"):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def content(self, name):
        asked = self.headers.get("Range", "").removeprefix("bytes=").split("-")
        start, ranged = int(asked[0] or 0), len(asked) == 2 and self.server.ranges
        start = start if ranged else 0
        if self.command == "GET":
            self.server.before_content(name, start)
        data = self.server.files[name]
        end = min(int(asked[1]) + 1, len(data)) if ranged and asked[1] else len(data)
        if start >= len(data) and data:
            return self.send_error(416)
        self.send_response(206 if ranged else 200)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(end - start))
        self.send_header("ETag", f'"{self.etag(data)}"')
        if self.server.kms:
            self.send_header("x-amz-server-side-encryption-aws-kms-key-id", "arn:mine")
        if self.server.md5 is not None:
            self.send_header("Content-MD5", base64.b64encode(bytes.fromhex(self.server.md5)).decode())
        if ranged:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        self.end_headers()
        if self.command == "HEAD":
            return None
        sent = min(end, start + (self.server.drop_after or end))
        self.server.log.append((name, start, sent))
        self.wfile.write(data[start:sent])
        if sent < end:
            self.close_connection = True
        return None


def _google_item(name, data):
    item = {"name": name, "bucket": "openpi-assets", "size": str(len(data)), "generation": "7"}
    if name.endswith("composed"):  # uploaded in parts, which have no common MD5
        import google_crc32c

        return item | {"crc32c": base64.b64encode(google_crc32c.Checksum(data).digest()).decode()}
    return item | {"md5Hash": base64.b64encode(hashlib.md5(data).digest()).decode()}


def _sha1(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    for name in ("MANIPI_OFFLINE", "HF_HUB_OFFLINE", "HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MANIPI_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("OPENPI_DATA_HOME", str(tmp_path / "openpi"))
    monkeypatch.setattr(remote, "PAUSES", (0.01, 0.02, 0.03, 0.04, 0.05))


@pytest.fixture
def store():
    with Store() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def serve(store, shared_datasets):
    """Put a folder of files, or a dataset of that name, into the store; its URL."""

    def serve(name: str | Path) -> str:
        folder = shared_datasets / name
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                store.files[f"{folder.name}/{path.relative_to(folder)}"] = path.read_bytes()
        return f"{store.url}/{folder.name}"

    return serve


@pytest.fixture
def wait_until():
    """`wait_until(condition)` fails after half a minute."""

    def wait(condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < end, "it did not happen"
            time.sleep(0.02)

    return wait
