"""`svdtune sample`: from a run folder to an mp4, and every way to ask for what is not there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from sample_runs import frames_of, save, write_config

from svdtune.errors import CheckpointError, DataError, ModelError, UsageError
from svdtune.sample import cli
from svdtune.sample.cli import sample_run
from svdtune.sample.run import find_checkpoint
from svdtune.sample.shot import Asked, plan_shot
from svdtune.sample.sources import Choice, open_subjects

KINDS = "SOURCE is a run, a checkpoint, a diffusers folder, a single file (svd_xt.safetensors), a hub id (owner/name) or 'tiny'."
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def settings_of(monkeypatch: pytest.MonkeyPatch) -> list:
    """The settings that reach the sampler; nothing is sampled."""
    seen: list = []

    def record(pipeline, image, settings, *, seed, on_step):
        seen.append((settings, tuple(image.shape), seed))
        return np.zeros((2, 16, 24, 3), np.uint8)

    monkeypatch.setattr(cli, "sample_video", record)
    monkeypatch.setattr(cli, "_load", lambda *_: None)
    return seen


@pytest.mark.parametrize("method", ["lora", "full"])
def test_writes_a_video_of_the_trained_weights(run: Path, image: Path, model_folder: Path, method: str) -> None:
    write_config(run, model_folder, f"adapt.method={method}")
    save(run, 1)
    save(run, 2, shift=0.3)
    path = sample_run(run, image)
    assert path == run / "samples" / "first-seed0.mp4"
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.frames, stream.width, stream.height, stream.average_rate) == (4, 24, 16, 7.5)
    base = sample_run(run, image, checkpoints=("1",), out=run / "base.mp4")
    assert base == run / "base.mp4"
    assert np.abs(frames_of(path) - frames_of(base)).mean() > 3
    again = sample_run(run, image, checkpoints=("step-00000002",), out=run / "again.mp4")
    assert again.read_bytes() == path.read_bytes()


def test_ema_is_preferred(run: Path, image: Path) -> None:
    save(run, 1, shift=0.3)
    save(run, 2, shift=-0.2, ema_shift=0.3)
    save(run, 3, shift=-0.2)
    with_ema, moved, raw = (
        frames_of(sample_run(run, image, checkpoints=(name,), out=run / f"{name}.mp4")) for name in ("2", "1", "3")
    )
    other = np.abs(with_ema - raw).mean()
    assert other > 3
    # The same weights but for rounding, which the random network and the video codec enlarge.
    assert np.abs(with_ema - moved).mean() < other / 3


def test_settings_are_those_of_training(
    run: Path, image: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest speaks, not a configuration that was edited since."""
    save(run, 1)
    write_config(run, model_folder, "data.fps=30", "data.num_frames=9", "data.height=64", "validation.guidance=[5,5]")
    seen = settings_of(monkeypatch)
    sample_run(run, image)
    settings, shape, seed = seen[0]
    assert (settings.num_frames, settings.fps, settings.motion_bucket_id, settings.num_inference_steps) == (
        4,
        7.5,
        50,
        2,
    )
    assert (settings.min_guidance_scale, settings.max_guidance_scale, settings.noise_aug_strength) == (1.0, 2.0, 0.02)
    assert (shape, seed) == ((3, 16, 24), 0)


def test_settings_given(run: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(run, 1)
    seen = settings_of(monkeypatch)
    asked = Asked(
        num_frames=3, fps=12, motion_bucket=200, noise_aug_strength=0, steps=5, guidance_min=0, guidance_max=1.5
    )
    path = sample_run(run, image, asked=asked, seeds=(7,))
    settings, _, seed = seen[0]
    assert (settings.num_frames, settings.fps, settings.motion_bucket_id, settings.num_inference_steps) == (
        3,
        12,
        200,
        5,
    )
    assert (settings.min_guidance_scale, settings.max_guidance_scale, settings.noise_aug_strength) == (0, 1.5, 0)
    assert (path.name, seed) == ("first-seed7.mp4", 7)


def message(kind: type[Exception], *args: object, **kwargs: object) -> str:
    with pytest.raises(kind) as error:
        sample_run(*args, **kwargs)
    return str(error.value)


def test_no_such_run(run: Path, image: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path / "runs")  # a checkout may hold runs/ of its own
    (run / "checkpoints").mkdir()
    assert message(UsageError, run.parent / "shaeps", image) == (
        f"no such run: {run.parent}/shaeps. Did you mean {run}?"
    )
    assert message(UsageError, run.parent / "zzz", image) == (
        f"no such run: {run.parent}/zzz. Runs: {run}. A run is the folder that `svdtune train` makes (run.dir/run.name). "
        + KINDS
    )


def test_name_without_its_folder(run: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "checkpoints").mkdir()
    monkeypatch.chdir(run.parent.parent)
    assert message(UsageError, Path("shapes"), image) == "no such run: shapes. Did you mean runs/shapes?"


def test_no_run_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert message(UsageError, Path("x"), Path("a.png")) == (
        "no such run: x. There is no run yet. A run is the folder that `svdtune train` makes (run.dir/run.name). "
        + KINDS
    )


def test_not_a_run(tmp_path: Path, image: Path) -> None:
    assert message(UsageError, tmp_path, image) == (
        f"{tmp_path} is no run (it has no checkpoints/) and no model (it has no unet/). {KINDS}"
    )


def test_no_checkpoint_yet(run: Path, image: Path) -> None:
    assert message(UsageError, run, image) == (
        f"run {run} has no checkpoint yet. One is saved every checkpoint.interval steps and at the last step; "
        "wait for it, or start the training again to go on."
    )


def test_named_checkpoint_missing(run: Path, image: Path) -> None:
    assert message(UsageError, run, image, checkpoints=("5",)) == (
        f"checkpoint 5: no such checkpoint in {run}/checkpoints; there is none yet."
    )
    save(run, 1)
    save(run, 2)
    assert message(UsageError, run, image, checkpoints=("step-5",)) == (
        f"checkpoint step-5: no such checkpoint in {run}/checkpoints; there: step-00000001, step-00000002."
    )


def test_damaged_checkpoints(run: Path, image: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(run, 1)
    newer = save(run, 2)
    (newer / "lora.safetensors").write_bytes(b"")
    assert find_checkpoint(run, None).name == "step-00000001"
    assert "skipped step-00000002: " in caplog.text
    assert message(CheckpointError, run, image, checkpoints=("2",)).startswith(f"{newer}/lora.safetensors: expected ")
    (run / "checkpoints" / "step-00000001" / "MANIFEST.json").unlink()
    assert message(CheckpointError, run, image).startswith(
        f"{run}/checkpoints: no checkpoint can be used.\n  step-00000002: {newer}/lora.safetensors: expected "
    )


def test_no_such_image(run: Path, image: Path) -> None:
    save(run, 1)
    assert message(DataError, run, image.with_name("firts.png")) == (
        f"image {image.parent}/firts.png: no such file. Did you mean {image}?"
    )
    image.write_text("no picture")
    assert message(DataError, run, image).startswith(f"image {image}: this is not a picture that Pillow can read.")


def test_bad_options(run: Path, image: Path) -> None:
    save(run, 1)
    assert message(UsageError, run, image, out=run / "a.gif") == (
        f"--out: got {run}/a.gif, expected a folder, or the path of a file that ends in .mp4"
    )
    for seed in (-1, 2**63):
        assert message(UsageError, run, image, seeds=(seed,)) == (
            f"seed: got {seed}, expected a whole number from 0 to 2**63 - 1"
        )
    assert message(UsageError, run, image, asked=Asked(num_frames=0)) == "num_frames: got 0, expected >= 2"


def test_out_that_cannot_be_written_is_refused_before_the_model_is_loaded(
    run: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(run, 1)
    monkeypatch.setattr(cli, "_load", lambda *_: pytest.fail("the model was loaded"))
    out = image / "x.mp4"
    fix = "Give with --out a path in a folder that can be written to."
    assert message(UsageError, run, image, out=out) == (
        f"--out: {out} cannot be written: {image} is a file, not a folder. {fix}"
    )
    assert message(UsageError, run, image, out=Path("/proc/nope/x.mp4")) == (
        f"--out: /proc/nope/x.mp4 cannot be written: No such file or directory. {fix}"
    )
    (run / "samples").touch()
    assert message(UsageError, run, image) == (
        f"--out: {run}/samples/first-seed0.mp4 cannot be written: {run}/samples is a file, not a folder. {fix}"
    )


def test_a_folder_that_refuses_files_is_found_before_the_model_is_loaded(
    run: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write anywhere but in /proc, where a folder that exists takes no files."""
    save(run, 1)
    monkeypatch.setattr(cli, "_load", lambda *_: pytest.fail("the model was loaded"))
    assert message(UsageError, run, image, out=Path("/proc/x.mp4")).startswith("--out: /proc/x.mp4 cannot be written: ")


def test_another_base(run: Path, image: Path) -> None:
    save(run, 1, base={"unet_sha256": "0" * 64})
    text = message(ModelError, run, image)
    assert text.startswith("model.pretrained: the UNet of ")
    assert text.endswith(
        "step-00000001 was trained on 0000000000000000…. Trained weights act only on their own base: restore it, or set "
        "model.revision to the old one."
    )


def test_convention_not_recorded(run: Path) -> None:
    folder = save(run, 1)
    (subject,) = open_subjects(Choice(str(run)))
    opened = subject.checkpoint
    assert opened is not None
    lacking = replace(opened, manifest=replace(opened.manifest, conventions={}))
    with pytest.raises(CheckpointError) as error:
        plan_shot(replace(subject, checkpoint=lacking, conventions={"guidance": [1, 2]}), Asked())
    assert str(error.value) == (
        f"{folder}/MANIFEST.json: the conventions have no 'num_frames', so it is unknown how this run was trained. "
        "Use the svdtune version that made the checkpoint."
    )
