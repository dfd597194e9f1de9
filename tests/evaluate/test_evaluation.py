"""Evaluations: equal trial by trial, kept through every kind of end, and of one policy in one world."""

import contextlib
import importlib.util
import json
import os
import re
import signal
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.commands import Command

from manipi.cli import main
from manipi.errors import ConfigError, ServeError, SimulatorError, StorageError, UnknownNameError
from manipi.evaluate import evaluation as evaluation_module
from manipi.evaluate import suites
from manipi.evaluate.compare import compare_groups, compare_results, read_side
from manipi.evaluate.evaluation import Evaluation, Settings
from manipi.evaluate.report import write_evaluation
from manipi.evaluate.suites import FIRST_SCENE, Suite, find_suite
from manipi_client.fake import FakePolicyServer

SIMULATOR = Path(__file__).with_name("simulator.py")
SUITE = Suite(
    name="tests/line", about="", robot="line", factory=f"{SIMULATOR}:Line", tasks=("right", "far"), execute_steps=2
)
SETTINGS = Settings(trials=6, execute_steps=2)
METADATA = {"robot": {"name": "line"}, "action_horizon": 4, "checkpoint": "abc", "control_hz": 10.0}


def answer(observation):
    """To the right by a noise that the seed decides."""
    noise = np.random.default_rng(observation["manipi/seed"]).uniform(0.0, 0.2, (4, 2))
    return {"actions": noise.astype(np.float32)}


@pytest.fixture
def evaluate(tmp_path):
    """`evaluate(name)` is an evaluation that ran in a folder of that name."""

    def run(name="one", settings=SETTINGS, *, metadata=METADATA, infer=answer, options=(), count=None, **where):
        suite = replace(SUITE, options=dict(options))
        with (
            FakePolicyServer(infer, metadata) as server,
            Evaluation(tmp_path / name, suite, settings, f"ws://127.0.0.1:{server.port}", policy=name, **where) as e,
        ):
            e.run(count, show=False)
            e.finish()
        return e

    return run


def trials(evaluation):
    return json.loads((evaluation.folder / "result.json").read_text())["trials"]


def test_trial_by_trial_equal_whoever_runs_them(evaluate):
    one, three = evaluate("one"), evaluate("three", workers=3)
    parts = evaluate("parts", count=2)
    parts = evaluate("parts", workers=2)
    longer = evaluate("longer", replace(SETTINGS, trials=8))
    assert trials(one) == trials(three) == trials(parts) == trials(longer)[:6]
    assert [row["index"] for row in trials(one)] == list(range(6))
    assert len({row["seed"] for row in trials(one)}) == 6
    assert [row["task"] for row in trials(one)] == ["right", "far"] * 3
    other = evaluate("other", replace(SETTINGS, seed=1))
    assert {row["seed"] for row in trials(one)}.isdisjoint(row["seed"] for row in trials(other))


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs manipi[ray]")
def test_trial_by_trial_equal_on_a_ray_cluster(evaluate, tmp_path):
    assert trials(evaluate("spread", ray=True, workers=2)) == trials(evaluate("here"))
    (tmp_path / "die_at_step").touch()
    with pytest.raises(SimulatorError, match=r"signal 9[\s\S]*a word before"):
        evaluate("again", ray=True, options={"folder": str(tmp_path)}.items())
    assert trials(evaluate("again", ray=True, options={"folder": str(tmp_path)}.items())) == trials(evaluate("here"))
    with pytest.raises(ConfigError, match="takes a processor"):
        evaluate("many", ray=True, workers=1_000)


def test_a_cluster_of_several_hosts_needs_an_address_that_they_reach(evaluate, monkeypatch):
    monkeypatch.setattr(evaluation_module, "cluster_size", lambda: (8, 2))
    with pytest.raises(ConfigError, match=r"all 2 hosts[\s\S]*--host ADDRESS"):
        evaluate(ray=True)


def test_scenes_are_far_from_those_of_demonstrations():
    scenes = [SUITE.trial(seed, index, execute_steps=1).scene for seed in range(30) for index in range(300)]
    assert min(scenes) >= FIRST_SCENE
    assert max(scenes) < 2 * FIRST_SCENE
    assert len(set(scenes)) > 8_990


def test_the_result_says_what_was_measured(evaluate):
    result = json.loads((evaluate().folder / "result.json").read_text())
    assert result["success"]["n"] == 6
    assert result["success"]["k"] == sum(row["success"] for row in result["trials"])
    assert (result["suite"], result["seed"], result["checkpoint"]) == ("tests/line", 0, "abc")
    assert result["simulator"]["renderer"] == "numbers"
    row = result["trials"][0]
    assert {"success", "steps", "failure", "seconds", "collisions", "path_m", "jerk", "gripper_events"} <= row.keys()
    assert row["gripper_events"] is None  # the server does not say which command is a gripper's


def test_a_run_that_ended_in_the_middle_goes_on(evaluate, tmp_path):
    whole = trials(evaluate("whole"))
    (tmp_path / "raise_at_step").touch()
    with pytest.raises(SimulatorError, match="the motor burnt"):
        evaluate("again", options={"folder": str(tmp_path)}.items())
    log = tmp_path / "again" / "trials.jsonl"
    log.write_bytes(log.read_bytes() + b'{"index": 5, "succ')  # what a full disk leaves
    again = evaluate("again", options={"folder": str(tmp_path)}.items())
    assert trials(again) == whole


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("die_at_step", r"signal 9[\s\S]*a word before"),
        ("die_at_reset", r"trial 0[\s\S]*signal 9"),
        ("raise_at_reset", r"RuntimeError: the motor burnt"),
        ("hang_at_step", r"no step for 2 s"),
    ],
)
def test_a_simulator_that_ends_badly(evaluate, tmp_path, monkeypatch, trouble, message):
    monkeypatch.setattr(evaluation_module, "HANG_SECONDS", 2)
    (tmp_path / trouble).touch()
    with pytest.raises(SimulatorError, match=message):
        evaluate(options={"folder": str(tmp_path)}.items())


def test_a_simulator_that_renders_black(evaluate):
    with pytest.raises(SimulatorError, match="all alike"):
        evaluate(options={"black": True}.items())


@pytest.mark.parametrize(
    ("changes", "metadata", "found"),
    [
        ({"execute_steps": 1}, {}, "settings"),
        ({}, {"checkpoint": "other"}, "checkpoint"),
        ({"control": "blind"}, {}, "settings"),
    ],
)
def test_a_folder_is_of_one_policy_and_one_setting(evaluate, changes, metadata, found):
    evaluate(count=1)
    with pytest.raises(ConfigError, match=f"trials with {found}"):
        evaluate(settings=replace(SETTINGS, **changes), metadata={**METADATA, **metadata})


@pytest.mark.parametrize(
    ("settings", "metadata", "error"),
    [
        ({}, {"robot": {"name": "aloha"}}, "one for 'aloha'"),
        ({"execute_steps": 5}, {}, "within 4 together"),
        ({"join": "ensemble", "delay": 3}, {}, "2 and 3"),
        ({"join": "real_time", "delay": 1}, {}, "previous chunk"),
    ],
)
def test_what_does_not_fit_the_policy(evaluate, settings, metadata, error):
    with pytest.raises((ConfigError, SimulatorError), match=error):
        evaluate(settings=replace(SETTINGS, **settings), metadata={**METADATA, **metadata})


def test_a_full_disk_loses_nothing_that_ended(evaluate, mount):
    whole, disk = trials(evaluate("whole")), mount(1)
    evaluate(disk / "again", count=3)
    filler = disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(512)):
            pass
    with pytest.raises(StorageError, match="expected room"):
        evaluate(disk / "again")
    filler.unlink()
    again = evaluate(disk / "again")
    assert trials(again) == whole


def test_films_and_page(evaluate, tmp_path):
    with FakePolicyServer(answer, METADATA) as server:
        where = {"policy": "one", "workers": 1}
        with Evaluation(tmp_path / "e", SUITE, SETTINGS, f"ws://127.0.0.1:{server.port}", **where) as evaluation:
            evaluation.run(show=False)
            films = evaluation.films(4)
            result = evaluation.finish()
    assert len(films) == 4
    assert all(len(frames) == result["trials"][index]["steps"] + 1 for index, frames in films.items())
    write_evaluation(tmp_path / "page.html", result, films, fps=10)
    page = (tmp_path / "page.html").read_text()
    assert page.count("<video") == 4
    assert "By task" in page


def test_controls_differ_on_the_same_scenes(evaluate):
    plain, held = evaluate("plain"), evaluate("held", replace(SETTINGS, control="held"))
    assert [row["seed"] for row in trials(plain)] == [row["seed"] for row in trials(held)]
    found = compare_results(read_side(plain.folder), read_side(held.folder), margin=0.05, alpha=0.05)
    assert (found.paired, found.trials) == (True, 6)


@pytest.mark.parametrize(
    "metadata", [{}, {"robot": "line", "image_size": "big", "action_horizon": None, "control_hz": "fast"}]
)
def test_a_server_that_says_little_of_itself(evaluate, metadata, tmp_path):
    suite = replace(SUITE, policy_image_size=True)
    with FakePolicyServer(answer, metadata) as server:
        where = f"ws://127.0.0.1:{server.port}"
        with Evaluation(tmp_path / "e", suite, SETTINGS, where, policy="one") as evaluation:
            evaluation.run(show=False)
            assert evaluation.finish()["success"]["n"] == 6


def test_a_server_that_fails_is_not_the_simulator(evaluate):
    def infer(observation):
        raise RuntimeError("kaboom")

    with pytest.raises(ServeError, match=r"policy server in trial 0[\s\S]*kaboom"):
        evaluate(infer=infer)


def test_a_policy_of_no_number(evaluate):
    with pytest.raises(SimulatorError, match="a command of finite numbers"):
        evaluate(infer=lambda observation: {"actions": np.full((4, 2), np.nan, np.float32)})


def test_scenes_that_are_solved_as_they_begin_and_a_simulator_without_pictures(evaluate, tmp_path):
    options = {"start": 2.0, "unseen": True}
    solved = evaluate(options=options.items())
    assert [(row["success"], row["steps"], row["jerk"]) for row in trials(solved)] == 6 * [(True, 0, None)]
    suite, replay = replace(SUITE, options=options), replace(SETTINGS, control="replay")
    with FakePolicyServer(answer, {**METADATA, "robot": {"name": "line"}}) as server:
        where = f"ws://127.0.0.1:{server.port}"
        with Evaluation(tmp_path / "replay", suite, replay, where, policy="one") as evaluation:
            evaluation.run(show=False)
            assert evaluation.films(4) == {}


def test_a_sweep_is_a_table_and_a_difference_from_its_first_setting(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(suites, "find_suite", lambda name: SUITE)
    path = tmp_path / "all.json"
    flags = ["--suite", SUITE.name, "--trials", "3", "--delay", "1", "--films", "0", "--dir", str(tmp_path / "sweep")]
    with FakePolicyServer(answer, METADATA) as server:
        url = f"ws://127.0.0.1:{server.port}"
        main(["eval", url, *flags, "--sweep", "join=synchronous,asynchronous,ensemble", "--json", str(path)])
    results, printed = json.loads(path.read_text()), capsys.readouterr().out
    assert [one["settings"]["join"] for one in results] == ["synchronous", "asynchronous", "ensemble"]
    header = next(line for line in printed.splitlines() if "starved" in line).split()
    assert header == ["k", "n", "rate", "low", "high", "s", "starved", "seams", "jump", "change", "jerk"]
    for one in results:
        name = f"join {one['settings']['join']}"
        row = next(line for line in printed.splitlines() if line.startswith(name)).split()[2:]
        assert row[:2] == [str(one["success"]["k"]), "3"]
        assert float(row[5]) == pytest.approx(np.mean([trial["seconds"] for trial in one["trials"]]), rel=1e-3)
    assert printed.count("beside join synchronous (B)") == 2
    assert printed.count(", 3 scenes;") == 2


def test_unknown_suites_list_the_known_ones():
    with pytest.raises(UnknownNameError, match="tabletop/reach"):
        find_suite("tabletop/raech")


def test_a_simulator_with_a_python_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("MANIPI_SIMULATORS", str(tmp_path))
    folder = tmp_path / "lines"
    folder.mkdir()
    described = {"robot": "line", "factory": "simulator.py:Line", "about": "a line"}
    (folder / "suite.json").write_text(
        json.dumps({**described, "suites": {"short": {"tasks": ["right"], "trials": 3}}})
    )
    with pytest.raises(SimulatorError, match="make sim-lines"):
        find_suite("lines/short")
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "python").symlink_to(sys.executable)
    suite = find_suite("lines/short")
    assert (suite.robot, suite.tasks, suite.trials) == ("line", ("right",), 3)
    assert suite.factory == f"{folder}/simulator.py:Line"
    with pytest.raises(UnknownNameError, match="lines/short"):
        find_suite("lines/shot")
    for broken in (3, {"tasks": []}, {"tasks": [1]}, {"tasks": 3}, {"colour": "red"}):
        (folder / "suite.json").write_text(json.dumps({**described, "suites": {"short": broken}}))
        with pytest.raises(ConfigError, match=r"docs/simulators\.md"):
            find_suite("lines/short")


@pytest.mark.slow
def test_the_command_serves_a_checkpoint_and_says_whose_it_is(checkpoint, capsys):
    with pytest.raises(SystemExit):
        main(["eval", str(checkpoint), "--suite", "tabletop/reach", "--trials", "1"])
    assert "one for 'planted'" in capsys.readouterr().err


def test_the_old_flag_names_the_new_one(capsys):
    with pytest.raises(SystemExit):
        main(["eval", "somewhere", "--scenes", "2"])
    assert "--suite tabletop/reach" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        *("--trials 0", "--workers -1", "--execute-steps 0", "--delay -1", "--num-steps 0", "--temperature nan"),
        *("--films -1", "--max-batch 0", "--join magic", "--num-threads -2", "--sweep execute_steps=4,0"),
    ],
)
def test_numbers_that_cannot_be_are_said_before_anything_starts(flags, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["eval", "nowhere", "--suite", "tabletop/reach", "--dir", str(tmp_path), *flags.split()])
    said = capsys.readouterr().err
    assert "ConfigError" in said
    assert flags.split()[flags.startswith("--sweep") and 1].split("=")[0].replace("_", "-").strip("-") in said


@pytest.mark.parametrize(("delay", "advice"), [(3, "--execute-steps 1"), (7, "--delay 3 --execute-steps 1")])
def test_what_to_do_about_a_short_chunk_helps(evaluate, delay, advice):
    with pytest.raises(ConfigError, match=advice):
        evaluate(settings=replace(SETTINGS, join="ensemble", delay=delay))


@pytest.mark.slow
def test_servers_and_workers_end_with_a_command_that_is_killed(trained, tmp_path):
    made = Command(
        "eval", trained("pi05"), "--suite", "tabletop/reach", "--execute-steps", "2", "--dir", tmp_path / "e"
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "e" / "trials.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    children = Path(f"/proc/{made.pid}/task/{made.pid}/children").read_text().split()
    words = {child: Path(f"/proc/{child}/cmdline").read_text() for child in children}
    ((worker, url),) = ((c, found) for c in children if (found := re.search(r"ws://127.0.0.1:(\d+)", words[c])))
    port = int(url.group(1))
    os.kill(made.pid, signal.SIGKILL)
    with contextlib.suppress(ConnectionRefusedError):
        while time.monotonic() < deadline:
            time.sleep(0.2)
            with contextlib.suppress(TimeoutError):
                socket.create_connection(("127.0.0.1", port), 1).close()
    while Path(f"/proc/{worker}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_one_evaluation_at_a_time_in_a_folder(evaluate, tmp_path):
    with (
        FakePolicyServer(answer, METADATA) as server,
        Evaluation(tmp_path / "one", SUITE, SETTINGS, f"ws://127.0.0.1:{server.port}", policy="one"),
        pytest.raises(ConfigError, match="one evaluation at a time"),
    ):
        evaluate("one")
    evaluate("one", count=1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("trials.jsonl", "{}\n", "line 1 of trials.jsonl"),
        ("trials.jsonl", '[1]\n{"index": 3}\n', "line 1 of trials.jsonl"),
        ("trials.jsonl", "\x00\n", "line 1 of trials.jsonl"),
        ("evaluation.json", "[]", "JSON object"),
        ("evaluation.json", '{"suite', "JSON file"),
        ("evaluation.json", "", "JSON file"),
    ],
)
def test_a_folder_whose_files_are_broken(evaluate, tmp_path, name, content, message):
    evaluate(count=1)
    (tmp_path / "one" / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        evaluate()


def test_a_folder_of_something_else_stays_as_it_is(evaluate, tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "result.json").write_text("mine")
    with pytest.raises(ConfigError, match=r"a folder with result.json"):
        evaluate()
    assert (tmp_path / "one" / "result.json").read_text() == "mine"


def test_the_result_has_the_trials_that_were_asked_for(evaluate):
    whole = trials(evaluate())
    assert trials(evaluate(settings=replace(SETTINGS, trials=2))) == whole[:2]
    log = evaluate().folder / "trials.jsonl"
    kept = [line for line in log.read_text().splitlines() if json.loads(line)["index"] != 2]
    log.write_text("".join(f"{line}\n" for line in kept))  # what a kill of three workers leaves
    gap = evaluate(count=1)
    assert trials(gap) == whole[:2]
    assert read_side(gap.folder).success.n == 2
    assert trials(evaluate()) == whole


CHOICE = {"n": 1, "selector": "medoid", "gate": None, "execute_steps": None}


def test_candidates_are_asked_for_and_kept_apart(evaluate, tmp_path):
    asked = []

    def choosing(observation):
        asked.append({key: observation.get(f"manipi/{key}") for key in ("candidates", "selector", "execute_steps")})
        return answer(observation) | {"candidates": {"n": 4}}

    eight = replace(SETTINGS, candidates=4, selector="limits")
    with pytest.raises(ConfigError, match=r"server that draws candidates[\s\S]*--candidates"):
        evaluate("none", eight)  # such a server would not read the key, and the result would be of one candidate
    evaluate("chosen", eight, metadata=METADATA | {"candidates": CHOICE}, infer=choosing)
    assert all(one == {"candidates": 4, "selector": "limits", "execute_steps": 2} for one in asked)
    result = json.loads((tmp_path / "chosen/result.json").read_text())
    assert result["candidates"] == CHOICE | {"n": 4, "selector": "limits"}
    assert [row["drawn"] for row in result["trials"]] == [4 * row["answers"] for row in result["trials"]]
    with pytest.raises(ConfigError, match="trials with settings"):
        evaluate("chosen", metadata=METADATA | {"candidates": CHOICE})
    # A server that chooses of its own is none of one candidate, either.
    evaluate("plain", metadata=METADATA | {"candidates": CHOICE})
    with pytest.raises(ConfigError, match="trials with candidates"):
        evaluate("plain", metadata=METADATA | {"candidates": CHOICE | {"n": 8}})
    plain, chosen = (read_side(tmp_path / name) for name in ("plain", "chosen"))
    assert chosen.name == "chosen, best of 4 by limits"
    assert compare_results(chosen, plain, margin=0.05, alpha=0.05).paired
    with pytest.raises(ConfigError, match="chosen alike"):
        compare_groups([plain, chosen], [plain, plain], margin=0.05)


def test_a_folder_from_before_there_were_candidates_goes_on(evaluate, tmp_path):
    whole = trials(evaluate("old", count=2))
    file, log = tmp_path / "old/evaluation.json", tmp_path / "old/trials.jsonl"
    before = json.loads(file.read_text())
    for name in ("candidates", "selector", "gate"):
        del before["settings"][name]
    del before["candidates"]
    file.write_text(json.dumps(before))
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    log.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "drawn"}) + "\n" for row in rows))
    assert trials(evaluate("old"))[:2] == whole


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"candidates": 0}, "--candidates"),
        ({"selector": "limits"}, "--candidates"),
        ({"gate": 0.1}, "--candidates"),
        ({"candidates": 4, "selector": "coherence"}, "--join real_time"),
    ],
)
def test_candidates_that_cannot_be(changes, found):
    with pytest.raises(ConfigError, match=found):
        replace(SETTINGS, **changes)
