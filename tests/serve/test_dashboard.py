"""The dashboard in a real browser, driven over its DevTools protocol.

MANIPI_CHROMIUM names the browser where it is not on the path; MANIPI_SCREENSHOTS=docs keeps the pictures of it there.
"""

import base64
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from websockets.sync.client import connect

from manipi.robots.robot import Gripper, Joints, Robot, State
from manipi.serve import Access, PolicyServer
from manipi.transforms.observation import ReadRobot
from manipi_client import RemoteInferenceError, WebsocketPolicy

NAMES = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome")
ARM = Robot(
    name="ur5",
    cameras={"base": "base_rgb", "left_wrist": "wrist_rgb"},
    state=(State("joints", 6, unit="rad"), State("gripper", 1)),
    actions=(
        Joints(6, relative=True, low=(-3.1,) * 6, high=(3.1,) * 6),
        Gripper(open=0.0, closed=1.0, low=(0.0,), high=(1.0,)),
    ),
    control_hz=20.0,
    max_rates=(3.0,) * 6 + (4.0,),
)


class Reach:
    """A chunk of 50 smooth steps from the state, the gripper closing beyond its limit."""

    def __init__(self):
        self.metadata = {"robot": ARM.to_json(), "model": "Pi05Config", "step": 30_000, "control_hz": 20.0}
        self.metadata |= {"checkpoint": "6f1d2c0b9a7e" + "0" * 52, "action_horizon": 50}

    def infer(self, observation, noise=None):
        state = ReadRobot(ARM).encode(observation)["state"]
        time.sleep(0.02)
        way_H = (1 - np.cos(np.linspace(0, np.pi, 50))) / 2
        goal_A = np.array([0.4, -0.6, 0.5, -0.3, 0.2, 0.7])
        joints_HA = state[:6] + way_H[:, None] * goal_A
        return {"actions": np.concatenate([joints_HA, 1.15 * way_H[:, None]], axis=1).astype(np.float32)}


class Tab:
    """A page of a browser that runs for the test."""

    def __init__(self, connection):
        self._connection, self._numbers = connection, itertools.count(1)
        self.complaints = []
        self.statuses = []
        """HTTP status of the pages that were asked for. What is shown for a refused one, each browser decides."""
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        number = next(self._numbers)
        self._connection.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self._connection.recv(timeout=20))
            if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.complaints.append(message["params"])
            if message.get("method") == "Network.responseReceived" and message["params"]["type"] == "Document":
                self.statuses.append(message["params"]["response"]["status"])
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]

    def open(self, url, *, width=1280, dark=False, scale=1, token=None):
        mobile = width < 600
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=scale, mobile=mobile)
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=features)
        if token:  # what a browser sends after it has asked for name and password
            basic = base64.b64encode(f"me:{token}".encode()).decode()
            self.call("Network.setExtraHTTPHeaders", headers={"Authorization": f"Basic {basic}"})
        self.statuses.clear()
        self.call("Page.navigate", url=url)

    def value(self, expression):
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def wait_for(self, expression):
        end = time.monotonic() + 20
        while not self.value(expression):
            assert time.monotonic() < end, (expression, self.value("document.body.innerText"), self.complaints)
            time.sleep(0.1)

    def status(self):
        """Of the page that was opened last, once its answer is there."""
        end = time.monotonic() + 20
        while not self.statuses:
            assert time.monotonic() < end, ("no answer", self.complaints)
            self.value("0")  # reads what the browser has to report
            time.sleep(0.1)
        return self.statuses[-1]

    def screenshot(self):
        height = self.value("document.documentElement.scrollHeight")
        width = self.value("document.documentElement.clientWidth")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        shot = self.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        return base64.b64decode(shot["data"])


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """The port on which a headless Chromium is driven."""
    program = os.environ.get("MANIPI_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed (or set MANIPI_CHROMIUM)")
    profile = tmp_path_factory.mktemp("profile")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += ["--disable-background-networking", "--disable-component-update"]  # asks nobody but our server
    flags += ["--remote-debugging-port=0", f"--user-data-dir={profile}"]
    process = subprocess.Popen([program, *flags, "about:blank"], stderr=subprocess.DEVNULL)
    try:
        yield _read_port(process, profile / "DevToolsActivePort")
    finally:
        process.terminate()
        process.wait()


def _read_port(process, file):
    end = time.monotonic() + 30
    while not (file.exists() and file.read_text().count("\n")):
        assert process.poll() is None, "the browser ended"
        assert time.monotonic() < end, "the browser gave no sign within 30 s"
        time.sleep(0.05)
    return int(file.read_text().splitlines()[0])


@pytest.fixture
def tab(browser):
    request = urllib.request.Request(f"http://127.0.0.1:{browser}/json/new", method="PUT")
    with urllib.request.urlopen(request) as response:
        url = json.load(response)["webSocketDebuggerUrl"]
    with connect(url, compression=None, max_size=None, proxy=None) as connection:
        yield Tab(connection)


def picture(shade):
    y, x = np.mgrid[0:224, 0:224]
    image = np.stack([40 + x * 0.5, 90 + y * 0.4, 150 - x * 0.2 + shade], axis=-1)
    image[(x - 130) ** 2 + (y - 120) ** 2 < 900] = (200, 70, 50)
    image[170:, :] = (150, 120, 90)
    return image.clip(0, 255).astype(np.uint8)


OBSERVATION = {
    "base_rgb": picture(0),
    "wrist_rgb": picture(60),
    "joints": np.array([0.1, -1.2, 1.4, -0.4, 0.3, 0.0], np.float32),
    "gripper": np.zeros(1, np.float32),
    "prompt": "put the red <b>block</b> into the tray",
}


@contextlib.contextmanager
def busy_server(**options):
    """The port of a server with a client that asked, one that was refused, and limits that were reached."""
    server = PolicyServer(Reach(), port=0, robot=ARM, **options)
    token = options["access"].token if "access" in options else None
    with server.serve_in_thread() as port, WebsocketPolicy(port=port, token=token) as client:
        for _ in range(5):
            client.infer(OBSERVATION)
        with WebsocketPolicy(port=port, token=token) as bad, pytest.raises(RemoteInferenceError):
            bad.infer({**OBSERVATION, "joints": np.array([0, np.nan, 0, 0, 0, 0])})
        client.infer(OBSERVATION)
        yield port, client


@pytest.mark.parametrize(("name", "look"), [("desktop", {}), ("phone", {"width": 390, "dark": True, "scale": 2})])
def test_the_page_shows_what_the_server_does(tab, name, look):
    with busy_server() as (port, client):
        tab.open(f"http://127.0.0.1:{port}/", **look)
        tab.wait_for("document.querySelectorAll('#curves figure').length == 7")
        for _ in range(8):
            client.infer(OBSERVATION)
        tab.wait_for("Number(document.querySelector('.tile b').textContent) > 0")
        text = tab.value("document.body.innerText")
        assert "put the red <b>block</b> into the tray" in text
        assert "joint 1" in text
        assert "ObservationError" in text
        assert "nan at index 1" in text
        assert tab.value("[...document.images].map(i => [i.alt, i.naturalWidth, i.complete].join()).join(' ')") == (
            "base,224,true left_wrist,224,true"
        )
        # Of all dimensions the gripper alone is at a limit.
        assert tab.value("document.querySelectorAll('#curves .out').length") == 1
        rows = tab.value("[...document.querySelectorAll('#stages tr')].map(r => r.cells[0].textContent).join()")
        assert rows == "read,wait,infer,write,total"
        assert 20 <= tab.value("Number(document.querySelectorAll('#stages tr')[2].cells[1].textContent)") < 500
        assert tab.value("document.querySelectorAll('#clients tr').length") == 1
        assert tab.value("document.documentElement.scrollWidth <= window.innerWidth"), "wider than the screen"
        assert tab.complaints == []
        if folder := os.environ.get("MANIPI_SCREENSHOTS"):
            (Path(folder) / f"dashboard_{name}.png").write_bytes(tab.screenshot())


def test_the_page_follows_and_says_when_the_server_is_gone(tab):
    with busy_server() as (port, _):
        tab.open(f"http://127.0.0.1:{port}/")
        tab.wait_for("document.querySelectorAll('#curves figure').length == 7")
        with WebsocketPolicy(port=port) as other:
            other.infer({**OBSERVATION, "prompt": "now the blue one"})
            tab.wait_for("document.getElementById('prompt').textContent == 'now the blue one'")
            assert tab.value("document.querySelectorAll('#clients tr').length") == 2
    tab.wait_for("document.body.innerText.includes('no answer from the server')")


def test_with_a_token_the_page_needs_it(tab):
    with busy_server(access=Access(token="a-long-secret")) as (port, _):
        tab.open(f"http://127.0.0.1:{port}/", token="another-secret")
        assert tab.status() == 401
        assert tab.value("document.querySelectorAll('#curves').length") == 0
        tab.open(f"http://127.0.0.1:{port}/", token="a-long-secret")
        assert tab.status() == 200
        tab.wait_for("document.querySelectorAll('#curves figure').length == 7")
        # With name and password in the address, which a page must not repeat where it fetches.
        tab.value("window.before = true")
        tab.open(f"http://me:a-long-secret@127.0.0.1:{port}/")
        tab.wait_for("!window.before && document.querySelectorAll('#curves figure').length == 7")
