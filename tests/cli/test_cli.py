"""The command line from outside: exit codes, sentences, and that mistakes are found without torch."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from svdtune import __version__, cli, errors
from svdtune.data.demo import write_demo

CONFIGS = Path(__file__).parents[2] / "configs"

# A verb in a fresh process, with torch made impossible to import.
WITHOUT_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "diffusers", "transformers", "accelerate"):
            raise AssertionError(f"{name} was imported")
sys.meta_path.insert(0, Refuse())
from svdtune.cli import main
main()
"""


def svdtune(*arguments: str, code: str = WITHOUT_TORCH, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        text=True,
        capture_output=True,
        timeout=120,
        env=os.environ | environment,
    )


def here(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int | str | None, str, str]:
    """The same in this process, where a second of start-up is not worth its while: exit code, stdout, stderr."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["svdtune", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    return stopped.value.code, *capsys.readouterr()


VERBS = [
    [],
    ["train"],
    ["preflight"],
    ["explain"],
    ["cache"],
    ["trace"],
    ["inspect"],
    ["sample"],
    ["data"],
    ["data", "demo"],
    ["data", "scan"],
    ["config"],
    ["config", "show"],
]


def test_cpu_threads_sleep_while_they_wait_unless_told_otherwise(capsys, monkeypatch):
    """libgomp reads it when torch is loaded, which no module of the command line does."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    here(capsys, "--version")
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    here(capsys, "--version")
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_help_ends_in_examples(verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = here(capsys, *verb, "--help")
    assert (code, err) == (0, "")
    examples = out.partition("Examples:\n")[2].strip()
    assert examples
    assert all(line.split()[0] in ("svdtune", "accelerate", "torchrun", "The") for line in examples.splitlines())


def test_every_svdtune_line_of_the_examples_parses(capsys: pytest.CaptureFixture[str]) -> None:
    """Each example is followed by --help, which stops before it does anything but after its words are known."""
    examples = "".join(value for name, value in vars(cli).items() if name.endswith("_EXAMPLES"))
    lines = [line.split("   ")[0] for line in map(str.strip, examples.splitlines()) if line.startswith("svdtune ")]
    assert len(lines) >= 10
    for line in lines:
        words = shlex.split(re.split(r" -- | > | 2>&1 ", line)[0])[1:]
        code, _, err = here(capsys, *words, "--help")
        assert (code, err) == (0, ""), line


def test_help_needs_no_torch() -> None:
    done = svdtune("train", "--help")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_config_error_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("data:\n  widht: 3\n")
    for verb in (["train"], ["config", "show"]):
        done = svdtune(*verb, str(path))
        expected = f"error: {path}:2: unknown key data.widht. Did you mean data.width?\n"
        assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)


def test_a_wrong_override_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = here(capsys, "train", str(CONFIGS / "tiny.yaml"), "train.stepz=3")
    assert (code, err) == (2, "error: override 'train.stepz=3': unknown key train.stepz. Did you mean train.steps?\n")


def test_usage_errors_are_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = here(capsys, "trian")
    assert code == 2
    assert "No such command 'trian'" in err
    code, _, err = here(capsys, "config", "schema", "--", "--num_processes", "2")
    assert code == 2
    assert err.startswith(
        "error: arguments after -- go to accelerate launch, which only `svdtune train` and `svdtune cache` use"
    )


def test_colour_needs_a_terminal(tmp_path: Path) -> None:
    assert "\x1b" not in svdtune("train", str(tmp_path / "none.yaml"), TERM="xterm-256color").stderr


def test_the_rank_that_fails_says_which_it_is(tmp_path: Path) -> None:
    assert svdtune("train", str(tmp_path / "none.yaml"), RANK="1").stderr.startswith("rank 1: error: ")


def test_config_show_prints_the_overridden_config(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = here(capsys, "config", "show", str(CONFIGS / "tiny.yaml"), "train.lr=3e-4")
    assert code == 0
    assert "  lr: 0.0003\n" in out


def test_config_schema_prints_the_committed_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads(here(capsys, "config", "schema")[1]) == json.loads((CONFIGS / "schema.json").read_text())


def test_data_demo_writes_clips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = here(capsys, "data", "demo", str(tmp_path / "demo"), "--clips", "2", "--motion", "up")
    assert (code, out) == (0, f"2 clips in {tmp_path / 'demo'}\n")
    assert len(list((tmp_path / "demo").glob("*.mp4"))) == 2
    assert here(capsys, "data", "demo", str(tmp_path), "--motion", "sideways")[0] == 2


def test_data_scan_counts_and_says_why_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_demo(tmp_path, clips=4)
    (tmp_path / "text.mp4").write_text("no video")
    scan = ["data", "scan", str(CONFIGS / "tiny.yaml"), f"data.root={tmp_path}"]
    first, last = here(capsys, *scan)[1].splitlines()
    assert "text.mp4" in first
    assert last == "3 files to train on, 1 held out, 1 that cannot be used"
    code, _, err = here(capsys, *scan, "data.num_frames=500")
    assert code == 3
    assert err.startswith("error: data.root: none of the 5 file(s) in ")


def fail_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def verb(**_: object) -> None:
        raise error

    monkeypatch.setattr(cli, "app", verb)


OURS = [item for item in vars(errors).values() if isinstance(item, type) and issubclass(item, errors.SvdtuneError)]


@pytest.mark.parametrize("error", OURS)
def test_exit_codes_of_our_errors(
    error: type[errors.SvdtuneError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(error("why"), monkeypatch)
    assert here(capsys) == (error.exit_code, "", "error: why\n")


def test_the_promised_exit_codes_exist() -> None:
    assert {error.exit_code for error in OURS} == {1, 2, 3, 4, 143}


def test_brackets_in_a_message_are_not_markup(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    message = f"[red]a[/red] [b] {'x' * 200}"
    fail_with(errors.DataError(message), monkeypatch)
    assert here(capsys) == (errors.DataError.exit_code, "", f"error: {message}\n")


RAISING = "from svdtune import cli\ndef verb():\n    raise {}\ncli.app.command('boom')(verb)\ncli.main()"


def test_the_unforeseen_keeps_its_traceback_and_interrupts_are_130() -> None:
    done = svdtune("boom", code=RAISING.format("RuntimeError('unforeseen')"))
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.endswith("RuntimeError: unforeseen\n")
    done = svdtune("boom", code=RAISING.format("KeyboardInterrupt"))
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_interrupted_outside_a_verb(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fail_with(KeyboardInterrupt(), monkeypatch)
    assert here(capsys) == (130, "", "interrupted\n")


@pytest.mark.parametrize("error", [errors.DataError("why"), KeyboardInterrupt()])
def test_an_open_progress_line_is_cleared_on_a_terminal(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(error, monkeypatch)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    _, _, err = here(capsys)
    assert err.startswith("\r\x1b[2K")
    assert err.count("\x1b[2K") == 1


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert here(capsys, "--version") == (0, f"svdtune {__version__}\n", "")
