"""FILE.py:Name, --input, --json and exit codes, from outside."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import svdtune
from svdtune import cli
from svdtune.errors import UsageError
from svdtune.guards.catalog import RULES
from svdtune.guards.trace import parse_input, trace, trace_file

SCRIPT = Path(__file__).parent / "assets" / "trace" / "script.py"


def test_a_file_that_breaks_after_the_class_is_reported_and_traced():
    found = trace_file(f"{SCRIPT}:Small", ["3,6"], arguments='{"hidden": 5}')
    assert found.outputs == ((3, 2),)
    assert found.findings == ()
    assert list(found.notes) == [
        "script.py:7 raised ModuleNotFoundError: No module named 'no_such_package_for_sure'",
        "script.py:32 was not run: a loop or call that comes after the module's definition",
        "script.py:33 raised NameError: name 'no_such_package_for_sure' is not defined",
        "script.py:35 was not run: a loop or call that comes after the module's definition",
        "script.py:37 raised RuntimeError: no pictures here",
    ]


def test_its_own_mistake_is_found_all_the_same():
    found = trace_file(f"{SCRIPT}:Small", ["3,6"])
    assert (found.failure.module, found.failure.got) == ("last", "input (3, 4): 4 at axis -1")
    assert found.remedies[0].change == "give last in_features=4 instead of 5"


def test_an_instance_and_a_factory():
    assert trace_file(f"{SCRIPT}:ready", ["3,6"]).ok
    assert trace_file(f"{SCRIPT}:make_small", ["3,6"], arguments='{"hidden": 5}').ok


@pytest.mark.parametrize(
    ("spec", "inputs", "arguments", "said"),
    [
        (f"{SCRIPT}:Smal", ["3,6"], "{}", "no Smal in it. Did you mean Small? Its modules: Small, ready"),
        (f"{SCRIPT}:Sizes", ["3,6"], "{}", "gave a Sizes; expected an nn.Module"),
        (f"{SCRIPT}:make_small", ["3,6"], "{}", "fix: give its arguments: --args '{\"hidden\": ...}'"),
        (f"{SCRIPT}:Small", ["3x6"], "{}", "--input 3x6: expected sizes with commas between them, as in 2,1,28,28"),
        (f"{SCRIPT}:Small", ["half:3,6", "inty:2"], "{}", "--input inty:2: inty is no dtype of torch"),
        (f"{SCRIPT}:Small", [], "{}", "--input: give the shape of each input"),
        (f"{SCRIPT}:Small", ["3,6"], "[1]", "--args: got [1], expected an object"),
        (f"{SCRIPT}:Small", ["3,6"], "{hidden", "--args: not JSON"),
        ("gone.py:Small", ["3,6"], "{}", "gone.py: no such file"),
        ("gone.py", ["3,6"], "{}", "gone.py: expected FILE.py:Name, as in model.py:Net"),
    ],
)
def test_what_cannot_be_read_is_said(spec, inputs, arguments, said):
    with pytest.raises(UsageError) as caught:
        trace_file(spec, inputs, arguments=arguments)
    assert said in str(caught.value)


def test_inputs_of_other_dtypes():
    assert parse_input("float16:2,3", nn.Identity()).dtype == torch.float16
    ids = parse_input("int64:50,16", nn.Sequential(nn.Embedding(900, 2), nn.Embedding(3, 2)))
    assert (ids.dtype, tuple(ids.shape), int(ids.max())) == (torch.int64, (50, 16), 2)


def verb(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["svdtune", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code, *capsys.readouterr()


def test_exit_codes_and_one_object_on_stdout(monkeypatch, capsys):
    code, out, _ = verb(monkeypatch, capsys, "trace", f"{SCRIPT}:Small", "--input", "3,6", "--json")
    said = json.loads(out)
    assert (code, said["ok"], said["failure"]["module"]) == (3, False, "last")
    assert said["remedies"][0]["added_parameters"] == -2
    assert [finding["code"] for finding in said["findings"]] == ["SHP450"]
    code, out, _ = verb(monkeypatch, capsys, "trace", f"{SCRIPT}:ready", "--input", "3,6", "--like", "3,2")
    assert (code or 0) == 0
    assert "no findings" in out
    code, out, err = verb(monkeypatch, capsys, "trace", f"{SCRIPT}:Smal", "--input", "3,6")
    assert (code, out) == (2, "")
    assert "Did you mean Small" in err


def test_the_report_for_people():
    text = trace_file(f"{SCRIPT}:Small", ["3,6"]).render()
    assert "last   Linear  (3, 4)  FAILED  12" in text
    assert "Remedies, each run forward and backward with the change:" in text
    assert "1. give last in_features=4 instead of 5   (-2 parameters, gives (3, 2))" in text
    assert "note: script.py:37 raised RuntimeError: no pictures here" in text


def test_every_code_has_its_rule():
    assert {code for code in RULES if code.startswith("SHP45")} == {f"SHP45{i}" for i in range(7)}


def test_trace_is_at_the_top_and_loads_torch_only_when_asked_for():
    assert svdtune.trace is trace
    code = "import sys, svdtune; print('torch' in sys.modules); svdtune.trace; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["False", "True"], done.stderr


@pytest.mark.parametrize("head", [b"\xef\xbb\xbf", b"# -*- coding: latin-1 -*-\nname = '\xe9'\n"])
def test_files_in_other_encodings(tmp_path, head):
    path = tmp_path / "net.py"
    path.write_bytes(head + b"from torch import nn\nNet = lambda: nn.Linear(3, 2)\n")
    assert trace_file(f"{path}:Net", ["5,3"], None, "{}").findings == ()
