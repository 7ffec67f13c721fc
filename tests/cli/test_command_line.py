"""The command line itself: help, exit codes, errors without a traceback, nothing heavy before it is needed."""

import dataclasses
import logging
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import unime_st.cli
from unime_st.cli import main
from unime_st.cli.main import COMMANDS
from unime_st.cli.train import SETTINGS
from unime_st.training import PairsTraining


def test_every_command_has_help_with_an_example(capsys):
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    for name, module in COMMANDS.items():
        assert module.HELP.split()[0] in listed
        assert main([name, "--help"]) == 0
        shown = capsys.readouterr().out
        assert f"example:\n  unime {name} " in shown
        assert "--traceback" in shown


def test_examples_parse():
    from unime_st.cli.main import parser

    for name, module in COMMANDS.items():
        words = module.EXAMPLE.replace('"a red bus"', "red").split()
        given = parser().parse_args(words[1:])
        assert given.command == name


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["learn"],
        ["train", "x.csv"],
        ["info", "model", "--nothing"],
        ["info", "model", "other"],
        ["search", "corpus", "--model", "m"],
        ["search", "corpus", "text", "--top-k", "0", "--model", "m"],
        ["search", "corpus", " ", "--model", "m"],
        ["distill", "texts.txt", "--backbone", "b", "--output", "o"],
        ["mine", "x.csv", "--output", "o"],
        ["mine", "x.csv", "m", "--output", "o", "--judge", "j", "--num-negatives", "51"],
        ["push", "encoder"],
        ["push", "encoder", "no name"],
    ],
)
def test_a_wrong_command_line_is_exit_code_2(arguments, capsys):
    assert main(arguments) == 2
    assert "error:" in capsys.readouterr().err


def test_errors_are_one_line_unless_a_traceback_is_asked_for(tmp_path, capsys):
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n")
    assert main(["check", str(tmp_path / "rows.csv")]) == 1
    told = capsys.readouterr()
    assert told.err.startswith("unime check: error: rows.csv: no column is a query by its name. Its columns are: a, b.")
    assert "Traceback" not in told.err
    assert told.out == ""
    assert main(["check", str(tmp_path / "rows.csv"), "--traceback"]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["train", "--output", "run", "--backbone"], ["check", "--backbone"]])
def test_a_model_that_is_not_there_is_named(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("rows.csv").write_text("query,target\n" + "".join(f"q{n},t{n}\n" for n in range(10)))
    assert main([command[0], "rows.csv", *command[1:], "no/such"]) == 1
    told = capsys.readouterr().err
    assert f"unime {command[0]}: error: no/such" in told
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("num_train_epochs", 0),
        ("num_train_epochs", float("inf")),
        ("max_steps", -5),
        ("temperature", 0),
        ("max_seq_length", 0),
        ("num_hard_negatives", 0),
        ("seed", -1),
    ],
)
def test_settings_are_refused_before_anything_is_loaded(setting, value):
    with pytest.raises(ValueError, match=f"`{setting}={value}`, but it must be"):
        PairsTraining(**{setting: value})


def test_defaults_are_those_of_the_settings():
    own = {field.name: field.default for field in dataclasses.fields(PairsTraining)}
    assert {name: default for name, _, default, _ in SETTINGS.values()} == {
        name: own[name] for name, *_ in SETTINGS.values()
    }
    assert len(SETTINGS) >= 10


def test_help_imports_nothing_heavy():
    heavy = {"torch", "transformers", "datasets", "PIL", "numpy"}
    code = "import sys; from unime_st.cli import main; main(['train', '--help'])"
    code += f"; sys.exit(str(sorted({heavy} & set(sys.modules))) if {heavy} & set(sys.modules) else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_entry_point_is_the_command():
    settings = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    module, _, name = settings["project"]["scripts"]["unime"].partition(":")
    assert module == "unime_st.cli"
    assert getattr(unime_st.cli, name) is main


def test_the_log_level_of_the_caller_stays(capsys):
    package = logging.getLogger("unime_st")
    before = package.level
    assert main(["info", "no/such/folder"]) == 1
    assert package.level == before


@pytest.mark.parametrize("command", ["distill", "mine", "train"])
def test_an_output_that_is_a_file_is_named(command, tmp_path, monkeypatch, capsys):
    taken = tmp_path / "taken"
    taken.write_text("mine")

    def make_folder(given):
        (tmp_path / "taken").mkdir()

    monkeypatch.setattr(f"unime_st.cli.{command}.run", make_folder)
    given = {"distill": ["--teacher", "t", "--backbone", "b"], "mine": ["model"], "train": ["--backbone", "b"]}
    assert main([command, "data.csv", *given[command], "--output", str(taken)]) == 1
    assert capsys.readouterr().err == f"unime {command}: error: --output {taken} is a file. Give a folder.\n"
    assert taken.read_text() == "mine"
