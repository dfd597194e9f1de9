"""A checkpoint is enough to serve, and no altered one is ever loaded."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from manipi.checkpoints.native import MANIFEST, read_checkpoint, verify, write_checkpoint
from manipi.errors import (
    CheckpointError,
    ConfigError,
    IntegrityError,
    NormStatsError,
    SelfTestError,
    StorageError,
    WeightsMismatchError,
)
from manipi.policy import Policy

FILES = {
    "model.safetensors",
    "config.json",
    "robot.json",
    "norm_stats.json",
    "tokenizer/text.json",
    "self_test.npz",
    "train_state/.metadata",
    "train_state/__0_0.distcp",
    "train_state/log_window.json",
}


@pytest.fixture
def checkpoint(trained, tmp_path) -> Path:
    """A copy to break."""
    return shutil.copytree(trained("pi05"), tmp_path / "2")


def sign_again(checkpoint: Path) -> None:
    """A manifest for what the files hold now, as someone would write who wants the change."""
    names = json.loads((checkpoint / MANIFEST).read_text())
    digests = {name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() for name in names}
    (checkpoint / MANIFEST).write_text(json.dumps(digests))


def test_the_files(checkpoint):
    assert json.loads((checkpoint / MANIFEST).read_text()).keys() == FILES
    assert {str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file()} == FILES | {MANIFEST}


@pytest.mark.parametrize("kind", ["pi05", "pi0", "pi0_fast"])
def test_what_was_written_comes_back(kind, trained, tiny, tmp_path):
    read = read_checkpoint(trained(kind))
    config = tiny(kind)
    assert read.config.model == config.policy_model
    assert (read.config.norm_mode, read.config.step) == (config.norm_mode, 2)
    assert read.robot == config.robot
    assert (read.tokenizers.action is not None) == (kind == "pi0_fast")
    assert read.self_test.actions.shape == (4, 4)
    write_checkpoint(tmp_path / "again", read)
    again = read_checkpoint(tmp_path / "again")
    assert all(torch.equal(again.weights[name], value) for name, value in read.weights.items())
    assert again.tokenizers.text.reference == read.tokenizers.text.reference
    assert again.tokenizers.action == read.tokenizers.action
    with pytest.raises(StorageError, match="does not exist yet"):
        write_checkpoint(tmp_path / "again", read)


@pytest.mark.parametrize("name", sorted(FILES))
def test_any_altered_byte_is_found(checkpoint, name):
    path = checkpoint / name
    data = path.read_bytes()
    for position in {0, len(data) // 2, len(data) - 1}:
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(IntegrityError, match="SHA-256") as error:
            Policy.load(checkpoint)
        assert error.value.where == str(path)


def test_an_altered_manifest_is_found(checkpoint):
    data = (checkpoint / MANIFEST).read_bytes()
    for position in range(0, len(data), 37):
        altered = bytearray(data)
        altered[position] ^= 1
        (checkpoint / MANIFEST).write_bytes(altered)
        with pytest.raises(IntegrityError):
            verify(checkpoint)


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_missing_file_is_named(checkpoint, name):
    (checkpoint / name).unlink()
    with pytest.raises(IntegrityError, match="no such file") as error:
        read_checkpoint(checkpoint)
    assert error.value.where == str(checkpoint / name)


@pytest.mark.parametrize("manifest", ["null", "[]", '{"config.json": 3}'])
def test_a_manifest_that_is_none_is_one_clear_error(checkpoint, manifest):
    (checkpoint / "manifest.json").write_text(manifest)
    with pytest.raises(IntegrityError):
        verify(checkpoint)


@pytest.mark.parametrize("name", ["notes.txt", "train_state/manifest.json"])
def test_an_extra_file_is_named(checkpoint, name):
    (checkpoint / name).write_text("{}")
    with pytest.raises(IntegrityError, match="a file that the manifest does not name") as error:
        read_checkpoint(checkpoint)
    assert error.value.where == str(checkpoint / name)


def test_what_is_no_checkpoint(tmp_path, checkpoint):
    with pytest.raises(CheckpointError, match="no such folder"):
        Policy.load(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="only an empty folder"):
        Policy.load(tmp_path / "empty")
    (checkpoint / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"only config\.json, model\.safetensors"):
        Policy.load(checkpoint)


# ---- changes that the manifest agrees with


@pytest.mark.parametrize(("part", "message"), [("action", "other actions"), ("text", "other token ids")])
def test_another_tokenizer_than_the_one_of_the_training_is_refused(part, message, trained, tmp_path):
    checkpoint = shutil.copytree(trained("pi0_fast"), tmp_path / "2")
    path = checkpoint / "tokenizer" / {"action": "action/dct.json", "text": "text.json"}[part]
    with_change = json.loads(path.read_text())
    with_change.update({"scale": 11} if part == "action" else {"sha256": "0" * 64})
    path.write_text(json.dumps(with_change))
    with pytest.raises(IntegrityError, match="an altered checkpoint is never loaded"):
        Policy.load(checkpoint)
    sign_again(checkpoint)
    with pytest.raises(IntegrityError, match=f"another tokenizer means {message}"):
        Policy.load(checkpoint)


def test_other_weights_fail_the_self_test(checkpoint):
    path = checkpoint / "model.safetensors"
    weights = load_file(path)
    weights["head.action_out.bias"] += 0.5
    save_file(weights, path)
    sign_again(checkpoint)
    with pytest.raises(SelfTestError, match="a largest difference of") as error:
        Policy.load(checkpoint)
    assert error.value.where == str(checkpoint)
    assert "do not put it on a robot" in error.value.next


def test_weights_of_another_version(checkpoint):
    path = checkpoint / "model.safetensors"
    weights = load_file(path)
    weights["head.action_output.bias"] = weights.pop("head.action_out.bias")
    save_file(weights, path)
    sign_again(checkpoint)
    with pytest.raises(WeightsMismatchError, match=r"Missing key[\s\S]*head\.action_out\.bias[\s\S]*Unexpected key"):
        Policy.load(checkpoint)


def test_a_device_that_is_not_there(trained):
    for device in ("cuda:99", "abacus"):
        with pytest.raises(ConfigError, match="a device that torch can use here") as error:
            Policy.load(trained("pi05"), device=device)
        assert error.value.where == f"device {device!r}"


def test_a_recorded_chunk_of_another_shape_fails_the_self_test(trained):
    checkpoint = read_checkpoint(trained("pi05"))
    policy = Policy.from_checkpoint(checkpoint)
    policy.check(checkpoint.self_test, where="here")
    for wrong in (checkpoint.self_test.actions[:2], np.full((4, 4), np.nan)):
        with pytest.raises(SelfTestError, match=r"difference of (inf|nan)"):
            policy.check(replace(checkpoint.self_test, actions=wrong), where="here")


def test_statistics_of_another_robot(checkpoint):
    path = checkpoint / "norm_stats.json"
    data = json.loads(path.read_text())
    data["manipi"]["contract"] = "0" * 64
    path.write_text(json.dumps(data))
    sign_again(checkpoint)
    with pytest.raises(NormStatsError, match=r"4 action dimensions \(000000000000\)"):
        Policy.load(checkpoint)


def test_a_robot_of_another_layout(checkpoint):
    path = checkpoint / "robot.json"
    data = json.loads(path.read_text())
    data["actions"][0]["relative"] = False
    path.write_text(json.dumps(data))
    sign_again(checkpoint)
    with pytest.raises(NormStatsError, match="robot 'tabletop'"):
        Policy.load(checkpoint)


# ---- a write that fails


@pytest.mark.parametrize("room", [0.3, 1.1], ids=["in the weights", "behind the weights"])
def test_a_full_disk_leaves_nothing(trained, mount, room):
    checkpoint = read_checkpoint(trained("pi05"))
    disk = mount(8)
    size = (trained("pi05") / "model.safetensors").stat().st_size
    (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - int(room * size)))

    def write_train_state(folder: Path) -> None:
        folder.mkdir()
        (folder / "state").write_bytes(bytes(size))

    with pytest.raises(StorageError, match="No space left on device") as error:
        write_checkpoint(disk / "checkpoint", checkpoint, write_train_state)
    assert error.value.where == str(disk / "checkpoint")
    assert [p.name for p in disk.iterdir()] == ["filler"]
