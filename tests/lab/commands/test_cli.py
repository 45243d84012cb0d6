"""The command line: what is missing is one line, a closed pipe is quiet, help has examples."""

import io
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from lab.collect.made_up import run
from llqr_lab.commands import cli
from llqr_lab.commands.cli import COMMANDS, EXTRAS, as_options, main
from llqr_lab.common.output import LineBar, step_bar


@pytest.mark.parametrize(
    "module, extra",
    [
        ("hydra", "lab"),
        ("matplotlib.pyplot", "lab"),
        ("sacrebleu", "translation"),
        ("hydra_plugins.x", "slurm"),
        ("torchvision.transforms", "vision"),
    ],
)
def test_a_missing_extra_is_one_line_with_the_command(monkeypatch, capsys, module, extra):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(cli.importlib, "import_module", missing)
    assert main(["table", "1"]) == 2
    package = module.partition(".")[0]
    expected = f"llqr: {package} is not installed; pip install 'llqr[{extra}]'\n"
    assert capsys.readouterr().err == expected


def test_another_missing_module_is_an_error_of_ours(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("No module named 'llqr_lab.nothing'", name="llqr_lab.nothing")

    monkeypatch.setattr(cli.importlib, "import_module", missing)
    with pytest.raises(ModuleNotFoundError):
        main(["table", "1"])


def test_the_extras_are_those_of_the_package():
    content = (Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8")
    names = {"sklearn": "scikit-learn", "PIL": "pillow", "hydra": "hydra-core"}
    with_others = {"omegaconf", "hydra_plugins", "submitit"}  # other packages bring these
    for extra, packages in EXTRAS.items():
        (known,) = re.findall(rf"^{extra} = (\[.*?\])$", content, re.MULTILINE | re.DOTALL)
        assert all(names.get(p, p) in known for p in packages if p not in with_others)


def test_a_closed_pipe_is_quiet_and_the_files_are_written(tmp_path, monkeypatch, capsys):
    run(tmp_path, "0", "table1", "CIFAR-10", "resnet18", "SAM", 0, 96.0)

    class Closed(io.StringIO):
        """What `| head` leaves."""

        def write(self, text):
            raise BrokenPipeError

        def fileno(self):
            return pipe

    with open(tmp_path / "pipe", "w") as file:
        pipe = file.fileno()
        monkeypatch.setattr(sys, "stdout", Closed())
        assert main(["table", "1", "--out", str(tmp_path)]) == 141
        file.write("what is flushed at the end goes nowhere")
    assert capsys.readouterr().err == ""
    assert (tmp_path / "table1.md").exists() and not (tmp_path / "pipe").read_text()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples_that_begin_with_the_command(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert re.search(rf"^  llqr {command}\b", said, re.MULTILINE), said


def test_out_and_runs_may_be_written_either_way(tmp_path, capsys):
    run(tmp_path / "a", "0", "table1", "CIFAR-10", "resnet18", "SAM", 0, 96.0)
    for number, words in enumerate(([f"runs={tmp_path / 'a'}"], ["--runs", str(tmp_path / "a")])):
        out = tmp_path / f"out{number}"
        assert main(["table", "1", *words, f"out={out}"]) == 0
        assert (out / "table1.md").exists()
    assert as_options(["run", "table1", "out=x"], "run") == ["run", "table1", "out=x"]


def test_steps_print_lines_where_nothing_moves(monkeypatch, capsys):
    times = iter(range(0, 1000, 20))  # seconds between two looks at the clock
    monkeypatch.setattr("llqr_lab.common.output.time.monotonic", lambda: next(times))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with step_bar(9, 0, "SAM") as bar:
        assert isinstance(bar, LineBar)
        for _ in range(9):
            bar.update()
            bar.refresh()
    lines = sys.stderr.getvalue().splitlines()
    assert 3 <= len(lines) <= 9 and all(line.startswith("SAM: ") for line in lines)
    assert not step_bar(9, 0, "SAM", silent=True).display()


def test_without_a_command_the_help_is_printed(capsys):
    assert main([]) == 2
    assert all(f"\n    {command} " in capsys.readouterr().out for command in list(COMMANDS)[:1])


def test_warnings_are_lines_without_a_place(monkeypatch, capsys):
    class Table:
        add_arguments = staticmethod(lambda parser: parser.add_argument("number"))

        @staticmethod
        def main(arguments):
            with warnings.catch_warnings():
                warnings.simplefilter("always")
                warnings.warn("U hardly acts", stacklevel=1)
            return 0

    monkeypatch.setattr(cli.importlib, "import_module", lambda name: Table)
    before = warnings.showwarning
    assert main(["table", "1"]) == 0
    assert capsys.readouterr().err == "llqr: U hardly acts\n" and warnings.showwarning is before


@pytest.mark.parametrize(
    "line, found",
    [
        ("llqr ta", {"table"}),
        ("llqr run probe.rh", {"probe.rho="}),
        ("llqr run table1", {"table1", "table10"}),
        ("llqr figure --ru", {"--runs"}),
    ],
)
def test_the_shell_completes(capsys, line, found):
    assert main(["completion", "bash"]) == 0
    words = line.split()
    ask = (
        f"COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _llqr; printf '%s\n' ${{COMPREPLY[@]}}"
    )
    script = f"{capsys.readouterr().out}\n{ask}"
    shell = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert set(shell.stdout.split()) == found
