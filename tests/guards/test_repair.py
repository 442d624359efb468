"""`--fix`: the verified changes in the YAML, comments and order kept, nothing overwritten by accident."""

from __future__ import annotations

import pytest

from svdtune.config.load import load_config
from svdtune.errors import ConfigError, UsageError
from svdtune.guards.repair import write_repaired

TEXT = """# my run
model:
  pretrained: tiny   # the base
data:
  num_frames: 8   # as the base
  height: 64
train:
  # slow and steady
  lr: 1e-4
"""


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(TEXT)
    return path


def test_comments_order_and_other_values_stay(source, tmp_path):
    target = tmp_path / "out.yaml"
    write_repaired(source, target, ["data.num_frames=5", "conditioning.bridge=linear", "validation.sigmas=[0.5, 2.0]"])
    text = target.read_text()
    assert text.startswith(TEXT.replace("num_frames: 8 ", "num_frames: 5 "))
    loaded = load_config(target)
    assert (loaded.data.num_frames, loaded.conditioning.bridge, loaded.validation.sigmas) == (5, "linear", [0.5, 2.0])
    assert loaded.train.lr == 1e-4
    assert source.read_text() == TEXT


@pytest.mark.parametrize("indent", [("  ", "  "), ("  ", "    "), ("    ", "      ")])
def test_line_ends_indentation_and_comments_inside_a_list_stay(tmp_path, indent):
    source = tmp_path / "run.yaml"
    option, item = indent
    text = (
        f"adapt:\r\n{option}targets:\r\n{item}- attn1.to_q   # the first\r\n{item}- attn9.to_q\r\n"
        f"{item}- attn1.to_v   # the last\r\ntrain:\r\n{option}steps: 300\r\n"
    )
    source.write_bytes(text.encode())
    write_repaired(source, tmp_path / "out.yaml", ["adapt.targets=[attn1.to_q,attn1.to_v]"])
    assert (tmp_path / "out.yaml").read_bytes() == text.replace(f"{item}- attn9.to_q\r\n", "").encode()


def test_null_is_written_as_null(tmp_path):
    source = tmp_path / "run.yaml"
    source.write_text("model:\n  variant: fp16   # of the files\n")
    write_repaired(source, tmp_path / "out.yaml", ["model.variant=null"])
    assert (tmp_path / "out.yaml").read_text() == "model:\n  variant: null   # of the files\n"


def test_another_file_is_never_overwritten(source, tmp_path):
    target = tmp_path / "out.yaml"
    target.write_text("mine")
    with pytest.raises(UsageError, match=r"out\.yaml exists already; give another name"):
        write_repaired(source, target, ["data.num_frames=5"])
    assert target.read_text() == "mine"


def test_the_file_itself_may_be_changed_in_place(source):
    write_repaired(source, source, ["data.num_frames=5"])
    assert load_config(source).data.num_frames == 5


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "train:\n"])
def test_a_file_with_little_in_it(tmp_path, text):
    source = tmp_path / "run.yaml"
    source.write_text(text)
    write_repaired(source, tmp_path / "out.yaml", ["train.lr=1e-4"])
    assert load_config(tmp_path / "out.yaml").train.lr == 1e-4


def test_a_folder_that_is_not_there(source, tmp_path):
    with pytest.raises(UsageError, match=r"--fix: there is no folder .*gone to write out\.yaml in"):
        write_repaired(source, tmp_path / "gone" / "out.yaml", ["train.lr=1e-4"])


def test_a_result_that_would_not_load_is_not_written(source, tmp_path):
    with pytest.raises(ConfigError, match="num_frames"):
        write_repaired(source, tmp_path / "out.yaml", ["data.num_frames=1"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.yaml"]
