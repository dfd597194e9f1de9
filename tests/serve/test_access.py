"""Tokens, TLS and pages, over real connections."""

import base64
import http.client
import json
import re
import socket
import ssl
import subprocess

import numpy as np
import pytest
from tests.commands import run_manipi
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from manipi.errors import ServeError
from manipi.serve import Access, PolicyServer
from manipi.serve.access import read_token, tls_context
from manipi_client import ConnectError, RemoteInferenceError, WebsocketPolicy

TOKEN = "k3y-of-the-lab"


def get(port, path, headers=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request("GET", path, headers=headers or {})
    response = connection.getresponse()
    body = response.read().decode()
    connection.close()
    return response, body


def basic(token):
    return {"Authorization": "Basic " + base64.b64encode(f"anyone:{token}".encode()).decode()}


@pytest.fixture
def guarded_port(policy):
    with PolicyServer(policy, port=0, access=Access(token=TOKEN)).serve_in_thread() as port:
        yield port


def test_the_token_opens(guarded_port, observation):
    with WebsocketPolicy(port=guarded_port, token=TOKEN) as client:
        assert client.infer(observation)["actions"].shape == (4, 3)


@pytest.mark.parametrize("token", [None, "", TOKEN[:-1], TOKEN + "x", TOKEN.upper()])
def test_another_token_does_not(guarded_port, token):
    with pytest.raises(ConnectError, match="401") as refused:
        WebsocketPolicy(port=guarded_port, token=token)
    assert TOKEN not in str(refused.value)


UPGRADE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    "Sec-WebSocket-Version": "13",
}
PATHS = {
    "/": 200,
    "/?token=x": 200,
    "/state.json": 200,
    "/metrics": 200,
    "/healthz": 200,
    "/readyz": 200,
    "/readyz?x": 200,
    "//healthz": 404,
    "/healthz/": 404,
    "/HEALTHZ": 404,
    "/healthz/../": 404,
    "/policy": 404,
}
"""What each path answers to GET."""


def ask(port, path, method="GET", headers=()):
    """The status and the bytes after the head, by a client that helps nobody: what is in the socket is what counts."""
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers)]
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall("\r\n".join([*lines, "\r\n"]).encode("latin-1"))
        said = b""
        while b"\r\n\r\n" not in said and (part := connection.recv(65_536)):
            said += part
        head, _, body = said.partition(b"\r\n\r\n")
        status = int(head.split()[1])
        while status != 101 and (part := connection.recv(65_536)):  # to its end
            body += part
    return status, body, head.decode()


def headers_for(token, **others):
    shown = {} if token is None else {"Authorization": f"Api-Key {token}"}
    return list({"Host": "localhost", **shown, **others}.items())


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "upgrade", "upgrade by HEAD"])
@pytest.mark.parametrize("token", [None, "another-token", TOKEN])
def test_who_gets_what(guarded_port, method, token):
    """Without the token: whether the process lives, to a plain request, and nothing else on any path."""
    upgrade = UPGRADE if "upgrade" in method else {}
    verb = {"upgrade": "GET", "upgrade by HEAD": "HEAD"}.get(method, method)
    for path, of_get in PATHS.items():
        status, body, _ = ask(guarded_port, path, verb, headers_for(token, **upgrade))
        name = path.partition("?")[0]
        if method in ("POST", "upgrade by HEAD"):
            assert status == 405, path
        elif token != TOKEN and (upgrade or name not in ("/healthz", "/readyz")):
            assert status == 401, path
        elif upgrade:
            assert status == (101 if name == "/" else 404), path
        else:
            assert status == of_get, path
        assert status == 101 or (body == b"") == (verb == "HEAD"), path


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics", "/policy"])
def test_a_policy_is_at_one_path_alone(port, observation, path):
    with pytest.raises(InvalidStatus, match="404"), connect(f"ws://127.0.0.1:{port}{path}", proxy=None):
        pass
    with WebsocketPolicy(f"ws://127.0.0.1:{port}/?robot=1") as client:
        assert client.infer(observation)["actions"].shape == (4, 3)


@pytest.mark.parametrize("path", ["/", "/healthz", "/state.json"])
def test_a_head_says_what_a_get_would(port, path):
    heads = [ask(port, path, method, headers_for(None)) for method in ("GET", "HEAD")]
    lengths = [re.search("Content-Length: ([0-9]+)", head)[1] for _, _, head in heads]
    assert heads[1][1] == b""
    assert path == "/state.json" or lengths[0] == lengths[1] == str(len(heads[0][1]))


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
@pytest.mark.parametrize(
    "header", [("Content-Length", "5"), ("Transfer-Encoding", "chunked"), ("content-length", "05")]
)
def test_a_request_with_a_body_is_answered(port, method, header):
    for path in ("/healthz", "/"):
        status, body, head = ask(port, path, method, [("Host", "localhost"), header])
        assert status == 400
        assert (body == b"") == (method == "HEAD")
        assert "Connection: close" in head
    empty = [*headers_for(None), ("Content-Length", "0")]
    assert ask(port, "/healthz", method, empty)[0] == (405 if method == "POST" else 200)
    assert ask(port, "/", "GET", [*empty, *UPGRADE.items()])[0] == 101


@pytest.mark.parametrize("name", ["Authorization", "Host", "Upgrade", "Connection", "Origin", "Sec-WebSocket-Key"])
@pytest.mark.parametrize("token", [None, TOKEN])
def test_a_header_that_comes_twice_is_no_failure_of_the_server(policy, name, token, caplog):
    with PolicyServer(policy, port=0, access=Access(token=token)).serve_in_thread() as port:
        for path, upgrade in ((path, upgrade) for path in ("/", "/healthz") for upgrade in ({}, UPGRADE)):
            once = headers_for(TOKEN, **upgrade)
            first = dict(once).get(name, "http://localhost")
            for second in (first, "x"):
                status, _, _ = ask(port, path, "GET", [*once, (name, first), (name, second)])
                assert status < 500
                harmless = name in ("Upgrade", "Connection") or (name == "Authorization" and token is None)
                assert status != 101 or harmless
    assert "Traceback" not in caplog.text


def test_two_tokens_open_nothing(guarded_port):
    for first, second in ((TOKEN, "x"), ("x", TOKEN), (TOKEN, TOKEN)):
        both = [("Authorization", f"Api-Key {token}") for token in (first, second)]
        assert ask(guarded_port, "/state.json", "GET", [("Host", "localhost"), *both])[0] == 401


OWN = ["localhost", "LOCALHOST:8000", "localhost.", "127.0.0.1", "127.0.0.1:80", "127.8.9.1", "[::1]", "[::1]:8000"]
STRANGE = [
    "evil.example",
    "evil.example:8000",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "192.0.2.7",
    "x]",
    "",
]


@pytest.mark.parametrize("path", [*PATHS, "upgrade"])
def test_a_name_of_strangers_is_refused_on_loopback(port, path):
    """DNS rebinding: a page of evil.example, whose name its owner has resolved to 127.0.0.1, is of our origin."""
    upgrade = UPGRADE if path == "upgrade" else {}
    for host in STRANGE:
        status, body, _ = ask(port, "/" if upgrade else path, "GET", headers_for(None, **upgrade, Host=host))
        assert status == 403, host
        assert b"localhost" in body
    for host in OWN:
        status, *_ = ask(port, "/" if upgrade else path, "GET", headers_for(None, **upgrade, Host=host))
        assert status == (101 if upgrade else PATHS[path]), host
    if not upgrade:  # as HTTP/1.0 does, and no browser
        assert ask(port, path, "GET")[0] == PATHS[path]


def test_the_name_that_is_listened_on_is_known(policy, monkeypatch):
    """As many systems have it: their own name is 127.0.1.1 in /etc/hosts."""
    resolved = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))]
    with monkeypatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", lambda *arguments, **options: resolved)
        server = PolicyServer(policy, "Robot7", 0)
    with server.serve_in_thread() as port:
        statuses = [ask(port, "/metrics", "GET", [("Host", host)])[0] for host in ("robot7:1", "robot8:1")]
    assert statuses == [200, 403]


def test_where_a_token_or_the_user_lets_in_any_name_will_do(policy, guarded_port):
    """A proxy in front may pass on the name that its clients use."""
    assert ask(guarded_port, "/metrics", "GET", headers_for(TOKEN, Host="robots.example"))[0] == 200
    server = PolicyServer(policy, "0.0.0.0", 0, access=Access(insecure=True))
    with server.serve_in_thread() as port:
        assert ask(port, "/metrics", "GET", headers_for(None, Host="robots.example"))[0] == 200


@pytest.mark.parametrize("path", ["/", "/state.json", "/metrics", "/state.json?x=/healthz", "/nowhere"])
def test_pages_need_the_token_too(guarded_port, path):
    for headers in (None, basic("wrong"), {"Authorization": "Basic ?"}, {"Authorization": f"Bearer {TOKEN}"}):
        response, body = get(guarded_port, path, headers)
        assert response.status == 401
        assert response.getheader("WWW-Authenticate").startswith("Basic ")
        assert "robot" not in body
    for headers in (basic(TOKEN), {"Authorization": f"Api-Key {TOKEN}"}):
        assert get(guarded_port, path, headers)[0].status == (404 if path == "/nowhere" else 200)


def test_whether_it_lives_is_no_secret(guarded_port):
    assert [get(guarded_port, path)[0].status for path in ("/healthz", "/readyz")] == [200, 200]


def test_a_page_of_another_site_cannot_connect(port):
    with (
        pytest.raises(InvalidStatus, match="403"),
        connect(f"ws://127.0.0.1:{port}", proxy=None, origin="https://example.com"),
    ):
        pass


def test_with_a_token_the_address_may_be_public(policy, observation):
    server = PolicyServer(policy, "0.0.0.0", 0, access=Access(token=TOKEN))
    with server.serve_in_thread() as port, WebsocketPolicy(port=port, token=TOKEN) as client:
        assert client.infer(observation)["actions"].shape == (4, 3)


def test_a_token_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("MANIPI_TOKEN", raising=False)
    assert read_token(None) is None
    monkeypatch.setenv("MANIPI_TOKEN", "from-the-environment")
    assert read_token(None) == "from-the-environment"
    (tmp_path / "token").write_text("from-a-file\n")
    assert read_token(tmp_path / "token") == "from-a-file"
    assert "from-a-file" not in repr(Access(token="from-a-file"))


@pytest.mark.parametrize("text", ["", "short", "has a space in it", "ünïcödé-token", "two\nlines-of-it"])
def test_what_is_no_token_is_refused_and_not_told(tmp_path, text):
    (tmp_path / "token").write_text(text, encoding="utf-8")
    with pytest.raises(ServeError, match="a token: 8 printable") as refused:
        read_token(tmp_path / "token")
    assert not text or text not in str(refused.value)
    with pytest.raises(ServeError, match="check --token-file"):
        read_token(tmp_path / "absent")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate for this computer's own address, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "2",
    ]
    names = ["-subj", "/CN=robot", "-addext", "subjectAltName=IP:127.0.0.1"]
    try:
        subprocess.run([*command, *names, "-keyout", "key.pem", "-out", "cert.pem"], cwd=folder, check=True, stderr=-3)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    return folder / "cert.pem", folder / "key.pem"


def test_tls(policy, observation, certificate, monkeypatch):
    server = PolicyServer(policy, port=0, access=Access(tls=tls_context(*certificate)))
    with server.serve_in_thread() as port:
        with pytest.raises(ConnectError, match="certificate"):
            WebsocketPolicy(f"wss://127.0.0.1:{port}")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
        with WebsocketPolicy(f"wss://127.0.0.1:{port}") as client:
            assert client.infer(observation)["actions"].shape == (4, 3)
        trusting = ssl.create_default_context(cafile=str(certificate[0]))
        connection = http.client.HTTPSConnection("127.0.0.1", port, context=trusting)
        connection.request("GET", "/readyz")
        response = connection.getresponse()
        response.read()
        assert response.status == 200
        connection.close()


def test_a_certificate_that_is_none(tmp_path, certificate):
    (tmp_path / "cert.pem").write_text("no certificate")
    for pair in ((tmp_path / "cert.pem", None), (None, certificate[1]), (certificate[0], None), (tmp_path / "x", None)):
        with pytest.raises(ServeError, match="check --tls-cert and --tls-key"):
            tls_context(*pair)
    with pytest.raises(ServeError, match=r"where \S+cert\.pem\n.*the key has to be in the certificate's file"):
        tls_context(certificate[0], None)
    assert tls_context(None, None) is None


def test_metrics_count_what_happened(port, observation):
    with WebsocketPolicy(port=port) as client:
        for _ in range(3):
            client.infer(observation)
        with pytest.raises(RemoteInferenceError):
            client.infer({"prompt": "no state"})
        client.infer(observation)
        response, text = get(port, "/metrics")
    assert response.getheader("Content-Type").startswith("text/plain; version=0.0.4")
    values = dict(re.findall(r"^(manipi_\w+(?:{.*})?) (\S+)$", text, re.MULTILINE))
    assert values["manipi_observations_total"] == "5"
    assert values["manipi_answers_total"] == "4"
    assert values['manipi_errors_total{code="ObservationError"}'] == "1"
    assert (values["manipi_clients"], values["manipi_waiting"]) == ("1", "0")
    assert values['manipi_latency_seconds_count{stage="infer"}'] == "4"
    assert 0 < float(values['manipi_latency_seconds{stage="total",quantile="0.99"}']) < 5
    for line in text.splitlines():
        assert re.fullmatch(r"# (HELP|TYPE) manipi_\w+ .+|manipi_\w+({(\w+=\"[^\"]*\",?)+})? [-+.\deinf]+", line), line


def test_the_state_is_json_whatever_came(port, observation):
    assert json.loads(get(port, "/state.json")[1])["last"] is None
    with WebsocketPolicy(port=port) as client:
        client.infer({**observation, "state": np.array([0.0, float("inf"), 1.0])})
        state = json.loads(get(port, "/state.json")[1])
    assert state["last"]["actions"][1] == [None] * 4
    assert state["clients"][0]["observations"] == 1
    assert len(state["latency_ms"]["total"]) == 3


def test_a_public_address_is_refused_before_the_model_is_loaded(tmp_path):
    done = run_manipi("serve", tmp_path / "absent", "--host", "0.0.0.0")
    assert done.returncode == 1
    assert "--insecure" in done.stderr
