"""Without a network: one error, within seconds, and no words of the libraries."""

import contextlib
import os
import socket
import time

import pytest
from tests.commands import run_manipi

from manipi.errors import FetchError
from manipi.remote import fetch as remote
from manipi.remote.fetch import fetch

ENDPOINTS = {
    "gs://openpi-assets/x": "STORAGE_EMULATOR_HOST",
    "hf://owner/name": "HF_ENDPOINT",
    "s3://bucket/x": "AWS_ENDPOINT_URL",
}


@pytest.fixture
def closed() -> str:
    """An address at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("source", ["pi05_droid", *ENDPOINTS, "{closed}/x"])
def test_an_import_without_a_network_says_one_thing(source, closed, tmp_path):
    began = time.monotonic()
    environment = dict.fromkeys(ENDPOINTS.values(), closed)
    target = tmp_path / "ours"
    result = run_manipi("import", source.format(closed=closed), target, "--recipe", "pi05_droid", **environment)
    assert time.monotonic() - began < 45  # of which most is for importing torch on a busy machine
    assert result.returncode == 1
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert [line.split()[0] for line in lines] == ["manipi", "expected", "found", "where", "next"], result.stderr
    assert "Connection refused" in result.stderr
    assert not list(tmp_path.glob("*ours*"))


def test_a_name_that_nobody_has():
    began = time.monotonic()
    with pytest.raises(FetchError, match=r"(?s)a way to no-such-host\.invalid:443.*HTTPS_PROXY"):
        fetch("https://no-such-host.invalid/x", show=False)
    assert time.monotonic() - began < remote.LOOK + 1


def test_a_store_that_never_answers_a_connection(monkeypatch):
    """Its queue of connections is full: the next one is dropped without a word, as by a firewall."""
    monkeypatch.setattr(remote, "LOOK", 0.5)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server, contextlib.ExitStack() as stack:
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(server.getsockname())
        began = time.monotonic()
        with pytest.raises(FetchError, match=r"no answer within 0\.5 s|timed out"):
            fetch(f"http://127.0.0.1:{server.getsockname()[1]}/x", show=False)
        assert time.monotonic() - began < 5


def test_the_way_leads_through_the_proxy(store, closed, monkeypatch):
    store.add(weights=1000)
    monkeypatch.setenv("http_proxy", closed)
    with pytest.raises(FetchError, match=f"a way to {closed.removeprefix('http://')}, where http"):
        fetch(f"{store.url}/weights", show=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert fetch(f"{store.url}/weights", show=False).is_file()


def test_a_store_that_was_reached_once_is_asked_patiently(store):
    """A run survives that its store is away for a while."""
    store.add(a=100, b=100)
    fetch(f"{store.url}/a", show=False)
    failures = iter(range(3))

    def fail(name, first):
        if next(failures, None) is not None:
            raise ConnectionResetError

    store.before_content = fail
    assert fetch(f"{store.url}/b", show=False).read_bytes() == store.files["b"]


def test_an_account_that_is_missing_is_not_asked_for_again(store, monkeypatch):
    pytest.importorskip("s3fs", reason="s3fs is part of manipi[cloud]")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)
    monkeypatch.setattr(remote, "PAUSES", (60.0,))
    with pytest.raises(FetchError, match="NoCredentialsError"):
        fetch("s3://bucket/run", show=False)


S3_PLACES = {
    "s3.amazonaws.com": ({}, ""),
    "s3.eu-west-1.amazonaws.com": ({"AWS_DEFAULT_REGION": "eu-west-1"}, ""),
    "s3.cn-north-1.amazonaws.com.cn": ({}, "[default]\nregion = cn-north-1\n"),
    "127.0.0.1": ({"AWS_PROFILE": "lab"}, "[profile lab]\nendpoint_url = http://127.0.0.1:9\nregion = eu-west-1\n"),
    "127.0.0.2": ({"AWS_ENDPOINT_URL_S3": "http://127.0.0.2:9", "AWS_DEFAULT_REGION": "eu-west-1"}, ""),
}


@pytest.mark.parametrize("host", S3_PLACES)
def test_s3_is_looked_for_where_its_library_finds_it(host, tmp_path, monkeypatch):
    """In a network without a way out there may be one to the endpoint of a region, but none to s3.amazonaws.com."""
    pytest.importorskip("s3fs", reason="s3fs is part of manipi[cloud]")
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    variables, config = S3_PLACES[host]
    (tmp_path / "config").write_text(config)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    looked = []

    def look(host, port, failure):
        looked.append(host)
        failure.append(OSError("nobody there"))

    monkeypatch.setattr(remote, "_look", look)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(FetchError, match="nobody there"):
        fetch("s3://bucket/x", show=False)
    assert looked == [host]


def test_a_profile_that_nobody_wrote(monkeypatch, tmp_path):
    pytest.importorskip("s3fs", reason="s3fs is part of manipi[cloud]")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    with pytest.raises(FetchError, match=r"ProfileNotFound.*lab"):
        fetch("s3://bucket/x", show=False)
