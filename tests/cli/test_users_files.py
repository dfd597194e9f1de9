"""A fault in a user's recipe or robot file, in every command that reads one: file and line, no traceback of ours."""

import pytest

from manipi.cli import main

FAULTS = {
    "syntax": ("def recipe() -> TrainConfig\n    return 1\n", 1),
    "import": ("\nfrom manipi.train.config import TraneConfig\n", 2),
    "keyword": ("from manipi.robots import Robot\nROBOT = Robot(title='x')\n", 2),
    "return type": ("from manipi.train.config import TrainConfig\ndef recipe() -> TrainConfig:\n    return 'x'\n", 2),
    "argument": ("from manipi.train.config import TrainConfig\ndef recipe(size) -> TrainConfig:\n    return 1\n", 2),
    "exception": ("from manipi.train.config import TrainConfig\ndef recipe() -> TrainConfig:\n    return 1 / 0\n", 3),
}
COMMANDS = {
    "train": "train {}",
    "train --help": "train {} --help",
    "plan": "plan {}",
    "inspect": "inspect {}",
    "stats": "stats {}",
    "bench": "bench infer {}",
    "import --recipe": "import somewhere target --recipe {}",
    "import --robot": "import somewhere target --robot {}",
    "check": "check somewhere --robot {}",
    "filter": "filter {data} --robot {} --out keep.json",
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_fault_names_its_line(command, fault, toy_dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source, line = FAULTS[fault]
    path = tmp_path / "mine.py"
    path.write_text(source)
    (tmp_path / "somewhere").mkdir()
    with pytest.raises(SystemExit) as exit:
        main(COMMANDS[command].format(f"{path}:recipe", data=toy_dataset).split())
    printed = capsys.readouterr().err
    assert exit.value.code == 1, printed
    assert f"where {path}, line {line}" in printed
    assert "Traceback" not in printed
