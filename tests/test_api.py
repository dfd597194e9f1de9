"""The public interface: docs/api.md, `manipi.__all__` and the type stub say the same, and the page's example runs."""

import ast
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import manipi

REPOSITORY = Path(__file__).parents[1]
PAGE = (REPOSITORY / "docs/api.md").read_text(encoding="utf-8")
DOCUMENTED = dict(re.findall(r"^\| `(\w+)(?:\(([^)]*)\))?` \| .+ \|$", PAGE, re.MULTILINE))
"""Name → its parameters, as the page's tables have them."""


def test_the_page_the_package_and_its_stub_have_the_same_names():
    stub = ast.parse(Path(manipi.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    imported = {a.asname or a.name for n in stub.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assigned = {t.id: n.value for n in stub.body if isinstance(n, ast.Assign) for t in n.targets}
    stated = ast.literal_eval(assigned.pop("__all__"))
    assert sorted(DOCUMENTED) == sorted(manipi.__all__) == sorted(stated) == sorted(imported | set(assigned))
    assert len(set(stated)) == len(stated)


@pytest.mark.parametrize("name", manipi.__all__)
def test_every_name_is_there_with_the_parameters_of_the_page(name):
    found = getattr(manipi, name)
    assert name in dir(manipi)
    stated = [part for part in DOCUMENTED[name].split(", ") if part not in ("", "*")]
    if not stated:  # a type, or an error
        return
    parameters = list(inspect.signature(found).parameters)
    assert stated == parameters if "…" not in stated else set(stated) - {"…"} <= set(parameters)


def test_the_stub_imports_from_where_the_package_does():
    stub = ast.parse(Path(manipi.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    for node in stub.body:
        for alias in node.names if isinstance(node, ast.ImportFrom) else ():
            module = __import__(node.module, fromlist=[alias.name])
            assert getattr(manipi, alias.asname or alias.name) is getattr(module, alias.name)
    assert manipi.load_policy is manipi.Policy.load


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'manipi' has no attribute 'nothing'"):
        manipi.nothing  # noqa: B018


def test_the_import_is_light():
    """In a fresh process: no NumPy, no torch, and under a tenth of a second of it."""
    code = (
        "import sys, time; started = time.process_time(); import manipi; took = time.process_time() - started\n"
        "assert not {'numpy', 'torch'} & set(sys.modules), sorted(sys.modules)\n"
        "assert manipi.Robot and not {'numpy', 'torch'} & set(sys.modules)\n"
        "print(took)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.1


def test_the_example_runs(toy_dataset, tmp_path, monkeypatch, capsys):
    shutil.copytree(toy_dataset, tmp_path / "datasets/reach")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    exec(compile(blocks[1], "docs/api.md", "exec"), {})
    assert "ws://127.0.0.1:" in capsys.readouterr().out
    assert (tmp_path / "imported/manifest.json").is_file()
