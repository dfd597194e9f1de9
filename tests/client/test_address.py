"""Addresses as people write them, against servers with and without TLS, on IPv4 and IPv6."""

import contextlib
import socket
import ssl
import subprocess
import threading
import time

import numpy as np
import pytest
from websockets.sync.server import serve

from manipi_client import AsyncWebsocketPolicy, ConnectError, ConnectTimeout, WebsocketPolicy, wire
from manipi_client.address import read_address


@pytest.mark.parametrize(
    ("host", "port", "uri"),
    [
        ("robot", 8000, "ws://robot:8000"),
        ("robot", None, "ws://robot"),
        ("robot:9000", 8000, "ws://robot:9000"),
        ("127.0.0.1:9000", 8000, "ws://127.0.0.1:9000"),
        (" 127.0.0.1 ", 8000, "ws://127.0.0.1:8000"),
        ("::1", 8000, "ws://[::1]:8000"),
        ("fe80::1%eth0", 8000, "ws://[fe80::1%eth0]:8000"),
        ("[::1]", 8000, "ws://[::1]:8000"),
        ("[::1]:9000", 8000, "ws://[::1]:9000"),
        ("robot:9000/policy", 8000, "ws://robot:9000/policy"),
        ("ws://robot", 8000, "ws://robot:8000"),
        ("WSS://robot:9000/", 8000, "wss://robot:9000/"),
        ("wss://robot", None, "wss://robot"),
        ("http://robot:8000/", 8000, "ws://robot:8000/"),
        ("https://robot", None, "wss://robot"),
        ("ws://[::1]", 8000, "ws://[::1]:8000"),
    ],
)
def test_what_an_address_means(host, port, uri):
    assert read_address(host, port) == uri
    assert read_address(host, port, secure=True) == (uri if "://" in host else uri.replace("ws:", "wss:"))


@pytest.mark.parametrize(
    ("host", "port"),
    [
        ("", 8000),
        ("ftp://robot", 8000),
        ("robot:http", 8000),
        ("robot:70000", 8000),
        ("robot:0", 8000),
        ("robot:1:2", 8000),
        ("[::1", 8000),
        ("my robot", 8000),
        ("ws://", 8000),
        ("ws://::1:8000", 8000),
        ("robot", 70000),
        ("robot", "http"),
        (8000, 8000),
        ("x" * 10_000 + ":y", 8000),
        ("x" * 64, 8000),
        ("robot..lab", 8000),
        ("robot:8000#policy", 8000),
        (b"robot", 8000),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [WebsocketPolicy, AsyncWebsocketPolicy])
def test_what_is_no_address_says_how_one_looks(kind, host, port):
    with pytest.raises(ConnectError, match=r"192\.168\.1\.20:8000, \[::1\]:8000") as refused:
        kind(host, port)
    assert len(str(refused.value)) < 500


@contextlib.contextmanager
def server(host="127.0.0.1", tls=None):
    """Answers every observation with zeros; yields its port."""

    def answer(connection):
        connection.send(wire.pack({"robot": "tiny"}))
        for _ in connection:
            connection.send(wire.pack({"actions": np.zeros((2, 2))}))

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with serve(answer, sock=socket.create_server((host, 0), family=family), ssl=tls, compression=None) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield listening.socket.getsockname()[1]
        listening.shutdown()
        thread.join()


@pytest.mark.parametrize("address", ["127.0.0.1:{}", "localhost:{}", "http://127.0.0.1:{}/", "ws://127.0.0.1:{}"])
def test_these_addresses_work(address):
    with server() as port, WebsocketPolicy(address.format(port)) as policy:
        assert policy.infer({})["actions"].shape == (2, 2)


@pytest.mark.parametrize("address", ["[::1]:{}", "ws://[::1]:{}"])
def test_ipv6(address):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this computer has no IPv6")
    with server("::1") as port, WebsocketPolicy(address.format(port)) as policy, WebsocketPolicy("::1", port) as other:
        assert policy.infer({})["actions"].shape == other.infer({})["actions"].shape == (2, 2)


def test_a_password_in_an_address_is_not_repeated(caplog):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(ConnectTimeout) as late:
        WebsocketPolicy(f"ws://me:t0ken-of-the-lab@127.0.0.1:{port}/path", connect_timeout=0.2)
    assert late.value.where == f"ws://127.0.0.1:{port}/path"
    assert "t0ken" not in f"{late.value}{caplog.text}"


# ---- TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """Two self-signed certificates for 127.0.0.1, each with its key, and one for another name."""
    folder = tmp_path_factory.mktemp("tls")
    names = {"server": "IP:127.0.0.1,DNS:localhost", "stranger": "IP:127.0.0.1", "elsewhere": "DNS:elsewhere"}
    for name, subjects in names.items():
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        command += ["-subj", f"/CN={name}", "-addext", f"subjectAltName={subjects}"]
        command += ["-keyout", f"{name}.key", "-out", f"{name}.pem"]
        try:
            subprocess.run(command, cwd=str(folder), check=True, stderr=subprocess.DEVNULL)
        except OSError:
            pytest.skip("openssl is not installed")
    return folder


def tls(certificates, name):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(str(certificates / f"{name}.pem"), str(certificates / f"{name}.key"))
    return context


def test_a_self_signed_certificate(certificates):
    with server(tls=tls(certificates, "server")) as port:
        for address in (f"wss://127.0.0.1:{port}", f"127.0.0.1:{port}", f"https://localhost:{port}"):
            with WebsocketPolicy(address, ca=certificates / "server.pem") as policy:
                assert policy.infer({})["actions"].shape == (2, 2)
        with pytest.raises(ConnectError, match=r"next give the server's certificate.*ca=FILE"):
            WebsocketPolicy(f"wss://127.0.0.1:{port}")
        with pytest.raises(ConnectError, match="next ca is another server's certificate"):
            WebsocketPolicy(f"wss://127.0.0.1:{port}", ca=certificates / "stranger.pem")
    with server(tls=tls(certificates, "elsewhere")) as port, pytest.raises(ConnectError, match="subjectAltName"):
        WebsocketPolicy(f"wss://127.0.0.1:{port}", ca=str(certificates / "elsewhere.pem"))


def test_a_file_of_certificates_that_is_none(certificates, tmp_path):
    (tmp_path / "empty.pem").write_text("no certificate")
    for file in (tmp_path / "empty.pem", tmp_path / "absent.pem", certificates / "server.key"):
        with pytest.raises(ConnectError, match="a file with certificates"):
            WebsocketPolicy("wss://127.0.0.1", ca=file)
    with pytest.raises(ConnectError, match="write wss:// instead of ws://"):
        WebsocketPolicy("ws://127.0.0.1", ca=certificates / "server.pem")


def test_the_other_scheme_is_named_at_once(certificates):
    started = time.monotonic()
    with server(tls=tls(certificates, "server")) as port:
        with pytest.raises(ConnectError, match="found one that speaks TLS") as refused:
            WebsocketPolicy(port=port)
        assert refused.value.next == f"connect to wss://127.0.0.1:{port}"
    with server() as port:
        with pytest.raises(ConnectError, match="found one that speaks no TLS") as refused:
            WebsocketPolicy(f"wss://127.0.0.1:{port}")
        assert refused.value.next == f"connect to ws://127.0.0.1:{port}"
    assert time.monotonic() - started < 10


def test_a_tls_port_that_is_not_up_yet():
    """Something in front of it accepts, and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as tunnel:

        def hang_up():
            with contextlib.suppress(OSError):
                while True:
                    tunnel.accept()[0].close()

        thread = threading.Thread(target=hang_up, daemon=True)
        thread.start()
        with pytest.raises(ConnectTimeout):
            WebsocketPolicy(f"wss://127.0.0.1:{tunnel.getsockname()[1]}", connect_timeout=0.5)
        tunnel.shutdown(socket.SHUT_RDWR)
        thread.join(5)
