"""The command line: a table of commands; only the one that runs is imported."""

import errno
import io
import os
import sys
from collections.abc import Sequence

import manipi
from manipi.errors import ConfigError, ManipiError, StorageError, shown
from manipi.extensions import entries, find, summary
from manipi_client.errors import ManipiClientError

COMMANDS = {
    "train": ("manipi.cli.train:main", "train a policy: manipi train RECIPE|FILE.py:FUNCTION [--flags]"),
    "plan": ("manipi.cli.train:run_plan", "forecast the memory of a training step, and find settings that fit a GPU"),
    "init": ("manipi.cli.init:main", "write a servable checkpoint with random weights: manipi init RECIPE TARGET"),
    "eval": ("manipi.cli.eval:main", "error on held-out episodes beside baselines, or success in a simulator"),
    "compare": ("manipi.cli.compare:main", "say which of several policies succeeds more often, and how sure that is"),
    "bench": ("manipi.cli.bench:main", "time every stage of an inference call: manipi bench infer RECIPE|CHECKPOINT"),
    "serve": ("manipi.cli.serve:main", "serve a checkpoint over websocket, in openpi's protocol"),
    "demonstrate": ("manipi.cli.demonstrate:main", "record the scripted expert of a suite as a dataset"),
    "record": ("manipi.cli.dataset:run_record", "make a dataset of the episodes that a killed recording left"),
    "replay": ("manipi.cli.dataset:run_replay", "put a recorded run's questions to a checkpoint or a server"),
    "import": ("manipi.cli.exchange:run_import", "make a checkpoint of openpi or LeRobot ours: by name, folder or URL"),
    "export": ("manipi.cli.exchange:run_export", "write a checkpoint for openpi or LeRobot, or its adapters alone"),
    "filter": ("manipi.cli.dataset:run_filter", "choose the frames worth training on; the dataset stays as it is"),
    "stats": ("manipi.cli.stats:main", "compute norm stats of a recipe's data and report suspicious dimensions"),
    "check": ("manipi.cli.dataset:run_check", "read a dataset in full and report what is wrong with it"),
    "view": ("manipi.cli.dataset:run_view", "write cameras and curves of an episode as a page for the browser"),
    "inspect": ("manipi.cli.inspect:main", "show a dataset, a checkpoint, or what a recipe does to its first frame"),
    "recipes": ("manipi.cli.installation:run_recipes", "list the recipes"),
    "doctor": ("manipi.cli.installation:run_doctor", "say what this machine and this installation can do"),
}
"""Name → what runs it, as `module:function`, and what it is for. Installed packages add more (manipi.extensions)."""

SPIN_COUNT = "5000"
"""How long a waiting OpenMP thread spins before it sleeps. GNU's default, ten milliseconds and more, makes training up
to seven times slower as soon as another process keeps a core busy; this costs 8 % on a quiet one (docs/log.md)."""

USAGE = """usage: manipi COMMAND [arguments]      (manipi COMMAND --help explains each)

{commands}

The promise: what trains is what deploys, and every claim can be checked by a command. First steps:
  manipi demo                                     watch a policy learn and act, in minutes, on a processor
  manipi inspect path/to/dataset                  what is in a LeRobot dataset
  manipi train ./my_robot.py:my_recipe --run-dir runs/first
  manipi serve runs/first/checkpoints/30000
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 when it did its job, 1 on a `ManipiError`, 130 on Ctrl-C.

    Into a file, progress is written every ten seconds (TQDM_MININTERVAL), where a terminal has it ten times a second.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not (sys.stderr and sys.stderr.isatty()):  # read when tqdm is imported, which is later
        os.environ.setdefault("TQDM_MININTERVAL", "10")
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)  # read when torch is imported, which is later
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name of no UTF-8, a terminal of another encoding
    try:
        _run(*arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output, such as `head`, has enough
        _print_no_more()
    except (ManipiError, ManipiClientError, RuntimeError, OSError, UnicodeEncodeError) as error:
        known = isinstance(error, (ManipiError, ManipiClientError))
        command = (arguments or ["--help"])[0]
        told = error if known else _told(command, error)
        print(f"\nmanipi {command}: {type(told).__name__}\n{told}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)


def _print_no_more() -> None:
    """Python flushes once more when it ends, and would complain again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _told(command: str, error: RuntimeError | OSError | UnicodeEncodeError) -> ManipiError:
    """What a name that no file can have, printing to a full disk, or a GPU without memory is told as, wherever it was.

    Raises any other error again.
    """
    where, next = f"manipi {command}", "give it another name"
    if isinstance(error, UnicodeEncodeError):
        bytes_in = [
            line for line in error.object.splitlines() if any("\udc80" <= letter <= "\udcff" for letter in line)
        ]
        if not bytes_in:
            raise error
        found = shown(bytes_in[0].strip(), 200)
        return ConfigError(expected="names of files in UTF-8", found=found, where=where, next=next)
    if isinstance(error, OSError):
        if error.errno == errno.ENOSPC and error.filename is None:
            _print_no_more()
            next = "free some space, or let it print elsewhere"
            return StorageError(expected="room on the disk", found=str(error.strerror), where=where, next=next)
        if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):
            raise error
        found = f"{error.strerror}: {shown(str(error.filename), 200)}"
        return ConfigError(expected="a name that a file can have", found=found, where=where, next=next)
    if "torch" not in sys.modules:
        raise error
    from manipi.model.device import ran_out_of_memory

    if not ran_out_of_memory(error):
        raise error
    return ConfigError(
        expected="enough memory on the GPU",
        found=shown(str(error).splitlines()[0], 200),
        where=where,
        next="end what else is on it (nvidia-smi), or --device cpu where the command has that flag",
    )


def commands() -> dict[str, str]:
    """Every command and what it is for; of those that installed packages add, nothing is imported."""
    added = {name: summary(found[0]) for name, found in entries("manipi.commands").items() if name not in COMMANDS}
    return {name: text for name, (_, text) in COMMANDS.items()} | added


def _run(command: str = "--help", *arguments: str) -> None:
    if command in ("-h", "--help"):
        texts = commands()
        width = max(map(len, texts))
        print(USAGE.format(commands="\n".join(f"  {name:<{width}}  {text}" for name, text in texts.items())))
    elif command == "--version":
        print(f"manipi {manipi.__version__}")
    else:
        own = {name: target for name, (target, _) in COMMANDS.items()}
        find("manipi.commands", command, own, next="manipi --help")(arguments)
