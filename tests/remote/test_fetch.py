import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from manipi.data.open import open_dataset
from manipi.errors import FetchError, StorageError, UnknownNameError
from manipi.remote.fetch import BLOCK, fetch, home, verify

FETCH = "import sys; from manipi.remote.fetch import fetch; print(fetch(sys.argv[1], show=False))"
WRONG = "0" * 32


def start(source: str, **env: str) -> subprocess.Popen:
    command = [sys.executable, "-c", FETCH, source]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | env)


def fetched(source: str, **env: str) -> Path:
    """Fetched by a process of its own, for stores whose addresses are read once per process."""
    with start(source, **env) as process:
        watch = threading.Timer(60, process.kill)
        watch.start()
        output, errors = process.communicate()
        watch.cancel()
    assert process.returncode == 0, errors
    return Path(output.strip())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def partial_bytes() -> int:
    return sum(p.stat().st_size for p in home().rglob("*") if ".partial" in str(p) and p.is_file())


def nothing_under_a_final_name() -> bool:
    return all(part.startswith(".") for folder in home().iterdir() for part in os.listdir(folder))


def test_a_file_is_fetched_once(store):
    store.add(weights=100_000)
    path = fetch(f"{store.url}/weights", show=False)
    assert path.read_bytes() == store.files["weights"]
    assert fetch(f"{store.url}/weights", offline=True) == path
    assert store.log == [("weights", 0, 100_000)]


def test_a_folder_is_fetched_with_all_that_is_in_it(store):
    store.add(params__a=70_000, params__d__b=10, assets__stats=3000, empty=0)
    store.files["params/with a space"] = b"x"
    path = fetch(f"{store.url}/", show=False)
    assert contents(path) == store.files
    asked = len(store.log)
    inner = fetch(f"{store.url}/params/d", show=False)  # lies in what is here already
    assert contents(inner) == {"b": store.files["params/d/b"]}
    assert len(store.log) == asked


def test_a_dropped_connection_is_continued_by_ranges(store):
    store.add(weights=1_000_000)
    store.drop_after = 150_000
    assert fetch(f"{store.url}/weights", show=False).read_bytes() == store.files["weights"]
    whole = [(first, last) for _, first, last in store.log if last - first < 150_000]
    assert whole[0][0] == 0
    assert whole[-1][1] == 1_000_000
    assert sum(first == 0 for _, first, _ in store.log) == 3  # whole, a quarter, then the smallest block


def test_a_killed_process_is_continued_where_it_stopped(store, wait_until):
    store.add(weights=BLOCK + 5_000_000)
    release = threading.Event()
    store.before_content = lambda name, first: release.wait(30) if first else None
    process = start(f"{store.url}/weights")
    wait_until(lambda: partial_bytes() == BLOCK)
    process.kill()
    process.communicate()
    release.set()
    assert nothing_under_a_final_name()
    del store.log[:]
    assert fetch(f"{store.url}/weights", show=False).read_bytes() == store.files["weights"]
    assert ("weights", BLOCK, BLOCK + 5_000_000) in store.log
    assert all(first == BLOCK for _, first, _ in store.log)


def test_a_file_that_changed_since_the_last_call_is_begun_anew(store, wait_until):
    store.add(weights=BLOCK + 1000)
    release = threading.Event()
    store.before_content = lambda name, first: release.wait(30) if first else None
    process = start(f"{store.url}/weights")
    wait_until(lambda: partial_bytes() == BLOCK)
    process.kill()
    process.communicate()
    release.set()
    store.files["weights"] = bytes(BLOCK + 1000)
    assert fetch(f"{store.url}/weights", show=False).read_bytes() == store.files["weights"]


def test_a_file_that_changes_while_it_is_fetched_is_never_mixed(store):
    store.add(weights=BLOCK + 1000, other=10)

    def change(name, first):
        if first:
            store.files["weights"] = bytes(BLOCK - 7)
            del store.files["other"]
            store.before_content = lambda name, first: None

    store.before_content = change
    path = fetch(f"{store.url}/", show=False)
    assert contents(path) == {"weights": bytes(BLOCK - 7)}


def test_two_processes_fetch_every_file_once(store):
    store.add(a=300_000, b=200_000, c__d=5)
    both = [start(f"{store.url}/") for _ in range(2)]
    paths = {process.communicate(timeout=120)[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert len(paths) == 1
    assert contents(Path(paths.pop())) == store.files
    assert sorted(name for name, _, _ in store.log) == ["a", "b", "c/d"]


def test_a_server_without_ranges_gives_all_at_once(store):
    store.add(weights=BLOCK + 1000)
    store.ranges = False
    assert fetch(f"{store.url}/weights", show=False).read_bytes() == store.files["weights"]


def test_another_hash_than_the_server_says_leaves_nothing(store):
    store.add(weights=1000)
    store.md5 = WRONG
    with pytest.raises(FetchError, match=f"expected md5 {WRONG}"):
        fetch(f"{store.url}/weights", show=False)
    assert nothing_under_a_final_name()
    store.md5 = hashlib.md5(store.files["weights"]).hexdigest()
    assert fetch(f"{store.url}/weights", show=False).is_file()


def test_a_hash_in_the_address_is_verified(store):
    store.add(weights=1000)
    right, wrong = hashlib.sha256(store.files["weights"]).hexdigest(), "0" * 64
    with pytest.raises(FetchError, match=f"expected sha256 {wrong}"):
        fetch(f"{store.url}/weights#sha256={wrong}", show=False)
    assert nothing_under_a_final_name()
    assert fetch(f"{store.url}/weights#sha256={right}", show=False).is_file()
    with pytest.raises(FetchError, match=right):
        fetch(f"{store.url}/weights#sha256={wrong}", show=False)


def test_an_altered_download_is_never_used(store):
    store.add(d__a=1000, d__b=10)
    path = fetch(f"{store.url}/d/", show=False)
    verify(path)
    (path / "a").write_bytes(bytes(1000))
    with pytest.raises(FetchError, match="d/a"):
        verify(path)
    (path / "a").write_bytes(bytes(999))
    with pytest.raises(FetchError, match=r"delete .*/d and fetch it again"):
        fetch(f"{store.url}/d/", show=False)


def test_a_full_disk_names_the_place_and_goes_on_later(store, mount, monkeypatch, tmp_path):
    store.add(weights=3_000_000)
    monkeypatch.setenv("MANIPI_HOME", str(mount(2)))
    with pytest.raises(StorageError, match="MANIPI_HOME"):
        fetch(f"{store.url}/weights", show=False)
    assert not [p for p in home().glob("*/*") if not p.name.startswith(".")]
    subprocess.run(["mount", "-o", "remount,size=8m", str(home())], check=True)
    assert fetch(f"{store.url}/weights", show=False).read_bytes() == store.files["weights"]


@pytest.mark.parametrize(
    ("source", "switch"),
    [
        ("https://127.0.0.1/x", "MANIPI_OFFLINE"),
        ("hf://owner/name", "HF_HUB_OFFLINE"),
        ("gs://openpi-assets/checkpoints/pi0_base", "MANIPI_OFFLINE"),
    ],
)
def test_offline_says_what_to_fetch_beforehand(source, switch, monkeypatch):
    monkeypatch.setenv(switch, "1")
    with pytest.raises(FetchError, match=switch) as caught:
        fetch(source)
    assert source in caught.value.next
    assert str(home()) in caught.value.next


@pytest.mark.parametrize(
    "address",
    [
        "gs://",
        "s3:///x",
        "hf://",
        "https://",
        "https:///x",
        "https://[bad/x",
        "https://host:99999/x",
        "http://host:a/x",
    ],
)
def test_what_is_no_address(address):
    with pytest.raises(FetchError, match=r"(?s)an address of a file or folder.*gs://bucket/path"):
        fetch(address)
    with pytest.raises(FetchError, match="an address of a file or folder"):
        open_dataset(address)


def test_what_is_not_there_or_does_not_answer_is_said(store):
    with pytest.raises(FetchError, match="404"):
        fetch(f"{store.url}/absent", show=False)
    with pytest.raises(FetchError, match="FileNotFound"):
        fetch(f"{store.url}/absent/", show=False)
    with pytest.raises(FetchError, match="Connect"):
        fetch("http://127.0.0.1:9/x", show=False)
    with pytest.raises(FetchError, match="nothing of that name"):
        fetch("no/such/folder")
    with pytest.raises(UnknownNameError, match="a scheme"):
        fetch("ftp://127.0.0.1/x")


def test_a_store_cannot_write_outside(store):
    store.add(**{"../evil": 10})
    process = start("hf://owner/name", HF_ENDPOINT=store.url)
    assert "lies outside of it" in process.communicate(timeout=60)[1]
    assert nothing_under_a_final_name()


def test_a_local_path_is_returned_as_it_is(tmp_path):
    assert fetch(str(tmp_path)) == tmp_path


def openpi_copy(tmp_path: Path, *, whole: bool) -> Path:
    folder = tmp_path / "openpi/openpi-assets/checkpoints/pi0_base"
    (folder / "params").mkdir(parents=True)
    (folder / "params/data").write_bytes(b"weights")
    folder.with_suffix(".lock").touch() if whole else (folder / "params.lock").touch()
    return folder


def test_a_copy_of_openpi_is_used_as_it_is(tmp_path):
    folder = openpi_copy(tmp_path, whole=True)
    assert fetch("gs://openpi-assets/checkpoints/pi0_base", offline=True) == folder
    assert fetch("gs://openpi-assets/checkpoints/pi0_base/params", offline=True) == folder / "params"
    assert not home().exists()


def test_a_part_of_it_is_not_taken_for_the_whole(tmp_path):
    folder = openpi_copy(tmp_path, whole=False)
    assert fetch("gs://openpi-assets/checkpoints/pi0_base/params", offline=True) == folder / "params"
    with pytest.raises(FetchError, match="offline=True"):
        fetch("gs://openpi-assets/checkpoints/pi0_base", offline=True)


def test_a_copy_from_before_the_release_was_corrected_is_not_used(tmp_path):
    folder = openpi_copy(tmp_path, whole=True)
    os.utime(folder, (1.7e9, 1.7e9))
    with pytest.raises(FetchError, match="offline=True"):
        fetch("gs://openpi-assets/checkpoints/pi0_base", offline=True)


def test_a_model_of_a_hub(store):
    store.add(**{"config": 300, "big__weights.bin": 200_000})
    store.drop_after = 100_000

    def mend(name, first):
        store.drop_after = None if any(name == "big/weights.bin" for name, _, _ in store.log) else 100_000

    store.before_content = mend
    path = fetched("hf://owner/name@main", HF_ENDPOINT=store.url)
    assert contents(path) == store.files


def test_a_folder_of_googles_store(store, tmp_path):
    pytest.importorskip("gcsfs", reason="gcsfs is part of manipi[cloud]")
    names = ("params/composed", "b")
    store.add(**{f"checkpoints/pi0_base/{name}": 200_000 for name in names}, checkpoints__pi0_base2=1)
    openpi_copy(tmp_path, whole=False)  # is not complete
    path = fetched("gs://openpi-assets/checkpoints/pi0_base", STORAGE_EMULATOR_HOST=store.url)
    assert contents(path) == {name: store.files[f"checkpoints/pi0_base/{name}"] for name in names}


def test_a_complete_copy_of_openpi_without_its_lock_is_found_by_the_listing(store, tmp_path):
    pytest.importorskip("gcsfs", reason="gcsfs is part of manipi[cloud]")
    folder = openpi_copy(tmp_path, whole=False)
    store.files["checkpoints/pi0_base/params/data"] = b"weights"
    assert fetched("gs://openpi-assets/checkpoints/pi0_base", STORAGE_EMULATOR_HOST=store.url) == folder
    assert store.log == []


@pytest.mark.parametrize("kms", [False, True])
def test_a_folder_of_amazons_store(store, kms):
    pytest.importorskip("s3fs", reason="s3fs is part of manipi[cloud]")
    store.add(run__a=200_000, run__d__b=3)
    store.kms = kms
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    path = fetched("s3://bucket/run", AWS_ENDPOINT_URL=store.url, **keys)
    assert contents(path) == {"a": store.files["run/a"], "d/b": store.files["run/d/b"]}


def test_a_store_without_its_package_says_what_to_install(store):
    blocked = "import sys; sys.modules['gcsfs'] = None\n" + FETCH
    command = [sys.executable, "-c", blocked, "gs://openpi-assets/x"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert "pip install 'manipi[cloud]'" in result.stderr
