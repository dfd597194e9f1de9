"""How far MetaWorld's experts come without seeing the scene: what a task's random positions are worth.

    simulators/metaworld/.venv/bin/python simulators/metaworld/blind.py [TASK …]

Each expert runs twice on every scene: as it is, and with its object and goal seen where they are on average (its own
pose stays true, so it feels what stops it). A task whose second number is high can be done from memory, and a policy
that learned it has shown little. Prints a table; no picture is rendered.
"""

import sys

import numpy as np
from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE as WORLDS
from metaworld.policies import ENV_POLICY_MAP

SCENES, STEPS, SEED = 100, 200, 1


def survey(task, scenes=SCENES):
    """Successes of the seeing and of the blind expert, mean steps of the first, spread of object and goal in metres."""
    env = WORLDS[f"{task}-goal-observable"](seed=0)
    env._freeze_rand_vec, env.seeded_rand_vec, env.max_path_length = False, True, STEPS + 1

    def begin(scene):
        env.seed(SEED * 1_000_000 + scene)
        return env.reset()[0]

    starts = np.array([begin(scene) for scene in range(scenes)])
    spread = np.ptp(starts, axis=0)
    wins, blind, steps = [], [], []
    for scene in range(scenes):
        for offset, outcomes in ((np.zeros_like(starts[0]), wins), (starts.mean(0) - starts[scene], blind)):
            seen, expert = begin(scene), ENV_POLICY_MAP[task]()
            offset = np.concatenate([np.zeros(4), offset[4:18], np.zeros(18), offset[36:]])
            success = False
            for step in range(STEPS):  # noqa: B007 - the last one is read below
                seen, *_, info = env.step(np.clip(expert.get_action(seen + offset), -1, 1).astype(np.float32))
                if success := bool(info["success"]):
                    break
            outcomes.append(success)
            if outcomes is wins and success:
                steps.append(step + 1)
    return sum(wins), sum(blind), np.mean(steps) if steps else np.nan, spread[4:7], spread[36:39]


if __name__ == "__main__":
    print(f"{'task':26}{'expert':>8}{'blind':>7}{'steps':>7}   object x y z (m)    goal x y z (m)")
    for task in sys.argv[1:] or sorted(ENV_POLICY_MAP):
        wins, blind, steps, thing, goal = survey(task)
        where = "  ".join(" ".join(f"{value:.2f}" for value in one) for one in (thing, goal))
        print(f"{task:26}{wins:5}/{SCENES}{blind:7}{steps:7.0f}   {where}", flush=True)
