"""`manipi doctor`: what this machine and this installation can do."""

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import manipi
from manipi.cli.arguments import NewFile, parse
from manipi.cli.result import table, write_result

OPTIONAL = {
    "mujoco": ("the simulated arm of manipi demo", "pip install 'manipi[demo]'"),
    "gymnasium": ("the simulated arm of manipi demo", "pip install 'manipi[demo]'"),
    "matplotlib": ("loss curves and reports", "pip install 'manipi[demo]'"),
    "tensorstore": ("openpi's Orbax checkpoints", "pip install tensorstore"),
    "torchao": ("moments of 8 bits", "pip install 'manipi[low-bit]'"),
    "bitsandbytes": ("frozen weights of 4 bits", "pip install 'manipi[low-bit]'"),
    "torchcodec": ("video decoding on the GPU", "pip install torchcodec"),
}
CODECS: dict[str, Literal["r", "w"]] = {"h264": "r", "av1": "r", "libx264": "w"}
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


def main(arguments: Sequence[str]) -> None:
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
    flags = _cpu_flags()
    shown = "  ".join(f"{'' if flag in flags else 'no '}{flag}" for flag in CPU_FLAGS) if flags else "flags unknown"
    yield Answer(topic="processor", ok=True, found=f"{os.cpu_count()} cores  {shown}")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    yield Answer(topic="memory", ok=True, found=f"{memory / 2**30:.1f} GiB")
    folder = Path.cwd()
    free, writable = shutil.disk_usage(folder).free, os.access(folder, os.W_OK)
    found = f"{free / 2**30:.1f} GiB free in {folder}" + ("" if writable else ", which cannot be written")
    next = "" if writable else "change to a folder of yours: runs are written below the current one"
    yield Answer(topic="disk", ok=writable, found=found, next=next)


def _cpu_flags() -> set[str]:
    """As Linux states them on x86; empty elsewhere."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return set(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


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
    for name, (purpose, install) in OPTIONAL.items():
        try:
            yield Answer(topic=name, ok=True, found=f"{importlib.metadata.version(name)}  {purpose}")
        except importlib.metadata.PackageNotFoundError:
            yield Answer(topic=name, ok=False, found=purpose, next=install)
