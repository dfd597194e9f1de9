"""RLDS datasets in a store: record files come one after the other, and stay within a room."""

import json
import os
import pickle
import struct
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from encoders import every_sample
from tests.commands import run_manipi

from manipi.cli import dataset, stats
from manipi.data.feed.loader import Loader
from manipi.data.feed.mixture import frames_of
from manipi.data.feed.sampler import Sampler, Stream
from manipi.data.open import fetch_tables, open_dataset
from manipi.data.review.check import check_dataset
from manipi.data.rlds.fields import BRIDGE, BY_NAME, FIELDS_FILE
from manipi.data.rlds.index import CachedFile
from manipi.errors import ConfigError, DatasetFormatError, FetchError
from manipi.records import to_json, write_json
from manipi.remote.fetch import home, target_of
from manipi.robots.franka import droid

DROIDLIKE, BRIDGE_SAMPLE = "synthetic_droid_rlds/droidlike/1.0.0", "octo_bridge_rlds/bridge_dataset/1.0.0"
FIELDS = "droid_joint_position"
CAMERAS = ("exterior_image_1_left", "wrist_image_left")
LAST = np.array([599])
ONE_FILE = "0.012"
"""GB: a record file of `in_parts` has 9 to 12 MB."""


@pytest.fixture
def in_parts(shared_datasets, tmp_path):
    """Six record files of one episode each: those of the synthetic set, byte for byte as in its one file, and again."""
    source, folder = shared_datasets / DROIDLIKE, tmp_path / "parts"
    folder.mkdir()
    (folder / "features.json").write_bytes((source / "features.json").read_bytes())
    info = json.loads((source / "dataset_info.json").read_text())
    info["splits"][0]["shardLengths"] = ["1"] * 6
    (folder / "dataset_info.json").write_text(json.dumps(info))
    data, at = next(source.glob("*.tfrecord*")).read_bytes(), 0
    for number in range(3):
        end = at + 16 + struct.unpack_from("<Q", data, at)[0]
        for place in (number, number + 3):
            (folder / f"droidlike-train.tfrecord-0000{place}-of-00006").write_bytes(data[at:end])
        at = end
    assert at == len(data)
    return folder


def record_files() -> list[Path]:
    return [path for path in home().rglob("*.tfrecord*") if path.suffix not in (".lock", ".use", ".json", ".partial")]


def asked(store) -> list[str]:
    """What content was asked for, by the last part of its name, each name once per fetch."""
    return [Path(name).name for name, first, _ in store.log if first == 0]


def number_of(name: str) -> int:
    return int(name.split("tfrecord-")[1][:5])


@pytest.mark.parametrize("name", [DROIDLIKE, BRIDGE_SAMPLE])
def test_it_is_what_the_local_folder_is(serve, store, shared_datasets, name):
    fields = FIELDS if name == DROIDLIKE else ""
    dataset, local = open_dataset(serve(name), fields=fields), open_dataset(shared_datasets / name, fields=fields)
    assert asked(store)[:2] == ["features.json", "dataset_info.json"]
    assert "val" not in "".join(asked(store)[2:]), "the other split"
    assert (dataset.fingerprint, dataset.episodes, dataset.features) == (
        local.fingerprint,
        local.episodes,
        local.features,
    )
    for key in [key for key, feature in local.features.items() if feature.kind == "vector"]:
        np.testing.assert_array_equal(dataset.column(key), local.column(key))
    rows = np.arange(local.num_frames)[::7]
    for camera in local.cameras:
        np.testing.assert_array_equal(dataset.images(camera, rows), local.images(camera, rows))
    assert [dataset.prompt(row) for row in rows.tolist()] == [local.prompt(row) for row in rows.tolist()]
    store.files.clear()
    again = open_dataset(f"{store.url}/1.0.0", fields=fields)
    np.testing.assert_array_equal(again.images(again.cameras[0], rows[:1]), local.images(local.cameras[0], rows[:1]))


def test_files_beyond_the_room_go_and_come_again(serve, store, in_parts, monkeypatch):
    monkeypatch.setenv("MANIPI_RECORDS_GB", ONE_FILE)
    most = []
    store.before_content = lambda name, first: most.append(len(record_files()))
    dataset, local = open_dataset(serve(in_parts), fields=FIELDS), open_dataset(in_parts, fields=FIELDS)
    assert dataset.fingerprint == local.fingerprint
    assert sorted(number_of(name) for name in asked(store)[2:]) == [0, 1, 2, 3, 4, 5]
    assert len(record_files()) == 1
    assert max(most) <= 4, "the one in the room, the one that is indexed, and the next, while another comes"
    del store.log[:]
    starts = np.array([episode.start for episode in local.episodes])
    turn = list(range(6))
    for rows in (starts, starts):
        np.testing.assert_array_equal(dataset.images(CAMERAS[0], rows), local.images(CAMERAS[0], rows))
        assert len(record_files()) <= 2, "the one in use is kept, and so may be the last one before it"
    assert [number_of(name) for name in asked(store)] in (turn * 2, (turn * 2)[:-1])


def test_with_room_for_all_each_comes_once(serve, store, in_parts):
    dataset = open_dataset(serve(in_parts), fields=FIELDS)
    frames_of(droid(action_space="joint_position"), 4, dataset, np.arange(0, 600, 30))
    assert sorted(map(number_of, asked(store)[2:])) == [0, 1, 2, 3, 4, 5]


HOLD = (
    "import sys; from manipi.data.rlds.index import CachedFile; file = CachedFile(sys.argv[1]); "
    "print(file.path, flush=True); input()"
)


def test_a_file_in_use_stays(store, monkeypatch):
    store.add(a=1000, b=1000, c=1000)
    monkeypatch.setenv("MANIPI_RECORDS_GB", "1e-6")
    a, b, c = (f"{store.url}/{name}" for name in "abc")
    with subprocess.Popen([sys.executable, "-c", HOLD, a], stdin=-1, stdout=-1, text=True) as process:
        assert process.stdout
        path = Path(process.stdout.readline().strip())
        kept = CachedFile(b)
        assert [path.exists(), kept.path.exists()] == [True, True]
        del kept
        CachedFile(c)
        assert [path.exists(), target_of(b).exists()] == [True, False]
        process.communicate("")
    kept = CachedFile(b)
    assert [target_of(url).exists() for url in (a, b, c)] == [False, True, False]
    assert kept.path.read_bytes() == store.files["b"]


def test_what_was_used_last_stays(store, monkeypatch):
    store.add(a=1000, b=1000, c=1000)
    monkeypatch.setenv("MANIPI_RECORDS_GB", "2e-6")
    for name in ("a", "b", "a", "c"):
        CachedFile(f"{store.url}/{name}")
    assert [target_of(f"{store.url}/{name}").exists() for name in "abc"] == [True, False, True]


@pytest.mark.parametrize("size", ["much", "-1", "nan"])
def test_a_room_that_is_none(store, monkeypatch, size):
    monkeypatch.setenv("MANIPI_RECORDS_GB", size)
    with pytest.raises(ConfigError, match="MANIPI_RECORDS_GB"):
        CachedFile(f"{store.url}/a")


def test_a_store_that_fails_in_the_middle(serve, store, in_parts):
    url = serve(in_parts)
    lost = {name: store.files.pop(name) for name in list(store.files) if "00001-of" in name}
    with pytest.raises(FetchError, match="00001-of-00006"):
        open_dataset(url, fields=FIELDS)
    store.files |= lost
    (folder,) = (home() / "rlds").iterdir()
    progress = folder / ".index.partial/progress.jsonl"
    assert progress.read_text().count("\n") == 1
    with progress.open("a") as file:
        file.write('{"records": [[1')  # as a process that was killed leaves it
    for path in record_files():
        path.unlink()
    del store.log[:]
    dataset, local = open_dataset(url, fields=FIELDS), open_dataset(in_parts, fields=FIELDS)
    assert sorted({number_of(name) for name in asked(store)}) == [1, 2, 3, 4, 5]
    assert dataset.fingerprint == local.fingerprint
    assert dataset.episodes == local.episodes
    np.testing.assert_array_equal(dataset.column("actions"), local.column("actions"))
    assert [dataset.prompt(row) for row in range(0, 600, 10)] == [local.prompt(row) for row in range(0, 600, 10)]
    np.testing.assert_array_equal(dataset.images(CAMERAS[1], LAST), local.images(CAMERAS[1], LAST))
    assert not list((home() / "rlds").rglob("*progress*"))


OPEN = "import sys; from manipi.data.open import open_dataset; open_dataset(sys.argv[1], fields=sys.argv[2])"


def test_a_killed_process_is_continued(serve, store, in_parts, wait_until):
    url, waiting = serve(in_parts), []
    store.before_content = lambda name, first: wait_until(lambda: not waiting) if "00002-of" in name else None
    waiting.append("for the kill")
    process = subprocess.Popen([sys.executable, "-c", OPEN, url, FIELDS])
    logs = lambda: [log.read_text().count("\n") for log in home().rglob("progress.jsonl")]  # noqa: E731
    wait_until(lambda: logs() == [2])
    process.kill()
    process.wait()
    waiting.clear()
    del store.log[:]
    assert open_dataset(url, fields=FIELDS).fingerprint == open_dataset(in_parts, fields=FIELDS).fingerprint
    assert {number_of(name) for name in asked(store)} == {2, 3, 4, 5}


def test_a_file_that_changed_since_it_was_indexed(serve, store, in_parts, monkeypatch):
    monkeypatch.setenv("MANIPI_RECORDS_GB", "1e-6")
    dataset = open_dataset(serve(in_parts), fields=FIELDS)
    (name,) = (name for name in store.files if "00000-of" in name)
    store.files[name] = store.files[name.replace("00000-of", "00001-of")]
    with pytest.raises(DatasetFormatError, match=r"00000-of-00006[\s\S]*rm -r"):
        dataset.images(CAMERAS[0], np.array([0]))


def test_a_damaged_file_is_named(serve, store, in_parts):
    url = serve(in_parts)
    (name,) = (name for name in store.files if "00002-of" in name)
    store.files[name] = store.files[name][:-10]
    with pytest.raises(DatasetFormatError, match=r"00002-of-00006, record 0"):
        open_dataset(url, fields=FIELDS)


def test_workers_share_files_and_index(serve, store, in_parts):
    dataset = open_dataset(serve(in_parts), fields=FIELDS)
    before = len(store.log)
    sampler = Sampler(Stream(np.arange(600), seed=0, fingerprint=dataset.fingerprint), 8)
    keys, batches = {"cameras": CAMERAS, "state_keys": ["joint_position"]}, []
    for source, workers in ((dataset, 2), (open_dataset(in_parts, fields=FIELDS), 0)):
        with Loader(partial(every_sample, source, **keys), sampler, num_workers=workers) as loader:
            batches.append([one for _, (_, one, _) in zip(range(3), loader, strict=False)])
    for ours, theirs in zip(*batches, strict=True):
        for camera in CAMERAS:
            np.testing.assert_array_equal(ours[camera], theirs[camera])
    assert len(store.log) == before
    assert len(pickle.dumps(dataset)) < 2_000


def test_a_map_beside_the_files_comes_too(serve, store, shared_datasets):
    url = serve(BRIDGE_SAMPLE)
    fields = to_json(BRIDGE) | {"fps": 7}
    store.files["1.0.0/rlds_fields.json"] = json.dumps(fields).encode()
    assert open_dataset(url).fps == 7
    del store.files["1.0.0/rlds_fields.json"]
    assert open_dataset(url).fps == 7


def test_only_an_address_of_a_version(serve, store):
    serve(DROIDLIKE)
    store.files = {f"droidlike/{name}": data for name, data in store.files.items()}
    with pytest.raises(FetchError, match=r"droidlike/1\.0\.0"):
        open_dataset(f"{store.url}/droidlike")


def test_check_reads_it_in_the_room(serve, store, in_parts, monkeypatch):
    monkeypatch.setenv("MANIPI_RECORDS_GB", ONE_FILE)
    write_json(in_parts / FIELDS_FILE, to_json(BY_NAME[FIELDS]))
    report = check_dataset(fetch_tables(serve(in_parts)), quick=True, num_workers=1)
    assert (report.num_frames, report.count("error")) == (600, check_dataset(in_parts, quick=True).count("error"))
    assert len(record_files()) <= 2


IN_A_STORE = """
import sys, numpy as np
from manipi.data.open import open_dataset
dataset = open_dataset(sys.argv[1])
print(dataset.fingerprint, dataset.images(dataset.cameras[0], np.array([5])).sum())
"""
"""By a process of its own, for stores whose addresses are read once per process."""


@pytest.mark.parametrize(
    ("package", "url", "env"),
    [
        ("gcsfs", "gs://openpi-assets/1.0.0", {"STORAGE_EMULATOR_HOST": "{url}"}),
        ("s3fs", "s3://bucket/1.0.0", {"AWS_ENDPOINT_URL": "{url}", "AWS_DEFAULT_REGION": "us-east-1"}),
    ],
)
def test_in_stores_of_others(serve, store, shared_datasets, package, url, env):
    pytest.importorskip(package, reason=f"{package} is part of manipi[cloud]")
    serve(BRIDGE_SAMPLE)
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    env = os.environ | keys | {key: value.format(url=store.url) for key, value in env.items()}
    answer = subprocess.run([sys.executable, "-c", IN_A_STORE, url], env=env, capture_output=True, text=True)
    local = open_dataset(shared_datasets / BRIDGE_SAMPLE)
    brightness = local.images(local.cameras[0], np.array([5])).sum()
    assert answer.stdout == f"{local.fingerprint} {brightness}\n", answer.stderr


RECIPE = """
from manipi.model.config import GEMMA_TINY, GEMMA_TINY_EXPERT, VISION_TINY_8, Pi05Config
from manipi.robots.franka import droid
from manipi.train.config import DataConfig, DatasetConfig, TrainConfig

def recipe() -> TrainConfig:
    model = Pi05Config(vision=VISION_TINY_8, vlm=GEMMA_TINY, action_expert=GEMMA_TINY_EXPERT, vocab_size=1024,
                       action_dim=16, action_horizon=10, max_token_len=60)
    sets = (DatasetConfig(path={path!r}, fields="droid_joint_position"),)
    data = DataConfig(mixture=sets, num_workers=0, skip_bad_episodes=True, holdout=0.0)
    return TrainConfig(robot=droid(action_space="joint_position"), model=model, data=data, steps=2, batch_size=2)
"""


@pytest.mark.slow
def test_commands_take_the_address(serve, in_parts, tmp_path, monkeypatch):
    monkeypatch.setenv("MANIPI_RECORDS_GB", ONE_FILE)
    monkeypatch.chdir(tmp_path)
    url, answers = serve(in_parts), []
    for path in (str(in_parts), url):
        Path("mine.py").write_text(RECIPE.format(path=path))
        stats.main(["mine.py:recipe", "--json", "stats.json"])
        answers.append(json.loads(Path("stats.json").read_text()))
    assert answers[0] == answers[1]
    assert answers[0]["stats"]["num_frames"] == 600
    done = run_manipi("train", "mine.py:recipe", "--run-dir", "run")
    assert done.returncode == 0, done.stderr
    assert Path("run/checkpoints/2/model.safetensors").is_file()
    write_json(fetch_tables(url) / FIELDS_FILE, to_json(BY_NAME[FIELDS]))
    dataset.run_view([url, "2", "--out", "view.html"])
    assert Path("view.html").stat().st_size > 100_000
    assert len(record_files()) <= 2
