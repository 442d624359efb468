"""`svdtune convert` on the command line: exit codes, lines, help."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from convert_models import differing, folder_tensors, make_file, originals
from safetensors.torch import load_file

from svdtune import cli


@pytest.fixture
def svdtune(capsys, monkeypatch):
    """The verb in this process: exit code, stdout, stderr."""

    def svdtune(*arguments):
        monkeypatch.setattr(sys, "argv", ["svdtune", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return stopped.value.code or 0, *capsys.readouterr()

    return svdtune


def test_from_outside(tmp_path, folder):
    """In a process of its own, as a user runs it: one line on stdout, nothing on stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "svdtune", "convert", folder, "new.safetensors", "--dtype", "fp16"], cwd=tmp_path, capture_output=True,
        text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    expected = {name: tensor.half() for name, tensor in originals(folder).items()}
    told = (
        f"new.safetensors: {len(expected)} tensors, 0.01 GiB, float16, original names, read back equal, forward equal\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, told, "")
    assert differing(load_file(tmp_path / "new.safetensors"), expected) == set()


def test_a_file_to_a_folder(tmp_path, file, folder, svdtune):
    code, out, err = svdtune("convert", file, tmp_path / "made")
    assert (code, err) == (0, "")
    assert (
        out
        == f"{tmp_path / 'made'}: diffusers folder, {len(folder_tensors(folder))} tensors, read back equal, forward equal\n"
    )


def test_a_run_into_its_base(tmp_path, runs, file, svdtune):
    code, out, _ = svdtune("convert", runs["lora"], tmp_path / "new.safetensors", "--into", file, "--checkpoint", "1")
    assert code == 0
    assert out.startswith(f"{tmp_path / 'new.safetensors'}: 48 of {len(load_file(file))} tensors of {file} replaced, ")


def test_mistakes_of_the_command_line_are_code_2(tmp_path, runs, folder, file, svdtune):
    new = tmp_path / "new.safetensors"
    for arguments in (
        (folder,), (folder, file), (tmp_path / "nothing", new), (folder, new, "--dtype", "fp8"), (folder, new, "--merge"),
        (folder, new, "--checkpoint", "1"), (runs["full"], new, "--checkpoint", "9"), (runs["full"], tmp_path / "x", "--into", file),
        (folder, new, "--quick"), (folder, tmp_path / "svd.ckpt"),
    ):  # fmt: skip
        code, out, err = svdtune("convert", *arguments)
        assert (code, out) == (2, ""), arguments
        assert "rror" in err
        assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_models_that_are_refused_are_code_3(tmp_path, runs, folder, svdtune):
    (tmp_path / "empty").mkdir()
    (tmp_path / "page.safetensors").write_text("<!DOCTYPE html><title>401</title>")
    other = make_file(tmp_path / "other.safetensors", folder, changed={"first_stage_model.encoder.conv_in.bias": None})
    for arguments in ((tmp_path / "empty",), (tmp_path / "page.safetensors",), (other,), (runs["dora"],)):
        code, out, err = svdtune("convert", *arguments, tmp_path / "new.safetensors")
        assert (code, out) == (3, ""), arguments
        assert err.startswith("error: ")
        assert not (tmp_path / "new.safetensors").exists()


def test_ctrl_c_is_code_130(tmp_path, folder, svdtune, monkeypatch):
    from svdtune.convert import verify

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(verify, "same_tensors", interrupted)
    code, out, err = svdtune("convert", folder, tmp_path / "new.safetensors")
    assert (code, out, err) == (130, "", "interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_help_has_every_option_and_examples(svdtune):
    code, out, _ = svdtune("convert", "--help")
    assert code == 0
    for word in (
        "SRC",
        "DST",
        "--into",
        "--merge",
        "--base",
        "--dtype",
        "--checkpoint",
        "svdtune convert svd_xt.safetensors svd-xt/",
    ):
        assert word in out
