"""What `load_config` accepts, and the sentence of every mistake."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from svdtune.config.load import load_config, option_types, resolved_yaml
from svdtune.config.schema import Config, Train
from svdtune.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"

VALID = """\
run:
  name: one
data:
  width: 96
  height: 64
train:
  lr: 1e-5
  warmup: 5
"""


def write(tmp_path: Path, text: str, name: str = "c.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def error_of(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value).replace(str(path), path.name)


def test_values_defaults_and_overrides(tmp_path: Path) -> None:
    overrides = [
        "train.steps=7",
        "conditioning.noise_aug=[-1, 0.25]",
        "tracking.backends=[wandb]",
        "adapt.targets=[to_v]",
    ]
    config = load_config(write(tmp_path, VALID), overrides)
    assert (config.run.name, config.data.width, config.train.lr, config.train.steps) == ("one", 96, 1e-5, 7)
    assert config.data.fps == 7  # not written: the default
    assert config.conditioning.noise_aug == (-1.0, 0.25)
    assert config.tracking.backends == ["wandb"]
    assert config.adapt.targets == ["to_v"]


def test_the_last_override_wins_and_null_clears(tmp_path: Path) -> None:
    path = write(tmp_path, VALID)
    config = load_config(path, ["train.lr=1", "train.lr=2e-3", "train.clip_norm=null", "model.variant=null"])
    assert (config.train.lr, config.train.clip_norm, config.model.variant) == (2e-3, None, None)


@pytest.mark.parametrize("text", ["1e5", "007", "on", "a=b", "clips #1", "[x", "2024-01-01"])
def test_text_overrides_are_taken_literally(tmp_path: Path, text: str) -> None:
    assert load_config(write(tmp_path, VALID), [f"run.name={text}"]).run.name == text


def test_the_choice_no_needs_no_quotes_in_an_override(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, VALID), ["train.precision=no"]).train.precision == "no"


def test_an_empty_mapping_is_all_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "run: {}\n")) == Config()


MISTAKES = {
    "unknown key": (
        "data:\n  widht: 96\n",
        "c.yaml:2: unknown key data.widht. Did you mean data.width?",
    ),
    "key of another section": (
        "data:\n  batch_size: 2\n",
        "c.yaml:2: unknown key data.batch_size. Did you mean train.batch_size?",
    ),
    "key like no other": (
        "objective:\n  zzz: 2\n",
        "c.yaml:2: unknown key objective.zzz. Keys of objective: p_mean, p_std.",
    ),
    "unknown section": ("dta:\n  width: 96\n", "c.yaml:1: unknown section 'dta'. Did you mean 'data'?"),
    "option without section": ("\nwidth: 96\n", "c.yaml:2: unknown section 'width'. Did you mean data.width?"),
    "number as section": ("1: 2\n", "c.yaml:1: unknown section '1'. Sections: run, model, data,"),
    "wrong type": ("data:\n  width: abc\n", "c.yaml:2: data.width: got 'abc', expected a whole number"),
    "fraction": ("data:\n\n  width: 1.5\n", "c.yaml:3: data.width: got 1.5, expected a whole number"),
    "boolean for a number": ("run: {seed: true}", "c.yaml:1: run.seed: got True, expected a whole number"),
    "null where there is none": ("train: {lr: null}", "c.yaml:1: train.lr: got None, expected a number"),
    "text that YAML reads as a number": (
        "model:\n  revision: 12345e7\n",
        "c.yaml:2: model.revision: got 123450000000.0, expected text or null; put it in quotes, "
        "or YAML reads it as a float",
    ),
    "text that YAML reads as a whole number": (
        "model:\n  revision: 12\n",
        "c.yaml:2: model.revision: got 12, expected text or null; put it in quotes, or YAML reads it as an int",
    ),
    "the choice no without quotes": (
        "train:\n  precision: no\n",
        "c.yaml:2: train.precision: got False, expected one of bf16, fp16, no; put it in quotes, "
        "or YAML reads it as a bool",
    ),
    "not a choice": (
        "data:\n  resize: crop\n",
        "c.yaml:2: data.resize: got 'crop', expected one of cover, pad, squash",
    ),
    "not a choice in a list": (
        "tracking:\n  backends: [wandb, mlflow]\n",
        "c.yaml:2: tracking.backends: got ['wandb', 'mlflow'], expected a list [...] of one of wandb, tensorboard",
    ),
    "no list": (
        "tracking: {backends: wandb}",
        "c.yaml:1: tracking.backends: got 'wandb', expected a list [...] of one of wandb, tensorboard",
    ),
    "tuple too long": (
        "conditioning:\n  noise_aug: [1, 2, 3]\n",
        "c.yaml:2: conditioning.noise_aug: got [1, 2, 3], expected a list of 2: [a number, a number]",
    ),
    "tuple of text": (
        "train:\n  betas: [0.9, a]\n",
        "c.yaml:2: train.betas: got [0.9, 'a'], expected a list of 2: [a number, a number]",
    ),
    "mapping for a number": ("train: {lr: {a: 1}}", "c.yaml:1: train.lr: got {'a': 1}, expected a number"),
    "duplicate key": (
        "data:\n  width: 96\n  height: 64\n  width: 128\n",
        "c.yaml:4: data.width is given twice, first in line 2; keep one",
    ),
    "duplicate section": ("run: {}\ndata: {}\nrun: {}\n", "c.yaml:3: run is given twice, first in line 1; keep one"),
    "tab": (
        "data:\n\twidth: 96\n",
        "c.yaml:2: not valid YAML: found character '\\t' that cannot start any token. "
        "YAML is indented by spaces; replace the tab.",
    ),
    "open bracket": ("data:\n  width: [1\ntrain: {}\n", "c.yaml:3: not valid YAML: expected ',' or ']', but got ':'"),
    "python object": (
        "run:\n  name: !!python/object/apply:os.getcwd []\n",
        "c.yaml:2: not valid YAML: could not determine a constructor for the tag",
    ),
    "merge key": ("run: &r {seed: 1}\ndata:\n  <<: *r\n", "c.yaml:3: got the key '<<', expected a plain name"),
    "list as key": ("? [a]\n: 1\n", "c.yaml:1: got the key "),
    "list instead of sections": ("- run\n", "c.yaml:1: expected sections such as `run:` and `data:`, got '- run'"),
    "text instead of sections": ("hello", "c.yaml:1: expected sections such as `run:` and `data:`, got 'hello'"),
    "empty": ("# nothing\n", "c.yaml: the file is empty; expected sections such as run:, data:, train:"),
    "empty section": (
        "run:\n  seed: 1\ndata:\n",
        "c.yaml:3: data: got nothing, expected options below it, such as `root: ...`. "
        "To keep all defaults remove the section",
    ),
    "section is a value": ("data: clips/\n", "c.yaml:1: data: got 'clips/', expected options below it"),
    "out of range": (
        "run:\n  seed: 1\ndata:\n  width: 100\n",
        "c.yaml:4: data.width: got 100, expected a multiple of 8 from 16 up (nearest: 96)",
    ),
    "seed too large": (
        "run: {seed: 4294967296}",
        "c.yaml:1: run.seed: got 4294967296, expected a whole number from 0 to 4294967295",
    ),
    "guidance that falls": (
        "validation: {guidance: [3, 1]}",
        "c.yaml:1: validation.guidance: got (3.0, 1.0), expected [first frame, last frame] with 0 <= first <= last",
    ),
    "guidance below 0": ("validation: {guidance: [-1, 1]}", "c.yaml:1: validation.guidance: got (-1.0, 1.0), expected"),
    "infinite": ("train: {lr: .inf}", "c.yaml:1: train.lr: got inf, expected a finite number"),
    "not a number": ("objective: {p_mean: .nan}", "c.yaml:1: objective.p_mean: got nan, expected a finite number"),
    "infinite in a list": (
        "validation: {sigmas: [1, .inf]}",
        "c.yaml:1: validation.sigmas: got [1.0, inf], expected finite numbers",
    ),
    "not a number in a tuple": (
        "conditioning: {noise_aug: [.nan, 0.5]}",
        "c.yaml:1: conditioning.noise_aug: got (nan, 0.5), expected finite numbers",
    ),
    "cross-field": (
        "train:\n  steps: 3\n  warmup: 5\n",
        "c.yaml:3: train.warmup: got 5, expected at most train.steps = 3",
    ),
    "cross-field against a default": (
        "train:\n  steps: 3\n",
        "c.yaml (default): train.warmup: got 100, expected at most train.steps = 3",
    ),
    "lora option without lora": (
        "adapt:\n  method: full\n  dora: true\n",
        "c.yaml:3: adapt.dora: got True, expected False with adapt.method full: it acts only with method lora",
    ),
    "unknown reference": (
        "run:\n  seed: ${run.sed}\n",
        "c.yaml:2: run.seed: Interpolation key 'run.sed' not found",
    ),
    "reference of the wrong type": ("run:\n  seed: ${data.root}\n", "c.yaml:2: run.seed: While dereferencing"),
    "reference to a missing variable": (
        "data:\n  root: ${oc.env:SVDTUNE_NOT_SET}\n",
        "c.yaml:2: data.root: Environment variable 'SVDTUNE_NOT_SET' not found",
    ),
    "secret": (
        "run: {}\ntracking:\n  project: ${oc.env:WANDB_API_KEY}\n",
        "c.yaml:3: tracking.project: reads the environment variable WANDB_API_KEY, whose name sounds like a secret",
    ),
    "secret in a list": (
        "adapt:\n  targets: ['a${oc.env:hf_token,none}']\n",
        "c.yaml:2: adapt.targets: reads the environment variable hf_token",
    ),
    "secret through a name": (
        "run: {name: WANDB_API_KEY}\ntracking:\n  project: ${oc.env:${run.name}}\n",
        "c.yaml:3: tracking.project: got '${oc.env:${run.name}}', expected no other interpolation than",
    ),
    "other resolver": (
        "run:\n  name: ${oc.decode:abc}\n",
        "c.yaml:2: run.name: got '${oc.decode:abc}', expected no other",
    ),
}


@pytest.mark.parametrize(("text", "sentence"), MISTAKES.values(), ids=MISTAKES)
def test_mistake_in_the_file(tmp_path: Path, text: str, sentence: str) -> None:
    message = error_of(write(tmp_path, text))
    assert message.startswith(sentence)
    assert "\n" not in message


OVERRIDE_MISTAKES = {
    "data.widht=3": "unknown key data.widht. Did you mean data.width?",
    "dta.width=3": "unknown section 'dta'. Did you mean 'data'?",
    "width=3": "unknown section 'width'. Did you mean data.width?",
    "train=": "'train' is a section; expected section.key=value, such as train.steps=...",
    "data.width": "no '='; expected section.key=value, such as train.steps=100",
    "data.width=a=b": "data.width: got 'a=b', expected a whole number",
    "data.width=": "data.width: got None, expected a whole number",
    "run.name=": "run.name: got None, expected text",
    "data.resize=crop": "data.resize: got 'crop', expected one of cover, pad, squash",
    "train.betas=[0.9": "'[0.9' is not valid YAML:",
    "train.betas=[0.9]": "train.betas: got [0.9], expected a list of 2: [a number, a number]",
    "train.steps=4": "",
    "data.fps=0": "data.fps: got 0.0, expected in [0.001, 240]",
    "tracking.project=${oc.env:HF_TOKEN}": "tracking.project: reads the environment variable HF_TOKEN",
    "data.root.x=3": "unknown key data.root.x. Did you mean data.root?",
}


@pytest.mark.parametrize(("override", "sentence"), OVERRIDE_MISTAKES.items())
def test_mistake_in_an_override_names_the_override(tmp_path: Path, override: str, sentence: str) -> None:
    path = write(tmp_path, VALID)
    if override == "train.steps=4":  # the cross-field check finds the line of the other key
        assert error_of(path, override).startswith("c.yaml:8: train.warmup: got 5, expected at most train.steps = 4")
    else:
        assert error_of(path, override).startswith(f"override {override!r}: {sentence}")


def test_no_such_file_names_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tniy.yaml"
    assert error_of(path) == "tniy.yaml: no such file."
    write(tmp_path, VALID, "other.yaml")
    assert error_of(path) == f"tniy.yaml: no such file. There are: {tmp_path / 'other.yaml'}."
    for number in range(6):
        write(tmp_path, VALID, f"{number}.yaml")
    listed = ", ".join(str(tmp_path / f"{number}.yaml") for number in range(5))
    assert error_of(path) == f"tniy.yaml: no such file. There are: {listed} and 2 more."
    write(tmp_path, VALID, "tiny.yaml")
    assert error_of(path) == f"tniy.yaml: no such file. Did you mean {tmp_path / 'tiny.yaml'}?"


def test_a_folder_or_a_binary_is_no_config(tmp_path: Path) -> None:
    assert "cannot be read as text: [Errno 21] Is a directory" in error_of(tmp_path)
    (tmp_path / "weights.yaml").write_bytes(b"\xff\xfe\x00\x80")
    assert "cannot be read as text: 'utf-8' codec" in error_of(tmp_path / "weights.yaml")


def test_environment_and_references_resolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPS_AT", "/planted/place")
    text = "data: {root: '${oc.env:CLIPS_AT}/x', num_frames: 9}\nrun: {seed: '${data.num_frames}'}\n"
    config = load_config(write(tmp_path, text))
    assert (config.data.root, config.run.seed) == ("/planted/place/x", 9)
    assert load_config(write(tmp_path, "data: {root: '${oc.env:SVDTUNE_NOT_SET,here}'}")).data.root == "here"


def test_resolved_yaml_loads_again_and_never_holds_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIPS_AT", "/planted/place")
    text = VALID.replace("data:", "data:\n  root: ${oc.env:CLIPS_AT}/x")
    config = load_config(write(tmp_path, text), ["adapt.alpha=8", "run.dir=${oc.env:CLIPS_AT}", "model.revision='1'"])
    dumped = resolved_yaml(config)
    assert "planted" not in dumped
    assert "root: ${oc.env:CLIPS_AT}/x" in dumped
    again = load_config(write(tmp_path, dumped, "again.yaml"))
    assert again == config
    assert resolved_yaml(again) == dumped
    assert all(f"{key.partition('.')[2]}:" in dumped for key in option_types())


def test_an_override_replaces_an_interpolation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPS_AT", "/planted/place")
    config = load_config(write(tmp_path, "data: {root: '${oc.env:CLIPS_AT}'}"), ["data.root=mine"])
    assert config.data.root == "mine"
    assert "root: mine" in resolved_yaml(config)


def test_resolved_yaml_of_a_config_made_in_python(tmp_path: Path) -> None:
    config = replace(Config(), train=Train(lr=3e-7, betas=(0.5, 0.75)))
    assert load_config(write(tmp_path, resolved_yaml(config))) == config


@pytest.mark.parametrize("key", ["run.dir", "data.root", "model.pretrained", "validation.images"])
def test_a_path_in_the_home_folder(tmp_path, monkeypatch, key):
    monkeypatch.setenv("HOME", str(tmp_path))
    section, name = key.split(".")
    value = "[~/x]" if key == "validation.images" else "~/x"
    loaded = getattr(getattr(load_config(CONFIGS / "tiny.yaml", [f"{key}={value}"]), section), name)
    assert loaded == ([str(tmp_path / "x")] if key == "validation.images" else str(tmp_path / "x"))
    with pytest.raises(ConfigError, match=f"{key}: got .* expected a folder of a user that exists"):
        load_config(CONFIGS / "tiny.yaml", [f"{key}={value.replace('~', '~nobodyhere')}"])


def test_a_path_that_no_file_can_have():
    with pytest.raises(ConfigError, match=r"data.root: got .* expected a path that a file can have"):
        load_config(CONFIGS / "tiny.yaml", [f"data.root={'a' * 5000}"])
