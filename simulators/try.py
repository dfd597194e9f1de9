"""What `make sim-NAME` does: tries the simulator by itself, then the whole loop with policies of random weights.

python simulators/try.py metaworld|libero|aloha

A policy that was never trained succeeds by chance at most: what is tried is that everything fits together.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
TRIED = {
    "metaworld": ("reach", ("pi05_metaworld", "pi0_metaworld", "pi0_fast_metaworld"), "metaworld/recipe.py"),
    "libero": ("light", ("pi0_libero", "pi05_libero"), "small.py"),
    "aloha": ("light", ("pi0_aloha_sim",), "small.py"),
}
"""Per simulator: a suite, the recipes whose policies drive it, and the recipes' file."""


def run(*command: object) -> None:
    print(f"\n$ {' '.join(map(str, command))}", flush=True)
    subprocess.run([str(part) for part in command], check=True)


def main(name: str) -> None:
    suite, recipes, file = TRIED[name]
    described = json.loads((FOLDER / name / "suite.json").read_text())
    of_suite = {**described, **described["suites"][suite]}
    python, factory = FOLDER / name / ".venv/bin/python", FOLDER / name / described["factory"]
    options = json.dumps(of_suite["options"])
    run(python, "-m", "manipi_client.trials", factory, "--options", options, "--try", *of_suite["tasks"])
    rows = []
    with tempfile.TemporaryDirectory(prefix="manipi-try-") as folder:
        for recipe in recipes:
            checkpoint = Path(folder) / recipe / "0"
            run(sys.executable, "-m", "manipi", "init", f"{FOLDER / file}:{recipe}", checkpoint)
            rows.append(evaluate(checkpoint, f"{name}/{suite}", recipe))
        if name == "metaworld":  # the one with an expert
            rows.append(evaluate(checkpoint, f"{name}/{suite}", "another scene's demonstration", "--replay"))
    print(f"\n{name}/{suite}: the loop is whole\n{'':32}success   steps of each trial   ms from observation to answer")
    for label, result in rows:
        success, steps = result["success"], ", ".join(str(trial["steps"]) for trial in result["trials"])
        latency = result["latency_ms"]["p50"]
        print(f"{label:32}{success['k']} of {success['n']}    {steps:22}{'' if latency is None else f'{latency:.1f}'}")


def evaluate(checkpoint: Path, suite: str, label: str, *flags: str) -> tuple[str, dict]:
    folder = checkpoint.parent / f"evaluation{''.join(flags)}"
    settings = ("--trials", 2, "--films", 1, "--dir", folder, "--num-threads", 1, *flags)
    run(sys.executable, "-m", "manipi", "eval", checkpoint, "--suite", suite, *settings)
    return label, json.loads((folder / "result.json").read_text())


if __name__ == "__main__":
    main(*sys.argv[1:])
