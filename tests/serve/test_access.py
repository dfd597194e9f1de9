"""Tokens, TLS and pages, over real connections."""

import base64
import http.client
import json
import re
import ssl
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tests.commands import run_manipi
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from manipi.errors import ServeError
from manipi.serve import Access, PolicyServer
from manipi.serve.access import read_token, tls_context
from manipi_client import ConnectError, RemoteInferenceError, WebsocketPolicy, wire

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
        assert connection.getresponse().status == 200
        connection.close()


def test_a_certificate_that_is_none(tmp_path, certificate):
    (tmp_path / "cert.pem").write_text("no certificate")
    for pair in ((tmp_path / "cert.pem", None), (None, certificate[1]), (certificate[0], None), (tmp_path / "x", None)):
        with pytest.raises(ServeError, match="check --tls-cert and --tls-key"):
            tls_context(*pair)
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


def test_a_stopping_server_is_not_ready(observation):
    program = f"""
import runpy
from manipi.serve import PolicyServer
policy = runpy.run_path({str(Path(__file__).with_name("conftest.py"))!r})["TinyPolicy"]()
PolicyServer(policy, port=0).serve_forever(on_ready=lambda host, port: print(port, flush=True))
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        port = int(process.stdout.readline())
        with connect(f"ws://127.0.0.1:{port}", proxy=None) as client:
            client.recv()
            client.send(wire.pack({**observation, "prompt": "slow"}))
            time.sleep(0.2)
            process.terminate()
            time.sleep(0.1)
            assert [get(port, path)[0].status for path in ("/readyz", "/healthz")] == [503, 200]
            with pytest.raises(InvalidStatus, match="503"), connect(f"ws://127.0.0.1:{port}", proxy=None):
                pass
            assert wire.unpack(client.recv())["actions"].shape == (4, 3)
        assert process.wait(5) == 0


def test_a_public_address_is_refused_before_the_model_is_loaded(tmp_path):
    done = run_manipi("serve", tmp_path / "absent", "--host", "0.0.0.0")
    assert done.returncode == 1
    assert "--insecure" in done.stderr
