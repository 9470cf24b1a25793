"""What all commands have in common: help with examples, errors in a line, quiet, completion."""

from __future__ import annotations

import pytest
from click.testing import CliRunner
from folders import fill
from toy_pipeline import run

from rediffuse.cli import main
from rediffuse.runtime.errors import UserError


@pytest.mark.parametrize("name", main.commands)
def test_the_help_of_each_command_shows_an_example(name):
    shown = CliRunner().invoke(main, [name, "--help"]).output
    assert f"rediffuse {name}" in shown.partition("Example")[2]


def test_an_error_of_the_user_is_one_line_and_debug_says_where_it_arose(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    missing = CliRunner().invoke(main, ["inspect", "nowhere"])
    assert missing.exit_code == 1
    assert missing.stderr.startswith("error: ") and len(missing.stderr.splitlines()) == 1
    assert isinstance(CliRunner().invoke(main, ["--debug", "inspect", "nowhere"]).exception, UserError)
    assert CliRunner().invoke(main, ["inspect"]).exit_code == 2


def test_a_file_that_cannot_be_written_is_an_error_in_a_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "in", 40)
    done = CliRunner().invoke(main, ["inspect", "in", "--sheet", "in/0000.png/sheet.png"])
    assert done.exit_code == 1
    assert "0000.png" in done.stderr.splitlines()[-1] and "Traceback" not in done.output


def test_quiet_has_no_progress_and_the_same_result(tmp_path):
    fill(tmp_path / "in", 40)
    loud = run(tmp_path, "rediffuse", "inspect", "in", TQDM_DISABLE="")
    quiet = run(tmp_path, "rediffuse", "-q", "inspect", "in", TQDM_DISABLE="")
    assert "it/s" in loud.stderr or "image/s" in loud.stderr
    assert quiet.stderr == "" and quiet.stdout == loud.stdout


def test_a_shell_completes_commands(tmp_path):
    asked = {"_REDIFFUSE_COMPLETE": "bash_complete", "COMP_WORDS": "rediffuse in", "COMP_CWORD": "1"}
    assert {"plain,inpaint", "plain,inspect", "plain,interpolate"} == set(
        run(tmp_path, "rediffuse", **asked).stdout.split()
    )
