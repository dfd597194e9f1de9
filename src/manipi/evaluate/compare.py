"""Which of two policies is better: results on files, or trials made in turns until that can be said.

result.json of the same suite and seed     paired: trial i of A beside trial i of B
result.json of another seed                unpaired, and said
eval_info.json of LeRobot                  counts alone: unpaired
checkpoint, URL                            trials are made in turns, and end early where they can
several of one recipe, with commas         every training run is one observation (`groups_difference`)
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from manipi.errors import ConfigError, shown
from manipi.evaluate.evaluation import Evaluation, Settings
from manipi.evaluate.policies import OpenPolicy, open_policy
from manipi.evaluate.statistics import (
    Difference,
    SequentialTest,
    SuccessRate,
    Verdict,
    groups_difference,
    paired_difference,
    success_rate,
    unpaired_difference,
    verdict,
)
from manipi.evaluate.suites import Suite
from manipi.records import read_json

RESULTS = ("result.json", "eval_info.json")
"""What is looked for in a folder: ours, and LeRobot's."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """The trials of one policy."""

    name: str
    success: SuccessRate
    outcomes: tuple[bool, ...] | None = None
    """By index; None where only counts are known."""
    suite: str | None = None
    scenes: Mapping[str, Any] = field(default_factory=dict)
    """What two sides must have in common for trial i of one to be the scene of trial i of the other."""
    candidates: Mapping[str, Any] = field(default_factory=dict)
    """How each answer was chosen; {}: there was one."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A beside B."""

    a: str
    b: str
    success_a: SuccessRate
    success_b: SuccessRate
    difference: float
    """Success rate of A minus that of B, from -1 to 1."""
    low: float
    high: float
    trials: int
    """Of each; where A and B have different numbers, of the one with fewer."""
    verdict: Verdict
    paired: bool
    why_unpaired: str = ""
    p_value: float | None = None
    """Valid whenever it is looked at; None where trials are not paired."""
    only_a: int | None = None
    """Scenes in which A alone succeeded."""
    only_b: int | None = None
    stopped_early: bool = False
    """The interval then says more of a difference than there is, on average."""
    more_trials: tuple[int | None, int | None] | None = None
    """What a winner would take beyond these: median, 90th percentile; None: more than 5,000."""

    def sentence(self, margin: float) -> str:
        """What was found, in words.

        Args:
            margin: as a share, of `equivalent`.
        """
        points = f"{100 * self.difference:+.1f} points ({100 * self.low:+.1f} to {100 * self.high:+.1f}"
        points += ", biased outwards by stopping)" if self.stopped_early and self.verdict in ("a", "b") else ")"
        trials = f"{self.trials} scenes" if self.paired else f"{self.trials} trials and more, not paired"
        better = {"a": f"A is better: {self.a}", "b": f"B is better: {self.b}"}
        said = better.get(self.verdict, f"{self.verdict}, margin {100 * margin:g} points")
        text = f"{said}. A - B = {points}, {trials}"
        if self.paired:
            text += f"; A alone succeeded in {self.only_a}, B alone in {self.only_b}; p = {self.p_value:.3g}"
        if self.why_unpaired:
            text += f"\nnot paired: {self.why_unpaired}"
        if self.more_trials is not None:
            median, late = (f"{count:,}" if count is not None else "more than 5,000" for count in self.more_trials)
            text += f"\na winner would take about {median} more scenes, and in one of ten cases {late} or more"
        return text


def read_side(path: Path) -> Side:
    """What `manipi eval` or LeRobot's evaluation wrote: a file, or the folder that holds it.

    Raises:
        ConfigError: it is neither.
    """
    file = next((path / name for name in RESULTS if (path / name).is_file()), path)
    data = read_json(file, ConfigError)
    if isinstance(data, dict) and {"suite", "trials", "seed"} <= data.keys():
        try:
            side, indices = read_side_of(data), [row["index"] for row in data["trials"]]
        except (LookupError, TypeError, AttributeError) as error:
            raise _not_a_result(file, f"trials that cannot be read: {type(error).__name__} {error}") from error
        if indices != list(range(len(indices))):
            raise _not_a_result(file, f"{len(indices)} trials that are not all up to the last")
        return side
    try:
        found = _lerobot_outcomes(data)
    except (LookupError, TypeError) as error:
        raise _not_a_result(file, f"episodes that cannot be read: {type(error).__name__} {error}") from error
    if found is not None:
        return Side(name=str(path), success=success_rate(sum(found), len(found)))
    raise _not_a_result(file, f"{type(data).__name__} with {shown(sorted(data) if isinstance(data, dict) else data)}")


def read_side_of(result: Mapping[str, Any]) -> Side:
    """What `Evaluation.result` holds."""
    outcomes = tuple(_outcome(row["success"]) for row in result["trials"])
    if not outcomes:
        raise LookupError("no trial")
    scenes = {key: result.get(key) for key in ("suite", "seed", "options", "simulator")}
    scenes["manipi"] = result.get("versions", {}).get("manipi")
    rate, control = success_rate(sum(outcomes), len(outcomes)), result.get("settings", {}).get("control")
    name = result["policy"] if control is None else f"{result['policy']}, {control.replace('_', ' ')}"
    chosen = result.get("candidates")
    if chosen:
        gate = "" if chosen["gate"] is None else f", gate {chosen['gate']:g}"
        name += f", best of {chosen['n']} by {chosen['selector']}{gate}"
    return Side(
        name=name, success=rate, outcomes=outcomes, suite=result["suite"], scenes=scenes, candidates=chosen or {}
    )


def _lerobot_outcomes(data: Any) -> list[bool] | None:
    """Of `lerobot-eval`: a list of episodes, or since its version 0.4 one of tasks with their successes."""
    if not isinstance(data, dict):
        return None
    if isinstance(episodes := data.get("per_episode"), list) and episodes:
        return [_outcome(episode["success"]) for episode in episodes]
    if isinstance(tasks := data.get("per_task"), list) and tasks:
        return [_outcome(one) for task in tasks for one in task["metrics"]["successes"]] or None
    return None


def _outcome(value: Any) -> bool:
    """Raises TypeError for what is neither true nor false, such as NaN."""
    if value not in (0, 1):
        raise TypeError(f"success {shown(value)}")
    return bool(value)


def _not_a_result(file: Path, found: str) -> ConfigError:
    return ConfigError(
        expected="a result of manipi eval (result.json) or of LeRobot (eval_info.json), a checkpoint, or a URL",
        found=found,
        where=str(file),
        next="manipi eval CHECKPOINT --suite tabletop/reach",
    )


def is_result(source: str) -> bool:
    """Whether that names a file of results, or a folder with one; everything else is a policy."""
    path = Path(source)
    return path.is_file() or any((path / name).is_file() for name in RESULTS)


def compare_results(a: Side, b: Side, *, margin: float, alpha: float) -> Comparison:
    """Two sides whose trials are over.

    Raises:
        ConfigError: they are of different suites.
    """
    _require_one_suite(a, b)
    why = _why_unpaired(a, b)
    if a.outcomes is None or b.outcomes is None or why:
        interval = unpaired_difference(a.success, b.success)
        winner = "a" if interval.low > 0 else "b" if interval.high < 0 else None
        trials = min(a.success.n, b.success.n)
        return _comparison(a, b, interval, trials, verdict(winner, interval, margin), paired=False, why_unpaired=why)
    trials = min(len(a.outcomes), len(b.outcomes))
    test = SequentialTest(alpha=alpha, planned=trials)
    for one, other in zip(a.outcomes, b.outcomes):
        test.add(one, other)
    return _paired(a, b, test, margin)


def _require_one_suite(a: Side, b: Side) -> None:
    if a.suite and b.suite and a.suite != b.suite:
        raise ConfigError(
            expected=f"results of one suite: {a.suite}, as {a.name} is",
            found=b.suite,
            where=b.name,
            next=f"manipi eval CHECKPOINT --suite {a.suite}",
        )


def _why_unpaired(a: Side, b: Side) -> str:
    if a.outcomes is None or b.outcomes is None:
        return "of one side only counts are known"
    differ = [key for key in a.scenes if a.scenes[key] != b.scenes.get(key)]
    said = (f"{key} {shown(a.scenes[key])} and {shown(b.scenes.get(key))}" for key in differ)
    return f"their scenes are not the same: {'; '.join(said)}" if differ else ""


def _paired(a: Side, b: Side, test: SequentialTest, margin: float) -> Comparison:
    """From a test that has seen the first trials of both."""
    assert a.outcomes is not None, a.name
    assert b.outcomes is not None, b.name
    first = slice(test.trials)
    interval = paired_difference(a.outcomes[first], b.outcomes[first])
    early = test.planned is not None and test.trials < test.planned
    found = test.winner or (None if early else verdict(None, interval, margin)) or "undecided"
    more = None if test.winner or found == "equivalent" else test.more_trials()
    counts = {"only_a": test.wins_a, "only_b": test.wins_b, "p_value": test.p_value, "stopped_early": early}
    return _comparison(a, b, interval, test.trials, found, paired=True, more_trials=more, **counts)


def _comparison(a: Side, b: Side, interval: Difference, trials: int, found: Verdict, **more: Any) -> Comparison:
    rates = {"success_a": a.success, "success_b": b.success}
    return Comparison(a=a.name, b=b.name, trials=trials, verdict=found, **rates, **vars(interval), **more)


def compare_groups(a: Sequence[Side], b: Sequence[Side], *, margin: float) -> Comparison:
    """Two recipes that were trained several times each.

    Raises:
        ConfigError: a group has one member, so that nothing is known of how training runs differ; or they are of
            different suites.
    """
    if min(len(a), len(b)) < 2:
        raise ConfigError(
            expected="two or more training runs on both sides",
            found=f"{len(a)} and {len(b)}",
            where="manipi compare A1,A2 B1,B2",
            next="name as many results of other seeds of training, with commas between them",
        )
    for one in (*a, *b):
        _require_one_suite(a[0], one)

    for group in (a, b):
        if other := next((one for one in group if one.candidates != group[0].candidates), None):
            raise ConfigError(
                expected=f"answers chosen alike within a group, as those of {group[0].name}",
                found=shown(dict(other.candidates)) if other.candidates else "answers of a single chunk",
                where=other.name,
                next="evaluate all of them with the same --candidates, --selector and --gate",
            )

    def whole(group: Sequence[Side]) -> Side:
        counts = sum(one.success.k for one in group), sum(one.success.n for one in group)
        return Side(name=", ".join(one.name for one in group), success=success_rate(*counts))

    side_a, side_b = whole(a), whole(b)
    between = groups_difference([one.success.rate for one in a], [one.success.rate for one in b])
    # Training runs that came out alike by chance do not make the trials of all of them more than they are.
    within = unpaired_difference(side_a.success, side_b.success)
    interval = Difference(between.difference, min(between.low, within.low), max(between.high, within.high))
    winner = "a" if interval.low > 0 else "b" if interval.high < 0 else None
    trials = min(one.success.n for one in (*a, *b))
    why = "training runs are compared, not their trials"
    found = verdict(winner, interval, margin)
    return _comparison(side_a, side_b, interval, trials, found, paired=False, why_unpaired=why)


def may_be_equivalent(seen: Sequence[tuple[bool, bool]], planned: int, margin: float) -> bool:
    """Whether the scenes that are left can still bring the interval within the margin, if they go as well as can be."""
    wins = [sum(a > b for a, b in seen), sum(b > a for a, b in seen)]
    left, behind = planned - len(seen), (wins[1] > wins[0], wins[0] > wins[1])
    for both in (True, False):
        for even in {0, min(left, abs(wins[0] - wins[1]))}:
            whole = [*seen, *even * [behind], *(left - even) * [(both, both)]]
            interval = paired_difference([a for a, _ in whole], [b for _, b in whole])
            if verdict(None, interval, margin) == "equivalent":
                return True
    return False


class _Finished:
    """A result on file, read as if it were made now."""

    def __init__(self, side: Side):
        self.side, self.policy = side, side.name

    def run(self, count: int, *, show: bool) -> None: ...

    def finish(self) -> None: ...

    def successes(self, count: int) -> list[bool]:
        return list((self.side.outcomes or ())[:count])


def compare_policies(
    a: str, b: str, suite: Suite, settings: Settings, *, margin: float, alpha: float, workers: int = 1, **server: Any
) -> Comparison:
    """Two checkpoints, servers or results, on the same scenes in turns; ends with a winner, or when there can be none.

    Trials that there are already are not made again.

    Args:
        server: as `open_policy` takes it.

    Raises:
        ConfigError: a result is of other scenes.
        whatever `Evaluation` raises.
    """
    with contextlib.ExitStack() as stack:
        opened_policies: list[OpenPolicy] = []
        made: list[Evaluation] = []
        finished: list[_Finished] = []
        both: list[Evaluation | _Finished] = []
        for source in (a, b):
            if is_result(source):
                finished.append(_Finished(read_side(Path(source))))
                both.append(finished[-1])
                continue
            opened = stack.enter_context(open_policy(source, **server))
            opened_policies.append(opened)
            named = {"policy": opened.name, "server": opened.server, "workers": workers}
            folder = opened.folder(suite, settings)
            made.append(stack.enter_context(Evaluation(folder, suite, settings, opened.url, **named)))
            both.append(made[-1])
        planned = min([settings.trials, *(len(one.side.outcomes or ()) for one in finished)])
        for one in finished:
            made[0].run(1, show=False)  # its provenance then says what the simulator is
            if why := _why_unpaired(read_side_of(made[0].result()), one.side):
                raise ConfigError(
                    expected="a result of the scenes that are tried now",
                    found=why,
                    where=one.policy,
                    next="give its --seed, or evaluate both anew: manipi compare CHECKPOINT CHECKPOINT --suite …",
                )
        test = SequentialTest(alpha=alpha, planned=planned)
        bar = stack.enter_context(tqdm(total=planned, desc="compare", unit="scene"))
        hopeless = test.futile  # so few trials can only show an interval, which takes all of them
        over, seen = False, list[tuple[bool, bool]]()
        while test.trials < planned and not over:
            upto = min(test.trials + workers, planned)
            for one in both:
                one.run(upto, show=False)
            for outcome in list(zip(*(one.successes(upto) for one in both)))[test.trials :]:
                test.add(*outcome)
                seen.append(outcome)
                bar.update()
                futile = test.futile and not hopeless and not may_be_equivalent(seen, planned, margin)
                if over := bool(test.winner) or futile:
                    break
            bar.set_postfix_str(f"A alone {test.wins_a}, B alone {test.wins_b}, p {test.p_value:.3g}", refresh=False)
        for opened in opened_policies:
            opened.require_unchanged()
        sides = []
        for one in both:
            outcomes = tuple(one.successes(test.trials))
            rate = success_rate(sum(outcomes), len(outcomes))
            sides.append(Side(name=one.policy, success=rate, outcomes=outcomes, suite=suite.name))
            one.finish()
    return _paired(sides[0], sides[1], test, margin)
