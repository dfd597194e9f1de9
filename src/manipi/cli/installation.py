"""`manipi doctor` and `recipes`: what this machine and this installation have."""

import importlib.metadata
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import manipi
from manipi.cli.arguments import NewFile, parse, table, write_result
from manipi.errors import ManipiError
from manipi.recipes.registry import load_recipe, recipe_names
from manipi.weights.released import CHECKPOINTS

PURPOSES = {
    "cloud": "checkpoints and data in gs:// and s3://",
    "convert": "manipi convert of HDF5 and Zarr",
    "demo": "the simulated arm of manipi demo",
    "low-bit": "moments of 8 bits, frozen weights of 4",
    "openpi": "openpi's Orbax checkpoints",
    "ray": "--ray of manipi stats, eval, convert, check",
    "tensorboard": "manipi train --log.tensorboard",
    "view": "manipi view --rerun",
    "wandb": "manipi train --log.wandb",
}
"""What the package's extras are for; which there are, and what they need, its metadata say."""
CODECS: dict[str, Literal["r", "w"]] = {"h264": "r", "av1": "r", "libx264": "w"}
_REQUIREMENT = re.compile(r"([\w.-]+)(?:\[[^]]*\])?([^;]*)(?:;.*extra == ['\"]([\w-]+)['\"])?")
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


@dataclass(frozen=True, kw_only=True)
class _Doctor:
    """Say what this machine and this installation can do, and what to run where something is absent.

    manipi doctor

    manipi doctor --json doctor.json    for a bug report
    """

    json: NewFile | None = None
    """Write the answers to this file."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One line of the doctor's."""

    topic: str
    ok: bool
    found: str
    next: str = ""
    """What to run where it is absent."""


def run_doctor(arguments: Sequence[str]) -> None:
    """Print one line per answer."""
    args = parse(_Doctor, arguments, "doctor")
    answers = [*_machine(), *_torch(), *_codecs(), *_packages()]
    rows = [("ok" if a.ok else "absent", a.topic, a.found + (f"   → {a.next}" if a.next else "")) for a in answers]
    print(table(rows))
    write_result(answers, args.json)


def _machine() -> Iterator[Answer]:
    yield Answer(topic="manipi", ok=True, found=manipi.__version__)
    yield Answer(topic="python", ok=True, found=f"{platform.python_version()}  {sys.executable}")
    yield Answer(topic="platform", ok=True, found=platform.platform())
    info = Path("/proc/cpuinfo")  # Linux; its flags are those of x86
    lines = info.read_text().splitlines() if info.exists() else []
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    shown = "  ".join(f"{'' if flag in flags else 'no '}{flag}" for flag in CPU_FLAGS) if flags else "flags unknown"
    yield Answer(topic="processor", ok=True, found=f"{os.cpu_count()} cores  {shown}")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    yield Answer(topic="memory", ok=True, found=f"{memory / 2**30:.1f} GiB")
    folder = Path.cwd()
    free, writable = shutil.disk_usage(folder).free, os.access(folder, os.W_OK)
    found = f"{free / 2**30:.1f} GiB free in {folder}" + ("" if writable else ", which cannot be written")
    advice = "" if writable else "change to a folder of yours: runs are written below the current one"
    yield Answer(topic="disk", ok=writable, found=found, next=advice)


def _torch() -> Iterator[Answer]:
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Answer(topic="torch", ok=False, found=f"cannot be imported: {error}", next="pip install --upgrade torch")
        return
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for processors only"
    yield Answer(topic="torch", ok=True, found=f"{torch.__version__} {built}, {torch.get_num_threads()} threads")
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        name = f"{device.name}, {device.total_memory / 2**30:.0f} GiB, compute {device.major}.{device.minor}"
        yield Answer(topic=f"cuda:{i}", ok=True, found=name)
    if not torch.cuda.is_available():
        found = "no device: tiny policies train and serve on the processor, released ones need a GPU"
        next = "nvidia-smi" if torch.version.cuda else "on a machine with a GPU: install a CUDA build of torch"
        yield Answer(topic="cuda", ok=False, found=found, next=next)


def _codecs() -> Iterator[Answer]:
    import av
    from av.codec import Codec
    from av.codec.codec import UnknownCodecError

    ffmpeg = ".".join(map(str, av.library_versions["libavcodec"]))
    yield Answer(topic="video", ok=True, found=f"PyAV {av.__version__}, libavcodec {ffmpeg}")
    for name, mode in CODECS.items():
        action = "decode" if mode == "r" else "encode"
        try:
            yield Answer(topic="video", ok=True, found=f"{action} {name}  ({Codec(name, mode).name})")
        except UnknownCodecError:
            yield Answer(topic="video", ok=False, found=f"{action} {name}", next="pip install --upgrade av")


def _packages() -> Iterator[Answer]:
    """Every package that this one needs, always or for an extra, as the metadata of its installation say."""
    try:
        requirements = importlib.metadata.requires("manipi") or []
    except importlib.metadata.PackageNotFoundError:
        yield Answer(topic="packages", ok=False, found="manipi is not installed as a package", next="pip install -e .")
        return
    for requirement in requirements:
        match = _REQUIREMENT.match(requirement)
        assert match, f"a requirement that the doctor cannot read: {requirement}"
        name, bounds, extra = match.groups()
        if extra == "dev":
            continue
        purpose = f"{PURPOSES.get(extra, '')} ({extra})" if extra else "always needed"
        install = f"pip install 'manipi[{extra}]'" if extra else "pip install --upgrade manipi"
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Answer(topic=name, ok=False, found=purpose, next=install)
            continue
        if all(_within(version, bound) for bound in bounds.strip().split(",") if bound):
            yield Answer(topic=name, ok=True, found=f"{version}  {purpose}")
        else:
            found = f"{version}, needed is {bounds.strip()}: {purpose}"
            yield Answer(topic=name, ok=False, found=found, next=install)


def _within(version: str, bound: str) -> bool:
    """Whether "1.2.3" is within ">=1.2" or "<2", which are all that our metadata state."""
    least = [int(number) for number in re.findall(r"\d+", bound)]
    found = [*map(int, re.findall(r"\d+", version)), *[0] * len(least)][: len(least)]
    return found < least if bound.startswith("<") else found >= least


@dataclass(frozen=True, kw_only=True)
class _Recipes:
    """List the recipes. A recipe of your own needs no place here: name it as path/to/file.py:function.

    manipi recipes

    manipi inspect tabletop    what one of them does to its first frame

    manipi train tabletop --help    its numbers
    """

    json: NewFile | None = None
    """Write the list to this file."""


def run_recipes(arguments: Sequence[str]) -> None:
    """Print the table. Raises the first error of the recipes that cannot be used, which are in it too."""
    args = parse(_Recipes, arguments, "recipes")
    header = ("recipe", "model", "robot", "dataset", "init", "steps", "batch")
    rows, unusable = [], list[ManipiError]()
    for name in recipe_names():
        try:
            config = load_recipe(name)
        except ManipiError as error:
            unusable.append(error)
            rows.append((name, "cannot be used", *["–"] * 5))
            continue
        model = type(config.model).__name__.removesuffix("Config")
        datasets = " + ".join(
            one.path if one.weight == 1 else f"{one.weight:g} {one.path}" for one in config.data.datasets
        )
        init = config.init.removeprefix(f"{CHECKPOINTS}/") or "–"
        rows.append((name, model, config.robot.name, datasets or "–", init, config.steps, config.batch_size))
    print(table(rows, header))
    write_result([dict(zip(header, row, strict=True)) for row in rows], args.json)
    if unusable:
        raise unusable[0]
