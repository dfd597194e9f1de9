"""Suites: named sets of trials in a simulator, and where simulators are found.

    tabletop/reach        entry point `tabletop` of the group manipi.suites: runs in this Python
    metaworld/four        simulators/metaworld/suite.json: runs in simulators/metaworld/.venv, which `make` builds

Scene, task and noise of trial i are functions of (suite, seed, i) alone, so that every policy meets the same ones.
"""

import contextlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from manipi.errors import ConfigError, ManipiError, SimulatorError, quoted, shown, unknown_name
from manipi.extensions import entries, find
from manipi.records import read_json
from manipi_client.lockstep import derive
from manipi_client.trials import TrialSpec

FIRST_SCENE = 2**30
"""Scenes of suites count from here on. Demonstrations to train on take lower seeds, so that no scene is in both."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """What the trials of one name have in common."""

    name: str
    """FAMILY/NAME."""
    about: str
    """One line for people: what succeeds, and what makes it hard."""
    robot: str
    """Name of the robot whose policies it drives."""
    factory: str
    """What makes the simulator, as `manipi_client.trials` reads it: FILE.py:FACTORY or MODULE:FACTORY."""
    tasks: tuple[str, ...] = ("",)
    """Trial i has task i mod their number."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What the factory is called with."""
    demonstrated: Mapping[str, Any] = field(default_factory=dict)
    """What it is called with beside or instead of these, where demonstrations are recorded."""
    policy_image_size: bool = False
    """Whether the simulator renders in the size that the policy reads, given as `image_size`."""
    execute_steps: int = 8
    """Steps of each chunk that are executed, unless the caller says."""
    trials: int = 200
    """How many, unless the caller says."""
    python: Path = Path(sys.executable)
    """Interpreter of the simulator's worker processes."""

    def trial(self, seed: int, index: int, **settings: Any) -> TrialSpec:
        """The specification of a trial.

        Args:
            seed: of the whole evaluation.
            settings: the other fields of `TrialSpec`.
        """

        def scene(index: int) -> int:
            return FIRST_SCENE + derive(self.name, seed, index, "scene") % FIRST_SCENE

        if settings.get("control") == "replay":
            settings["replayed_scene"] = scene(index + len(self.tasks))  # the same task on the next scene of it
        noise = derive(self.name, seed, index, "noise")
        task = self.tasks[index % len(self.tasks)]
        return TrialSpec(index=index, scene=scene(index), task=task, noise=noise, **settings)


def simulators_folder() -> Path:
    """Where simulators with a Python of their own are: MANIPI_SIMULATORS, or `simulators` in the present folder."""
    return Path(os.environ.get("MANIPI_SIMULATORS") or "simulators")


def suite_names() -> list[str]:
    """All that can be asked for here; those of packages that cannot be imported are left out of the list."""
    names = [f"{path.parent.name}/{one}" for path in _descriptions() for one in _read(path)["suites"]]
    for family in entries("manipi.suites"):
        with contextlib.suppress(ManipiError):
            names += [f"{family}/{one}" for one in _family(family)]
    return sorted(names)


def find_suite(name: str) -> Suite:
    """The suite FAMILY/NAME.

    Raises:
        UnknownNameError: there is none; with the closest.
        SimulatorError: the simulator is not installed; names the make target that does it.
    """
    family, _, rest = name.partition("/")
    path = simulators_folder() / family / "suite.json"
    if family in entries("manipi.suites"):
        suites = _family(family)
        if rest in suites:
            return suites[rest]
    elif path.is_file() and rest in _read(path)["suites"]:
        return _simulator_suite(path, rest)
    advice = f"choose one of {', '.join(suite_names())}; others are looked for in {simulators_folder()}/FAMILY"
    raise unknown_name("suite", name, suite_names(), next=advice)


def _family(family: str) -> Mapping[str, Suite]:
    return find("manipi.suites", family)


def _descriptions() -> list[Path]:
    return sorted(simulators_folder().glob("*/suite.json"))


def _read(path: Path) -> dict[str, Any]:
    described = read_json(path)
    if not isinstance(described, dict) or not isinstance(described.get("suites"), dict):
        raise ConfigError(
            expected="an object with `robot`, `factory` and `suites`",
            found=shown(described),
            where=str(path),
            next="see docs/simulators.md",
        )
    return described


def _simulator_suite(path: Path, name: str) -> Suite:
    """One of `suite.json`: what stands in it for all suites, and what stands under this one's name, which wins."""
    folder, described = path.parent.absolute(), _read(path)
    python = folder / ".venv" / "bin" / "python"
    if not python.exists():
        raise SimulatorError(
            expected=f"the simulator {folder.name} in a Python environment of its own",
            found=f"no {python}",
            where=f"suite {folder.name}/{name}",
            next=f"make sim-{folder.name}",
        )
    try:
        fields = {key: value for key, value in described.items() if key != "suites"} | described["suites"][name]
        fields["factory"] = f"{folder}/{fields['factory']}"
        fields["tasks"] = tuple(fields.get("tasks", ("",)))
        if not (fields["tasks"] and all(isinstance(task, str) for task in fields["tasks"])):
            raise TypeError(f"tasks {shown(fields['tasks'])}, which are to be texts, one or more")
        return Suite(name=f"{folder.name}/{name}", python=python, **fields)
    except (KeyError, TypeError) as error:
        raise ConfigError(
            expected="robot, factory, about and other fields of manipi.evaluate.suites.Suite",
            found=f"{type(error).__name__}: {error}",
            where=f"{quoted(path)}, suite {name}",
            next="see docs/simulators.md",
        ) from error
