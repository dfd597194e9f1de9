"""`manipi eval`: a checkpoint on held-out episodes, beside baselines; or in a simulator, in closed loop."""

import math
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import tyro

from manipi.cli.arguments import Folder, NewFile, OnDevice, parse, table, write_result
from manipi.errors import ConfigError

SWEPT = {"execute_steps": int, "num_steps": int, "delay": int, "join": str, "temperature": float, "mode": str}
SWEPT |= {"subtask_every": int, "candidates": int, "selector": str, "gate": float}
"""What `--sweep` may vary."""

MARGIN = 0.05
"""Settings of a sweep are equivalent where their success differs by less."""


@dataclass(frozen=True, kw_only=True)
class _Eval(OnDevice):
    """Compare predicted with recorded action chunks, on held-out and on training episodes, beside baselines.

    With --suite, drive a simulated robot instead, in closed loop through the policy server:

      manipi eval runs/demo/run/checkpoints/4000 --suite tabletop/reach --trials 200
      manipi eval ws://robot:8000 --suite tabletop/reach --blind

    Trials are kept as they end: after Ctrl-C, or a crash, the same command goes on where it stopped.
    """

    policy: tyro.conf.Positional[str]
    """A checkpoint folder, such as runs/NAME/checkpoints/STEP or runs/NAME/best; for a suite also a server's URL."""
    data: str | None = None
    """Folder of the dataset. Default: where it was in training."""
    holdout: float | None = None
    """Split the data anew, for data that the policy was not trained on. Default: the split of its run."""
    seed: int = 0
    """Of the new split; of a suite's scenes and noise."""
    holdout_only: bool = False
    """Leave the training episodes out."""
    max_frames: int = 256
    """Frames per side of the split, evenly spaced."""
    plot: NewFile | None = None
    """Draw predicted over recorded commands into this PNG. Default: open_loop_STEP.png in the run's folder."""
    suite: str | None = None
    """Closed loop: what to try, as FAMILY/NAME; a name that is unknown lists all."""
    trials: int | None = None
    """Suite: how many scenes. Default: the suite's own number."""
    execute_steps: int | None = None
    """Suite: steps of each chunk to execute before the policy is asked again. Default: the suite's own number."""
    join: str = "synchronous"
    """Suite: how chunks are joined: synchronous, asynchronous, ensemble, real_time."""
    delay: int = 0
    """Suite: control steps until the answer to an observation is there, however fast this computer is."""
    num_steps: int | None = None
    """Suite: integration steps of a flow policy. Default: the checkpoint's own number."""
    temperature: float | None = None
    """Suite: of a policy that writes tokens. Default: it takes the likeliest."""
    mode: str | None = None
    """Suite: flow or tokens, of a policy that was trained on both. Default: flow."""
    subtask_every: int = 0
    """Suite: the policy writes at every so many answers what it does next, and follows that; 0: never."""
    candidates: int | None = None
    """Suite: chunks that a flow policy draws for each answer, of which --selector chooses one. Default: 1, or what the
    server of a URL does."""
    selector: str | None = None
    """Suite: limits, medoid, coherence, token, or FILE.py:NAME; `+token` behind it makes the last candidate the token
    head's (docs/candidates.md). Default: medoid."""
    gate: float | None = None
    """Suite: draw more than one only where the path of the first one bends by more. Default: always."""
    untrained: bool = False
    """Suite, control: the same network with random weights."""
    blind: bool = False
    """Suite, control: every picture is black."""
    wrong_words: bool = False
    """Suite, control: the instruction names another object; success is judged by the scene's own."""
    held: bool = False
    """Suite, control: the first command is held for the whole trial."""
    replay: bool = False
    """Suite, control: the expert's commands of another scene, without looking."""
    sweep: str | None = None
    """Suite: one setting with several values, such as execute_steps=4,8,16; on the same scenes. Prints a table, and how
    each value differs from the first."""
    workers: int = 0
    """Suite: simulators side by side; what happens in a trial does not depend on it. 0: one, with --ray one for each
    processor of the cluster."""
    ray: bool = False
    """Suite: run them on the Ray cluster that this process belongs to, or on one started here."""
    host: str = "127.0.0.1"
    """Suite: address to serve a checkpoint at, for a cluster of several hosts one that all of them reach; clients then
    show the token MANIPI_TOKEN, or one that is made up for the purpose."""
    max_batch: int = 1
    """Suite: observations of several trials in one call of the model; their rounding then depends on each other."""
    films: int = 8
    """Suite: how many trials the page shows, the first of each outcome."""
    dir: Folder | None = None
    """Suite: folder of results. Default: in the run's folder, or in `evaluations`, named by suite and settings."""
    json: NewFile | None = None
    """Write the result to this file too."""


def main(arguments: Sequence[str]) -> None:
    """Evaluate; prints tables and one sentence per baseline."""
    if any(argument.split("=")[0] == "--scenes" for argument in arguments):
        raise ConfigError(
            expected="the name of a suite",
            found="--scenes, which version 0.1.0 had",
            where="manipi eval",
            next="--suite tabletop/reach --trials 100 --delay 2 --sweep join=synchronous,ensemble,real_time",
        )
    args = parse(_Eval, arguments, "eval")
    if args.max_frames < 1:
        raise ConfigError(
            expected="at least one frame", found=str(args.max_frames), where="--max-frames", next="--max-frames 256"
        )
    if args.holdout is not None and args.data is None:
        raise ConfigError(expected="the data to split", found="no --data", where="--holdout", next="add --data PATH")
    if args.suite is None:
        _open_loop(args)
    else:
        _suite(args)


def _open_loop(args: _Eval) -> None:
    device = args.start()

    from manipi.data.action_error import evenly_spaced
    from manipi.data.dataset import command_units, label
    from manipi.evaluate.open_loop import new_split, open_split, plot_chunks, predict, score
    from manipi.evaluate.policies import run_folder
    from manipi.policy import Policy

    checkpoint = Path(args.policy)
    policy = Policy.load(checkpoint, device=device)
    if args.data is not None and args.holdout is not None:
        split = new_split(policy, args.data, holdout=args.holdout, seed=args.seed)
    else:
        split = open_split(checkpoint, policy, args.data)
    run, results = run_folder(checkpoint), {}
    plot = args.plot or (run and run / f"open_loop_{policy.config.step}.png")
    sides = {"held-out": split.held_out_rows} | ({} if args.holdout_only else {"training": split.train_rows})
    print(f"{split.dataset.name}, split: {split.origin}")
    for side, rows in sides.items():
        predictions = predict(policy, split.dataset, evenly_spaced(rows, args.max_frames), split.train_rows)
        result = results[side] = score(predictions, split.dataset, policy.robot, split.train_rows)
        print(f"\n{side}: {result.frames} frames of {result.episodes} episodes; mean absolute error as % of the travel")
        summary = [
            (name, 100 * e.share_of_travel, 100 * float(e.per_step[0]), 100 * float(e.per_step[-1]))
            for name, e in result.errors.items()
        ]
        print(table(summary, ("", "all steps", "first step", f"step {len(result.errors['policy'].per_step)}")))
        if side == "held-out" and plot:
            plot_chunks(predictions, split.dataset, policy.robot, result, plot)
    held_out, units = results["held-out"], command_units(policy.robot)
    moving = [d for d, travel in enumerate(held_out.travel) if travel > 0]
    print(f"\nheld-out, in the robot's own units; {len(moving)} of {len(held_out.travel)} dimensions travel at all")
    columns = [held_out.travel, *(e.per_dimension for e in held_out.errors.values())]
    rows = [(label(held_out.dimensions[d], units[d]), *(float(column[d]) for column in columns)) for d in moving]
    print(table(rows, ("dimension", "travel", *held_out.errors)))
    print(f"\n{held_out.verdict()}")
    print(f"plot  {plot}" if plot else "no plot: the checkpoint stands apart from its run, and there is no --plot")
    write_result({"split": split.origin, **results}, args.json)


def _suite(args: _Eval) -> None:
    from manipi.evaluate.evaluation import Evaluation, Settings, require
    from manipi.evaluate.policies import open_policy
    from manipi.evaluate.report import write_evaluation
    from manipi.evaluate.statistics import SuccessRate
    from manipi.evaluate.suites import find_suite

    suite = find_suite(args.suite or "")
    controls = [name for name in ("untrained", "blind", "wrong_words", "held", "replay") if getattr(args, name)]
    if len(controls) > 1:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in controls)
        raise ConfigError(expected="one control at a time", found=flags, where="manipi eval", next="run it for each")
    require("--workers", args.workers, args.workers >= 0, "a number of worker processes, from 0", "2")
    require("--max-batch", args.max_batch, args.max_batch >= 1, "an observation or more", "1")
    require("--films", args.films, args.films >= 0, "a number of films, from 0", "8")
    chosen = {
        "trials": suite.trials if args.trials is None else args.trials,
        "seed": args.seed,
        "execute_steps": suite.execute_steps if args.execute_steps is None else args.execute_steps,
        "control": controls[0] if controls else None,
        **{name: getattr(args, name) for name in ("join", "delay", "num_steps", "temperature", "mode")},
        **{name: getattr(args, name) for name in ("subtask_every", "candidates", "selector", "gate")},
    }
    swept = [(one, Settings(**{**chosen, **one})) for one in _swept(args.sweep)]
    results = []
    server = {"device": args.device, "threads": args.num_threads or 1, "max_batch": args.max_batch}
    if args.host != "127.0.0.1":
        os.environ.setdefault("MANIPI_TOKEN", secrets.token_urlsafe())  # for the server, and for those that ask it
    own = args.selector if args.selector and ":" in args.selector else None
    with open_policy(args.policy, **server, untrained=args.untrained, host=args.host, selector=own) as opened:
        for one, settings in swept:
            folder = args.dir or opened.folder(suite, settings)
            if args.dir and args.sweep:
                folder = args.dir / "_".join(f"{key}_{value}" for key, value in one.items())
            named = {"policy": opened.name, "server": opened.server, "workers": args.workers, "ray": args.ray}
            with Evaluation(folder, suite, settings, opened.url, **named) as evaluation:
                evaluation.run()
                opened.require_unchanged()
                results.append(evaluation.finish())
                page, films = folder / "report.html", evaluation.films(args.films)
                write_evaluation(page, results[-1], films, fps=evaluation.metadata.get("control_hz", 10.0))
            rate = {key: value for key, value in results[-1]["success"].items() if key != "type"}
            print(f"{suite.name}{''.join(f', {k} {v}' for k, v in one.items())}: {SuccessRate(**rate)}")
            if batched := results[-1]["batched_trials"]:
                print(
                    f"{batched} trials had answers that were computed together with others', which rounds differently:"
                    "\nmanipi compare with the result of the same command without --max-batch says what that changed"
                )
            print(f"result  {folder / 'result.json'}\npage    {page}")
    if args.sweep is not None:
        _compare_settings([", ".join(f"{key} {value}" for key, value in one.items()) for one, _ in swept], results)
    write_result(results if args.sweep else results[0], args.json)


def _compare_settings(names: Sequence[str], results: Sequence[Mapping[str, Any]]) -> None:
    """Print a row for each setting, and how each differs from the first on the same scenes."""
    from manipi.evaluate.compare import compare_results, read_side_of
    from manipi.evaluate.statistics import ALPHA

    def worst(trial: Mapping[str, Any], key: str) -> float | None:
        """Of the first three dimensions: a gripper behind them has another unit. None where there is no number."""
        value = trial[key] if isinstance(trial[key], list) else [trial[key]]
        return max((one for one in value[:3] if one is not None), default=None)

    def over(trials: Sequence[Mapping[str, Any]], key: str, reduce: Callable[[Sequence[float]], float]) -> float:
        known = [one for trial in trials if (one := worst(trial, key)) is not None]
        return float(reduce(known)) if known else math.nan

    rows = []
    for name, result in zip(names, results, strict=True):
        trials, s = result["trials"], result["success"]
        motion = (over(trials, "seam_jump", max), over(trials, "step_change", fmean), over(trials, "jerk", fmean))
        counts = (sum(trial["starved"] for trial in trials), sum(trial["seams"] for trial in trials))
        rates, seconds = (s["rate"], s["low"], s["high"]), fmean(trial["seconds"] for trial in trials)
        rows.append((name, s["k"], s["n"], *rates, seconds, *counts, *motion))
    print()
    print(table(rows, ("", "k", "n", "rate", "low", "high", "s", "starved", "seams", "jump", "change", "jerk")))
    print(
        "\ns: an episode on the robot's clock; low, high: 95 % interval; jump: the largest change of a command at a"
        "\nseam, change: the mean one within a chunk, both of the worst of the first three dimensions; jerk: the mean"
        "\nthird difference without grippers"
    )
    first, *others = (replace(read_side_of(result), name=name) for name, result in zip(names, results, strict=True))
    for other in others:
        found = compare_results(other, first, margin=MARGIN, alpha=ALPHA / len(others))
        print(f"\n{other.name} (A) beside {first.name} (B)\n{found.sentence(MARGIN)}")


def _swept(sweep: str | None) -> list[dict[str, Any]]:
    """`delay=1,2` -> [{"delay": 1}, {"delay": 2}]; None: one set of nothing."""
    if sweep is None:
        return [{}]
    name, _, values = sweep.partition("=")
    try:
        return [{name: SWEPT[name](value)} for value in values.split(",")]
    except (KeyError, ValueError):
        raise ConfigError(
            expected=f"one of {', '.join(SWEPT)}, an equals sign, and values between commas",
            found=sweep,
            where="--sweep",
            next="--sweep execute_steps=4,8",
        ) from None
