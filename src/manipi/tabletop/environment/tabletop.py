"""The gymnasium environment: an arm over a table with coloured blocks and a tray.

    seen from above                     y
                                        ^
       ┌────────────────────────────────┼─────────┐
       │    ○ arm (0, 0)     ■          │         │
       │                ┌──────┐   ■              │      x ->
       │                │ tray │                  │
       │                └──────┘      ■           │
       └──────────────────────────────────────────┘

The arm and the fingers' slides follow position actuators; gravity does not pull on the arm, so that a commanded
pose is held without a steady error. Only the fingers, the palm, the blocks and the table collide. Their sizes are in
`scene`.
"""

# MuJoCo's bindings are compiled and come without stubs.
# pyright: reportAttributeAccessIssue=false

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import gymnasium
import mujoco
import numpy as np
from jaxtyping import Float32, UInt8

from manipi.errors import ConfigError, unknown_name
from manipi.tabletop.environment.render import Look, Renderer
from manipi.tabletop.environment.scene import (
    BLOCK_HALF,
    COLORS,
    FINGER_TRAVEL,
    IMAGE_VIEW,
    PAIRED_COLORS,
    PAIRED_SHAPES,
    SHAPES,
    TIMESTEP,
    TRAY_CENTER,
    TRAY_HALF,
    UNSEEN_PAIRS,
    build_scene,
    camera_axes,
    inverse,
)

Task: TypeAlias = Literal["reach", "push", "two_step"]

INSTRUCTIONS: dict[Task, str] = {
    "reach": "reach the {}",
    "push": "push the {} to the tray",
    "two_step": "push the {} to the tray, then touch the {} one",
}
SUBTASKS: dict[Task, str] = {"reach": "touch the {}", "push": "push the {} to the tray"}
"""What the steps of `two_step` are called."""
WORDINGS = (
    "touch the {}",
    "reach to the {}",
    "move to the {}",
    "go to the {}",
    "tap the {}",
    "move the hand to the {}",
    "move the gripper to the {}",
)
"""Other instructions for `reach`, each within the 20 tokens that the demo's policy reads."""

Perturbation: TypeAlias = Literal["light", "camera", "background", "start", "noise", "distractors", "wording"]
PERTURBATIONS: dict[Perturbation, str] = {
    "light": "the lamp stands elsewhere, is dimmer or brighter, and a little coloured",
    "camera": "the outside camera stands up to 3 cm elsewhere, nearer or farther, and looks a little beside",
    "background": "table, tray and what lies behind have somewhat other colours",
    "start": "the arm starts 5 cm or more outside the space that it works in",
    "noise": "pictures and measured position are noisy",
    "distractors": "three more objects of other colours and shapes",
    "wording": "the instruction is said in other words",
}
"""What may differ from the demonstrations; the families of LIBERO-Plus (arXiv 2510.13626). How far is chosen so that
the demo's policy, which has seen none of it, succeeds in 60 to 85 % of the scenes: people would hardly see it."""
PICTURE_NOISE, STATE_NOISE = 32.0, 0.013
"""Standard deviations of `noise`: of a pixel's values in [0, 255], and of the measured position, metres."""

BACKGROUND_CHANGE = 0.17
"""How far `background` takes colours from what they are to others that are drawn from nearly all there are."""

WORKSPACE_LOW = np.array([0.16, -0.20, 0.02])
WORKSPACE_HIGH = np.array([0.50, 0.20, 0.20])
"""Where the tip may go, metres in the table frame; commands outside are clipped."""

CONTROL_HZ = 10
MAX_STEP = 0.03
"""The tip is commanded to at most this far from where it is, metres per control step (0.3 m/s)."""

TOUCH_RADIUS = 0.04
TOUCH_HEIGHT = 0.06
"""The tip touches a block when it is within this radius of the block's centre, seen from above, and at or below this
height (a block's top is at 0.045 m). Blocks start far enough apart for these regions not to overlap."""

BLOCK_SPACING = 0.10
"""The least distance between the centres of two blocks at the start, metres."""

MAX_BLOCKS = 4
CROWD_SPACING = 0.085
"""The same on a table without a tray, where blocks may lie closer and everywhere: all of `COLORS` fit."""

_BLOCK_LOW, _BLOCK_HIGH = np.array([0.22, -0.14]), np.array([0.44, 0.14])
_START_LOW = np.array([0.18, -0.18, 0.03])
_CLEARANCE, _CLEAR_HEIGHT = 0.07, 0.10
"""A start this close to a block, seen from above, is lifted to this height, metres."""
_HOME = np.array([0.26, 0.0, 0.16])
_SUBSTEPS = round(1 / (CONTROL_HZ * TIMESTEP))
_RAMP = 0.6
"""The joint targets reach their goal after this part of a control step; the rest lets the arm settle."""


def noun(block: str) -> str:
    """What an instruction calls a block: `red` is the red block, `red ball` the red ball."""
    return block if " " in block else f"{block} block"


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What an episode is judged by, and what the prompt says; they differ only when a test of the prompt wants it."""

    task: Task
    target: str
    instruct: str
    then: str = ""
    """Of `two_step`: the block to touch after the push."""
    instruct_then: str = ""
    wording: str = ""
    """Instruction, with a {} for the block; empty: the task's."""

    @property
    def prompt(self) -> str:
        return (self.wording or INSTRUCTIONS[self.task]).format(noun(self.instruct), self.instruct_then)

    @property
    def steps(self) -> tuple[tuple[Task, str], ...]:
        """A task and its block for each step, in order."""
        return (("push", self.target), ("reach", self.then)) if self.then else ((self.task, self.target),)


class Tabletop(gymnasium.Env[dict[str, Any], np.ndarray]):
    """Reach or push one of several coloured blocks, 10 control steps per second.

    Observation: `observation/<camera>` uint8 [size, size, 3] for each of `cameras`; `observation/state` float32 [4],
    the tip's x, y, z in metres and the gripper's opening in [0, 1]; `prompt`, the instruction.

    Action: float32 [4], absolute: where the tip shall be (x, y, z in metres) and the gripper's opening in [0, 1]. It is
    clipped to the workspace; the tip moves at most `MAX_STEP` towards it.

    Tasks:
        reach: succeeds when the first block that the tip touches is the target, fails at once when it is another.
        push: succeeds when the target's centre is inside the tray.
        two_step: a push, and then the first other block that the tip touches must be the one named second.
    All fail after `max_steps`. The reward is 1 in the step that succeeds, else 0.

    `info` holds: success; failure (`None`, `"wrong_block"` or `"max_steps"`); task; target and subtask, the block and
    the words of the present step; touched (the first block that the tip touched in this step, or `None`); joints
    float32 [4], radians; blocks (name -> its centre, [3]). A block's name is its colour, and its shape where shapes
    differ: "red", "red ball".

    Args:
        image_size: side of the square pictures, pixels.
        cameras: which of `image` (outside) and `wrist_image` to render; one that is absent costs nothing.
        tasks: what an episode may ask for.
        colors: one block for each, names of `COLORS`, with one of `SHAPES` ("red ball") where it is no cube.
        named: how many of these, the first ones, may be asked for; 0: all.
        near: how far from the tray's centre, in x or y, blocks may start, metres; None: anywhere.
        max_steps: the longest episode.
        start_noise: 0 starts the tip at home, 1 anywhere over the table, in between that part of the way.
        randomize: draws lamp, brightness, table colour and a small camera displacement for each episode.
        shadows: pictures with shadows, which double the cost of rendering.
        tray: False: there is none, blocks lie everywhere and closer, and up to 6 fit.
        pairs: `seen` or `unseen`: instead of `colors`, the target is one of these pairs of colour and shape; there is
            one other block, of a seen pair, which has its colour or its shape or, beside a seen target, neither.
        hide_after: the target cannot be seen any more after this many steps; it still is where it is.
        lock: the arm does not move for a number of steps that is drawn for each episode, at most this.
        perturb: what differs from the demonstrations, one of `PERTURBATIONS`.
        render_mode: `"rgb_array"` for `render()`.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": CONTROL_HZ}  # noqa: RUF012 (gymnasium's name and type)
    control_hz = CONTROL_HZ

    def __init__(
        self,
        *,
        image_size: int = 64,
        cameras: Sequence[str] = ("image",),
        tasks: Sequence[Task] = ("reach",),
        colors: Sequence[str] = ("red", "green", "blue"),
        named: int = 0,
        near: float | None = None,
        max_steps: int = 60,
        start_noise: float = 0.3,
        randomize: bool = False,
        shadows: bool = False,
        tray: bool = True,
        pairs: Literal["seen", "unseen"] | None = None,
        hide_after: int | None = None,
        lock: int = 0,
        perturb: Perturbation | None = None,
        render_mode: str | None = None,
    ):
        _check_names("camera", cameras, ("image", "wrist_image"))
        _check_names("task", tasks, INSTRUCTIONS)
        _check_names("block colour", [color.partition(" ")[0] for color in colors], COLORS)
        _check_names("block shape", [block.partition(" ")[2] for block in colors if " " in block], SHAPES)
        _check_names("pairs", () if pairs is None else (pairs,), ("seen", "unseen"))
        _check_names("perturbation", () if perturb is None else (perturb,), PERTURBATIONS)
        most, fewest = MAX_BLOCKS if tray else len(COLORS), 2 if "two_step" in tasks else 1
        if tuple(tasks) != ("reach",) and (not tray or pairs or perturb == "wording"):
            raise ConfigError(
                expected="the task reach alone, without a tray, with pairs, or in other words",
                found=f"{tuple(tasks)}",
                where="Tabletop(tasks=...)",
                next='tasks=("reach",)',
            )
        if not fewest <= len(colors) == len(set(colors)) <= most:
            raise ConfigError(
                expected=f"{fewest} to {most} different block colours, as many as fit on the table",
                found=f"{tuple(colors)}",
                where="Tabletop(colors=...)",
                next="name each colour once, and fewer of them",
            )
        _check_near(near, len(colors))
        self.image_size, self.cameras, self.tasks, self.colors = image_size, tuple(cameras), tuple(tasks), tuple(colors)
        self._named, self._near = self.colors[:named], near
        self.max_steps, self.start_noise, self.randomize, self.shadows = max_steps, start_noise, randomize, shadows
        self.tray, self.pairs, self.hide_after, self.lock, self.perturb = tray, pairs, hide_after, lock, perturb
        self.render_mode = render_mode
        self._renderers: dict[int, Renderer] = {}
        self._put(self.colors)
        low, high = np.append(WORKSPACE_LOW, 0).astype(np.float32), np.append(WORKSPACE_HIGH, 1).astype(np.float32)
        picture = gymnasium.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        observations: dict[str, gymnasium.Space[Any]] = {f"observation/{camera}": picture for camera in self.cameras}
        # The measured tip may overshoot the workspace by the servo's error, hence the wider bounds.
        observations["observation/state"] = gymnasium.spaces.Box(low - 0.1, high + 0.1, dtype=np.float32)
        observations["prompt"] = gymnasium.spaces.Text(64, charset=f"{string.ascii_lowercase} ,")
        self.observation_space = gymnasium.spaces.Dict(observations)
        self.action_space = gymnasium.spaces.Box(low, high, dtype=np.float32)
        self._look = Look()

    def _put(self, names: Sequence[str]) -> None:
        """Builds the scene with these blocks."""
        self.names = tuple(names)
        self.model = build_scene(self.names)
        self.data = mujoco.MjData(self.model)
        self.model.geom("tray").rgba[3] = float(self.tray)  # rays pass through what is transparent
        self._pristine = self.model.geom_rgba.copy(), self.model.cam_pos.copy(), self.model.cam_quat.copy()
        self._renderers.clear()

    # ---- the episode

    def reset(self, *, seed: int | None = None, options: Mapping[str, Any] | None = None) -> tuple[dict, dict]:
        """Starts an episode that `seed` determines completely, except for what `options` names.

        Options: `task`; `target`, the colour that the episode is judged by; `instruct`, the colour that the prompt
        names instead (default: the target); `blocks`, colour -> (x, y) in metres; `tip`, its start (x, y, z), which is
        clipped to the workspace.
        """
        super().reset(seed=seed)
        options = dict(options or {})
        _check_names("reset option", options, ("task", "target", "instruct", "blocks", "tip"))
        # Every draw happens whatever the options say, so that an option changes nothing but what it names; and those of
        # the harder scenes have a generator of their own, so that they change nothing of what all scenes have.
        rng = self.np_random
        more = rng.spawn(1)[0]
        names = self._draw_blocks(more)
        if names != self.names:
            self._put(names)
        self.model.geom_rgba[:], self.model.cam_pos[:], self.model.cam_quat[:] = self._pristine
        task = options.get("task", self.tasks[rng.integers(len(self.tasks))])
        known = self._named or self.colors
        drawn = known[rng.integers(len(known))]
        target = options.get("target", self.names[0] if self.pairs else drawn)
        _check_names("task", (task,), INSTRUCTIONS)
        then = str(more.choice([name for name in self.names if name != target])) if task == "two_step" else ""
        wording = str(more.choice(WORDINGS)) if self.perturb == "wording" else ""
        if self.pairs == "seen":
            wording = self._part_of(target, more)
        instruct = options.get("instruct", target)
        self.goal = Goal(task=task, target=target, instruct=instruct, then=then, instruct_then=then, wording=wording)
        _check_names("block colour", (target, self.goal.instruct, *options.get("blocks", ())), self.names)
        start = rng.uniform(_START_LOW, WORKSPACE_HIGH - 0.02)
        tip = np.asarray(options.get("tip", _HOME + self.start_noise * (start - _HOME)), np.float64)
        spacing = BLOCK_SPACING if self.tray else CROWD_SPACING
        while True:  # until the blocks are off the tray and apart from each other
            positions = rng.uniform(_BLOCK_LOW, _BLOCK_HIGH, (2 if self.pairs else len(self.colors), 2))
            gaps = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
            apart = gaps[np.triu_indices(len(positions), 1)] >= spacing
            off = np.abs(positions - TRAY_CENTER).max(axis=1)
            clear = (off >= TRAY_HALF + 1.5 * BLOCK_HALF) & (off <= (self._near or np.inf))
            if apart.all() and (clear.all() or not self.tray):
                break
        while len(positions) < len(self.names):
            place = more.uniform(_BLOCK_LOW - 0.03, _BLOCK_HIGH + 0.03)
            if np.linalg.norm(positions - place, axis=1).min() >= CROWD_SPACING:
                positions = np.vstack([positions, place])
        if "tip" not in options and np.linalg.norm(positions - tip[:2], axis=1).min() < _CLEARANCE:
            tip[2] = max(tip[2], _CLEAR_HEIGHT)
        if self.randomize:
            (colors, cameras, _), table = self._pristine, self.model.geom("table").id
            self._look = Look(lamp=tuple(Look.lamp + rng.uniform(-0.4, 0.4, 3)), ambient=rng.uniform(0.35, 0.55))
            self.model.geom_rgba[table, :3] = np.clip(colors[table, :3] * rng.uniform(0.75, 1.2), 0, 1)
            self.model.cam_pos[:] = cameras + rng.uniform(-0.01, 0.01, cameras.shape)
        mujoco.mj_resetData(self.model, self.data)
        tip = np.clip(tip, WORKSPACE_LOW, WORKSPACE_HIGH)
        if self.perturb == "start" and "tip" not in options:
            tip = _draw_outside(more)
        self._perturb_pictures(more)
        joints = inverse(tip)
        self.data.qpos[:6] = self.data.ctrl[:] = np.append(joints, np.full(2, rng.uniform() * FINGER_TRAVEL))
        for name, position in {**dict(zip(self.names, positions)), **options.get("blocks", {})}.items():
            self.data.joint(name).qpos[:2] = position
        self._update_poses()
        self._locked, self._noise = int(more.integers(self.lock + 1)), int(more.integers(2**31))
        self.touched: str | None = None
        self.stage = self.steps = 0
        return self.observation(), self._info(False, None)

    def _draw_blocks(self, rng: np.random.Generator) -> tuple[str, ...]:
        """The names of this episode's blocks."""
        if self.perturb == "distractors":
            others = [color for color in COLORS if color not in self.colors][:3]
            return (*self.colors, *(f"{color} {rng.choice(('cylinder', 'ball'))}" for color in others))
        if self.pairs is None:
            return self.colors
        every = [f"{color} {shape}" for color in PAIRED_COLORS for shape in PAIRED_SHAPES]
        seen = [pair for pair in every if pair not in UNSEEN_PAIRS]
        target = str(rng.choice(seen if self.pairs == "seen" else UNSEEN_PAIRS))
        words, others = target.split(), [pair.split() for pair in seen if pair != target]
        # The other one has the colour or the shape; in demonstrations as often neither, which is learned soonest.
        ways = [(True, False), (False, True), *[(False, False)] * (2 if self.pairs == "seen" else 0)]
        fitting = [[" ".join(one) for one in others if tuple(map(str.__eq__, one, words)) == way] for way in ways]
        possible = [some for some in fitting if some]
        return target, str(rng.choice(possible[rng.integers(len(possible))]))

    def _part_of(self, target: str, rng: np.random.Generator) -> str:
        """An instruction with the target's colour, its shape or both, whichever tell it from the other object.

        Without those of one word a small policy learns the pairs that it is shown, and no word by itself.
        """
        (color, shape), (other_color, other_shape) = (name.split() for name in self.names)
        ways = ["", *([f"reach the {color} block"] if color != other_color else [])]
        ways += [f"reach the {shape}"] if shape != other_shape else []
        return ways[rng.integers(len(ways))]

    def _perturb_pictures(self, rng: np.random.Generator) -> None:
        """Lamp, camera or colours of this episode."""
        if self.perturb == "light":
            lamp = tuple(Look.lamp + rng.uniform((-0.7, -0.7, -0.3), (0.5, 0.5, 0.3)))
            ambient, tint = Look.ambient + rng.uniform(-0.2, 0.12), tuple(rng.uniform(0.925, 1.0, 3))
            self._look = Look(lamp=lamp, ambient=ambient, tint=tint)
        elif self.perturb == "camera":
            where, at = IMAGE_VIEW + rng.uniform((-0.03,) * 3, (0.03,) * 3) * [[1.0], [0.1]]
            view, camera = np.array([at + rng.uniform(0.97, 1.045) * (where - at), at]), self.model.camera("image").id
            self.model.cam_pos[camera] = view[0]
            right, up = camera_axes(view)
            axes = np.array([right, up, np.cross(right, up)])
            axes /= np.linalg.norm(axes, axis=1, keepdims=True)
            mujoco.mju_mat2Quat(self.model.cam_quat[camera], axes.T.flatten())
        elif self.perturb == "background":
            for name, low in (("table", 0.2), ("tray", 0.5)):
                color, rgba = rng.uniform(low, 0.95) + rng.uniform(-0.15, 0.15, 3), self.model.geom(name).rgba
                rgba[:3] += BACKGROUND_CHANGE * (np.clip(color, 0.05, 1) - rgba[:3])
            below, above = (
                tuple(np.array(old) + BACKGROUND_CHANGE * (rng.uniform(0, 1, 3) - old))
                for old in (Look.horizon, Look.zenith)
            )
            self._look = Look(horizon=below, zenith=above)

    def another_instruction(self, seed: int) -> Goal:
        """The present goal with an instruction that names other blocks."""
        goal = self.goal
        others = [name for name in (self._named or self.names) if name != goal.target]
        instruct = others[seed % len(others)]
        rest = [name for name in self.names if name not in (instruct, goal.then)]
        wording = goal.wording if "{}" in goal.wording else ""  # words of the target alone say nothing of another
        then = rest[seed % len(rest)] if goal.then else ""
        return replace(goal, instruct=instruct, instruct_then=then, wording=wording)

    def step(self, action: Float32[np.ndarray, "4"]) -> tuple[dict, float, bool, bool, dict]:
        """Moves for one control step. Raises `ConfigError` when the action is not four finite numbers."""
        action = np.asarray(action, np.float64)
        if action.shape != (4,) or not np.isfinite(action).all():
            raise ConfigError(
                expected="an action of 4 finite numbers: x, y, z in metres and the opening",
                found=f"{action!r}",
                where="Tabletop.step",
                next="check the policy's outputs and the robot's action_dim",
            )
        offset = np.clip(action[:3], WORKSPACE_LOW, WORKSPACE_HIGH) - self.tip
        offset *= min(1.0, MAX_STEP / max(float(np.linalg.norm(offset)), 1e-9))
        fingers = np.full(2, np.clip(action[3], 0, 1) * FINGER_TRAVEL)
        goal, start = np.append(inverse(self.tip + offset), fingers), self.data.ctrl.copy()
        if self.steps < self._locked:
            goal = start
        for substep in range(1, _SUBSTEPS + 1):  # the joints follow a straight ramp to the goal, in joint space
            progress = min(1.0, substep / (_RAMP * _SUBSTEPS))
            self.data.ctrl[:] = (1 - progress) * start + progress * goal
            mujoco.mj_step(self.model, self.data)
        self._update_poses()
        self.steps += 1
        (task, target), tip = self.goal.steps[self.stage], self.tip
        if not self.touched and tip[2] <= TOUCH_HEIGHT:
            done = [block for _, block in self.goal.steps[: self.stage]]
            distances = {
                name: float(np.hypot(*(self.block(name) - tip)[:2])) for name in self.names if name not in done
            }
            nearest = min(distances, key=lambda name: distances[name])
            self.touched = nearest if distances[nearest] <= TOUCH_RADIUS else None
        if task == "push":
            offset = self.block(target)[:2] - TRAY_CENTER
            success, wrong = bool(np.abs(offset).max() <= TRAY_HALF), False
        else:
            success = self.touched == target
            wrong = self.touched is not None and not success
        if success and self.stage + 1 < len(self.goal.steps):
            success, self.touched, self.stage = False, None, self.stage + 1
        if self.hide_after is not None and self.steps >= self.hide_after:
            self.model.geom_rgba[self.model.body(self.goal.target).geomadr[0], 3] = 0
        late = not success and not wrong and self.steps >= self.max_steps
        failure = "wrong_block" if wrong else "max_steps" if late else None
        return self.observation(), float(success), success or wrong, late, self._info(success, failure)

    @property
    def subtask(self) -> str:
        """The words for the present step: the instruction, where it has but one."""
        task, target = self.goal.steps[self.stage]
        return SUBTASKS[task].format(noun(target)) if self.goal.then else self.goal.prompt

    def _info(self, success: bool, failure: str | None) -> dict[str, Any]:
        return {
            "success": success,
            "failure": failure,
            "task": self.goal.task,
            "target": self.goal.steps[self.stage][1],
            "subtask": self.subtask,
            "touched": self.touched,
            "joints": self.data.qpos[:4].astype(np.float32),
            "blocks": {name: self.block(name) for name in self.names},
        }

    # ---- what is where

    @property
    def tip(self) -> np.ndarray:
        """The point between the fingertips, [3] metres in the table frame."""
        return self.data.site("tip").xpos.copy()

    def block(self, name: str) -> np.ndarray:
        """The centre of a block, [3] metres in the table frame."""
        return self.data.body(name).xpos.copy()

    @property
    def state(self) -> Float32[np.ndarray, "4"]:
        """The proprioceptive state: the tip's x, y, z in metres, the gripper's opening."""
        opening = self.data.qpos[4:6].mean() / FINGER_TRAVEL
        tip = self.tip
        if self.perturb == "noise":
            tip += STATE_NOISE * np.random.default_rng((self._noise, self.steps)).standard_normal(3)
        return np.array([*tip, np.clip(opening, 0, 1)], np.float32)

    def observation(self) -> dict[str, Any]:
        """What the policy sees now."""
        pictures = {f"observation/{camera}": self.render_camera(camera) for camera in self.cameras}
        return {**pictures, "observation/state": self.state, "prompt": self.goal.prompt}

    # ---- pictures

    def render_camera(self, name: str) -> UInt8[np.ndarray, "size size 3"]:
        """One picture of `image`, `wrist_image` or `studio` in the observation's size."""
        picture = self._cast(name, self.image_size, self.shadows)
        if self.perturb == "noise":  # the same at this step, however often it is looked at
            rng = np.random.default_rng((self._noise, self.steps, *name.encode()))
            noisy = picture + PICTURE_NOISE * rng.standard_normal(picture.shape)
            picture = np.clip(noisy + 0.5, 0, 255).astype(np.uint8)
        return picture

    def render(self, *, camera: str = "studio", size: int = 480) -> UInt8[np.ndarray, "size size 3"]:  # pyright: ignore
        """A picture for people: shadows, and the mean of four rays per pixel."""
        fine = self._cast(camera, 2 * size, True).reshape(size, 2, size, 2, 3)
        return (fine.mean(axis=(1, 3)) + 0.5).astype(np.uint8)

    def _cast(self, camera: str, size: int, shadows: bool) -> np.ndarray:
        if size not in self._renderers:
            self._renderers[size] = Renderer(self.model, height=size, width=size)
        return self._renderers[size].render(self.data, camera, look=self._look, shadows=shadows)

    def _update_poses(self) -> None:
        # mj_step leaves the poses of the moment before its last integration.
        mujoco.mj_kinematics(self.model, self.data)
        mujoco.mj_camlight(self.model, self.data)


def _check_names(kind: str, names: Sequence[str] | Mapping[str, Any], known: Sequence[str] | Mapping[Any, Any]) -> None:
    for name in names:
        if name not in known:
            raise unknown_name(kind, name, known, next=f"choose one of {', '.join(known)}")


def _check_near(near: float | None, blocks: int) -> None:
    """Draws are repeated until all blocks are there: with too little room for them, without end."""
    if near is not None and (near < 0.1 or blocks > 2):
        raise ConfigError(
            expected="two blocks or one, within 0.1 m of the tray's centre or more",
            found=f"{blocks} within {near:g} m",
            where="Tabletop(near=...)",
            next="near=0.11, and fewer colors",
        )


def _draw_outside(rng: np.random.Generator) -> np.ndarray:
    """A point around and above the workspace that the arm can reach."""
    while True:
        tip = rng.uniform((0.10, -0.28, 0.03), (0.54, 0.28, 0.28))
        outside = np.abs(tip - np.clip(tip, WORKSPACE_LOW, WORKSPACE_HIGH)).max()
        if outside >= 0.05 and 0.12 <= np.hypot(*tip[:2]) <= 0.54:
            return tip
