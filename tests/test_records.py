import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from manipi.errors import ConfigError, IntegrityError, UnknownNameError
from manipi.records import fingerprint, from_json, read_json, to_json, write_json


@dataclass(frozen=True)
class Inner:
    size: int
    names: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Outer:
    parts: tuple[Inner, ...]
    by_name: dict[str, Inner]
    rate: float | None = None


VALUE = Outer(parts=(Inner(1, ("x",)), Inner(2)), by_name={"a": Inner(3)}, rate=0.1)
KINDS = (Outer, Inner)


def test_round_trip_through_a_file(tmp_path):
    write_json(tmp_path / "value.json", VALUE)
    assert from_json(read_json(tmp_path / "value.json"), KINDS, "value.json") == VALUE


def test_arrays_numbers_and_paths_become_plain():
    assert to_json({"a": np.eye(2), "n": np.float32(0.5), "p": Path("x/y")}) == {
        "a": [[1.0, 0.0], [0.0, 1.0]],
        "n": 0.5,
        "p": "x/y",
    }


def test_an_unknown_type_is_refused():
    with pytest.raises(UnknownNameError, match=r"type in robot\.json") as error:
        from_json({"type": "Iner", "size": 1}, KINDS, "robot.json")
    assert error.value.next == "did you mean Inner?"


@pytest.mark.parametrize(
    ("data", "found"),
    [
        ({"type": "Inner", "size": 1}, "missing ['names'], unexpected []"),
        ({"type": "Inner", "size": 1, "names": [], "new": 2}, "missing [], unexpected ['new']"),
        ({"type": "Inner", "sise": 1, "names": []}, "missing ['size'], unexpected ['sise']"),
    ],
)
def test_the_fields_must_be_exactly_those_of_the_type(data, found):
    with pytest.raises(ConfigError) as error:
        from_json([data], KINDS, "file.json")
    assert error.value.found == found
    assert error.value.where == "file.json"


def test_an_absent_or_broken_file_is_named(tmp_path):
    (tmp_path / "half.json").write_text('{"a": 1')
    (tmp_path / "bytes.json").write_bytes(b"\xff{}")
    for name in ("absent.json", "half.json", "bytes.json"):
        with pytest.raises(IntegrityError, match=name):
            read_json(tmp_path / name)


def test_the_fingerprint_follows_the_content_alone():
    assert fingerprint({"a": 1, "b": [2.5, "π"]}) == fingerprint({"b": (2.5, "π"), "a": 1})
    assert fingerprint(VALUE) == fingerprint(json.loads(json.dumps(to_json(VALUE))))
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
