"""The console script `spg`: its list of commands, its answers to mistakes, and that it runs what it names."""

from __future__ import annotations

import subprocess
import sys
import tomllib

import pytest

from spg import __version__
from spg.cli import main as script
from tests.helpers import ROOT, command

WITHOUT_TORCH = (
    "import sys\n"
    "from spg.cli.main import main\n"
    "try:\n    main()\n"
    "finally:\n    assert not {'torch', 'lightning', 'hydra'} & set(sys.modules)\n"
)


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the console script in a process of its own; it may import neither torch nor Hydra."""
    line = [sys.executable, "-c", WITHOUT_TORCH, *arguments]
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, check=False)


def test_it_is_installed_under_its_name() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"spg": "spg.cli.main:main"}


def test_the_commands_are_the_modules_beside_the_packages() -> None:
    assert set(script.COMMANDS) == {p.stem for p in (ROOT / "spg").glob("*.py") if p.stem != "__init__"}


@pytest.mark.parametrize("option", ["--help", "-h", "help"])
def test_help_lists_every_command_in_a_line(option: str) -> None:
    done = call(option)
    assert done.returncode == 0, done.stderr
    for name, about in script.COMMANDS.items():
        assert any(line.split() == [name, *about.split()] for line in done.stdout.splitlines())
    assert max(map(len, done.stdout.splitlines())) <= 110


def test_without_a_command_it_tells_how_it_is_used() -> None:
    done = call()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.strip() == script.usage()


def test_it_tells_its_version() -> None:
    assert call("--version").stdout.strip() == f"spg {__version__}"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("trian", "spg trian: there is no such command; allowed: plan, train, evaluate,"),
        ("evalute", "nearest: evaluate"),
        ("task=sudoku", "spg task=sudoku: there is no such command"),
    ],
)
def test_another_name_is_refused_with_the_nearest_one(name: str, words: str) -> None:
    done = call(name, "seed=1")
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.strip().count("\n") == 0


def test_a_command_gets_the_arguments_after_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr("spg.cli.figures.main", lambda: seen.append(sys.argv))
    monkeypatch.setattr(sys, "argv", ["spg", "figures", "sweep=x", "measure=solved"])
    script.main()
    assert seen == [["spg figures", "sweep=x", "measure=solved"]]


@pytest.mark.parametrize("name", ["train", "figures"])
def test_a_command_answers_a_mistake_as_its_module_does(name: str) -> None:
    """Both ways are the same command: a wrong key is refused with the same line and code."""
    ways = ([sys.executable, "-c", "from spg.cli.main import main; main()", name], command(name))
    answers = [
        subprocess.run([*way, "sede=1"], capture_output=True, text=True, cwd=ROOT, check=False)
        for way in ways
    ]
    assert [answer.returncode for answer in answers] == [2, 2]
    assert answers[0].stderr == answers[1].stderr
    assert "sede=1" in answers[0].stderr
