"""Several pictures, seeds and models: what is written where, what is in it, what is said, and that nothing is left behind."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sample_runs import comment_of, export, frames_of, pngs_of, save, tree, write_config

from svdtune import __version__
from svdtune.checkpoint.manifest import file_facts, read_manifest
from svdtune.errors import DataError, UsageError
from svdtune.model.source import weights_hash
from svdtune.sample import cli
from svdtune.sample.cli import Request, sample
from svdtune.sample.images import find_pictures
from svdtune.sample.shot import Asked
from svdtune.sample.sources import Choice

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture
def trained(run: Path) -> Path:
    save(run, 1, shift=0.1)
    save(run, 2, shift=0.3)
    return run


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, name in enumerate(("shot 10.png", "shot 9.JPG")):
        Image.new("RGB", (24, 16), (200 * index, 100, 50)).save(folder / name)
    (folder / ".hidden.png").touch()
    (folder / "notes.txt").touch()
    (folder / "sub.png").mkdir()
    return folder


def made(source: object, image: Path, out: Path | None = None, *, sheet: bool = False, frames: bool = False,
         seeds: tuple[int, ...] = (0,), asked: Asked | None = None, **choice) -> list[Path]:  # fmt: skip
    return list(sample(Request(Choice(str(source), **choice), image, out, seeds, asked or Asked(), frames, sheet)))


def message(kind: type[Exception], *args, **kwargs) -> str:
    with pytest.raises(kind) as error:
        made(*args, **kwargs)
    return str(error.value)


def test_pictures_and_seeds(trained: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    paths = made(trained, pictures, out, seeds=(1, 2, 1))
    names = ["shot 9-seed1.mp4", "shot 9-seed2.mp4", "shot 10-seed1.mp4", "shot 10-seed2.mp4"]
    assert [str(path.relative_to(out)) for path in paths] == names
    assert tree(out) == set(names)
    assert len({path.read_bytes() for path in paths}) == 4
    lines = capsys.readouterr().err.splitlines()
    pattern = r"video 2/4 step-00000002 shot 9\.JPG seed 2: \d+\.\d s -> " + re.escape(str(paths[1]))
    assert len(lines) == 4
    assert re.fullmatch(pattern, lines[1])
    # The same noise whatever else is made beside it.
    (alone,) = made(trained, pictures / "shot 10.png", tmp_path / "alone.mp4", seeds=(2,))
    assert alone.read_bytes() == paths[3].read_bytes()


def test_what_a_video_says_of_itself(trained: Path, image: Path, model_folder: Path, tmp_path: Path) -> None:
    video, folder = made(
        trained, image, tmp_path / "a.mp4", frames=True, seeds=(5,), asked=Asked(steps=3), lora_scale=0.5
    )
    text = comment_of(video)
    checkpoint = trained / "checkpoints" / "step-00000002"
    assert json.loads(text) == {
        "svdtune": __version__, "image": "first.png", "seed": 5, "height": 16, "width": 24, "resize": "cover",
        "settings": {
            "num_frames": 4, "fps": 7.5, "motion_bucket_id": 50, "noise_aug_strength": 0.02, "num_inference_steps": 3,
            "min_guidance_scale": 1.0, "max_guidance_scale": 2.0, "decode_chunk_size": 4, "precision": "no",
        },
        "model": {
            "label": "step-00000002 x 0.5", "source": "shapes", "checkpoint": "step-00000002", "variant": None,
            "weights": read_manifest(checkpoint).files["lora.safetensors"].sha256, "lora": None, "lora_sha256": None, "lora_scale": 0.5,
        },
    }  # fmt: skip
    assert str(tmp_path) not in text
    assert [path.name for path in sorted(folder.iterdir())] == ["0001.png", "0002.png", "0003.png", "0004.png"]
    assert {Image.open(path).text["comment"] for path in folder.iterdir()} == {text}
    assert b"tEXtcomment" in (folder / "0001.png").read_bytes()
    pixels = pngs_of(folder)
    assert pixels.shape == (4, 16, 24, 3)
    off = np.abs(frames_of(video)[:, None] - pixels[None]).mean(axis=(2, 3, 4))  # noise, in a lossy codec
    assert off.argmin(axis=1).tolist() == [0, 1, 2, 3]
    again, folder_again = made(
        trained, image, tmp_path / "b.mp4", frames=True, seeds=(5,), asked=Asked(steps=3), lora_scale=0.5
    )
    assert again.read_bytes() == video.read_bytes()
    assert (folder_again / "0003.png").read_bytes() == (folder / "0003.png").read_bytes()


def test_what_a_video_of_a_lora_and_of_a_base_says(
    trained: Path, image: Path, model_folder: Path, tmp_path: Path
) -> None:
    adapter = export(trained / "checkpoints" / "step-00000002", tmp_path / "mine")
    paths = made(model_folder, image, tmp_path / "out", lora=adapter, lora_scale=0.75, compare=True)
    assert [path.name for path in paths] == [
        "first-seed0-mine-x-0.75.mp4", "first-seed0-base.mp4", "first-seed0-compare.mp4", "first-seed0-compare-sheet.png",
    ]  # fmt: skip
    unet = weights_hash(model_folder, "unet", None)
    lora = {"lora": "mine", "lora_sha256": file_facts(adapter / "adapter_model.safetensors").sha256, "lora_scale": 0.75}
    common = {"source": "base", "checkpoint": None, "variant": None, "weights": unet}
    ours = {"label": "mine x 0.75", **common, **lora}
    base = {"label": "base", **common, "lora": None, "lora_sha256": None, "lora_scale": None}
    assert [json.loads(comment_of(path))["model"] for path in paths[:2]] == [ours, base]
    assert json.loads(comment_of(paths[2]))["models"] == [base, ours]
    assert all(str(tmp_path) not in comment_of(path) for path in paths[:3])


def test_compare(trained: Path, pictures: Path, tmp_path: Path) -> None:
    """The base first, then each checkpoint from the oldest on; every part of the picture is that model's own video."""
    out = tmp_path / "out"
    paths = made(trained, pictures, out, compare=True, seeds=(0, 1), frames=True, sheet=True)
    models = ("base", "step-00000001", "step-00000002")
    singles = {f"shot {n}-seed{seed}-{model}" for n in (9, 10) for seed in (0, 1) for model in models}
    both = {f"shot {n}-seed{seed}-compare" for n in (9, 10) for seed in (0, 1)}
    assert {path.stem for path in paths if path.suffix == ".mp4"} == singles | both
    assert {path.name for path in (out / "sheets").iterdir()} == {f"{name}-sheet.png" for name in both} | {
        "contact_sheet.png"
    }
    assert set(paths) == {
        path for path in out.rglob("*") if path.name != "sheets" and not path.parent.name.endswith("-frames")
    }

    alone = made(
        model_of(trained), pictures / "shot 10.png", tmp_path / "base.mp4", frames=True, seeds=(1,), asked=as_trained()
    )
    base = pngs_of(out / "shot 10-seed1-base-frames")
    np.testing.assert_array_equal(base, pngs_of(alone[1]))
    video = frames_of(out / "shot 10-seed1-compare.mp4")
    cells = [pngs_of(out / f"shot 10-seed1-{model}-frames") for model in models]
    across, down = 24 * 14, 16 * 14  # grown to 320 pixels or more
    assert video.shape == (4, 2 * 16 + 37 + down + (37 + down) % 2, 2 * 16 + 3 * across + 2 * 12, 3)
    for index, cell in enumerate(cells):
        left, top = 16 + index * (across + 12), 16 + 37
        shown = video[:, top : top + down, left : left + across]
        centres = shown[:, 7::14, 7::14]
        off = [np.abs(centres - other).mean() for other in cells]
        assert off[index] == min(off) < 6
        assert shown[0, :, -8:].mean() == pytest.approx(cell[0, :, -1].mean(), abs=8)
    for left in (16, 16 + across + 12, 16 + 2 * (across + 12)):
        assert (video[0, 16:46, left : left + 60] < 120).sum() > 100  # a label
    assert video[0, 16 + 37 :, 16 + across + 4 : 16 + across + 8].min() > 235  # paper between


def model_of(run: Path) -> Path:
    return run.parent.parent / "base"


def as_trained() -> Asked:
    return Asked(4, 7.5, 50, 0.02, 2, 1.0, 2.0, 16, 24)


def test_compare_chosen_checkpoints(trained: Path, image: Path, tmp_path: Path) -> None:
    paths = made(trained, image, tmp_path / "out", compare=True, checkpoints=("1", "step-00000001"))
    assert [path.stem for path in paths] == [
        "first-seed0-step-00000001", "first-seed0-base", "first-seed0-compare", "first-seed0-compare-sheet",
    ]  # fmt: skip
    paths = made(trained, image, tmp_path / "two", checkpoints=("1", "2"))
    assert sorted(path.stem for path in paths) == ["first-seed0-step-00000001", "first-seed0-step-00000002"]
    paths = made(trained / "checkpoints" / "step-00000001", image, tmp_path / "one", compare=True)
    assert [path.stem for path in paths][:2] == ["first-seed0-step-00000001", "first-seed0-base"]


def test_compare_leaves_out_damaged_checkpoints(
    trained: Path, image: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (trained / "checkpoints" / "step-00000001" / "lora.safetensors").write_bytes(b"")
    names = {path.stem for path in made(trained, image, tmp_path / "out", compare=True)}
    assert "first-seed0-step-00000002" in names
    assert "first-seed0-step-00000001" not in names
    assert "skipped step-00000001: " in caplog.text


def test_compare_starts_from_the_same_noise(trained: Path, image: Path, model_folder: Path, tmp_path: Path) -> None:
    """A checkpoint that learned nothing is the base, to the bit."""
    save(trained, 3, shift=0.0)
    made(trained, image, tmp_path / "out", compare=True, checkpoints=("3",), frames=True, seeds=(4,))
    base, tuned = (pngs_of(tmp_path / "out" / f"first-seed4-{name}-frames") for name in ("base", "step-00000003"))
    np.testing.assert_array_equal(base, tuned)


def test_one_sheet_of_all(trained: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    monkeypatch.setattr(cli, "contact_sheet", lambda path, given: rows.append((path, [title for title, _ in given])))
    made(trained, pictures, tmp_path / "out", sheet=True, seeds=(0, 3))
    assert rows == [
        (
            tmp_path / "out" / "sheets" / "contact_sheet.png",
            [f"step-00000002   {name}   seed {seed}" for name in ("shot 9.JPG", "shot 10.png") for seed in (0, 3)],
        )
    ]


def test_where_it_goes(
    trained: Path, image: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small = Asked(height=16, width=24, steps=1)
    assert made(trained, image) == [trained / "samples" / "first-seed0.mp4"]
    assert made(model_folder, image, asked=small) == [Path("samples/first-seed0.mp4")]
    assert made(model_folder, image, Path("x.mp4"), asked=small) == [Path("x.mp4")]
    assert made(model_folder, image, Path("v1.2"), asked=small) == [Path("v1.2/first-seed0.mp4")]
    (tmp_path / "folder.mp4").mkdir()
    assert made(model_folder, image, Path("folder.mp4"), asked=small) == [Path("folder.mp4/first-seed0.mp4")]


def test_pictures_of_one_stem(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    assert [picture.name for picture in find_pictures(tmp_path)] == ["a.jpg", "a.png", "b.png"]
    (tmp_path / "a.jpg").unlink()
    assert [picture.name for picture in find_pictures(tmp_path)] == ["a", "b"]


# What is refused, before anything is loaded or written.


def test_refused(trained: Path, pictures: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_load", lambda *_: pytest.fail("a model was loaded"))
    before = tree(tmp_path)
    out = tmp_path / "new" / "out"
    assert message(UsageError, trained, pictures, tmp_path / "x.mp4") == (
        f"--out: got {tmp_path}/x.mp4, one file for 2 videos. Give a folder: --out {tmp_path}/x"
    )
    assert "one file for 3 videos" in message(UsageError, trained, image, tmp_path / "x.mp4", compare=True)
    assert message(UsageError, trained, image, image) == (
        f"--out: got {image}, expected a folder, or the path of a file that ends in .mp4"
    )
    assert message(UsageError, trained, image, out, asked=Asked(height=17)) == (
        "height: got 17, expected a multiple of 2, as the VAE makes one latent of 2 x 2 pixels. Nearest: 16 or 18."
    )
    assert message(UsageError, trained, image, out, asked=Asked(width=-3)).endswith("Nearest: 2.")
    assert (
        message(UsageError, trained, image, out, asked=Asked(decode_chunk=0))
        == "decode_chunk_size: got 0, expected >= 1"
    )
    empty = tmp_path / "pictures" / "sub.png"
    assert message(DataError, trained, empty, out) == (
        f"image {empty}: this folder holds no pictures (.png, .jpg, .jpeg, .webp, .bmp), and its subfolders are not searched. "
        "Give a folder of pictures, or one picture."
    )
    (pictures / "shot 11.png").write_text("broken")
    assert message(DataError, trained, pictures, out).startswith(f"image {pictures}/shot 11.png: this is not a picture")
    (pictures / "shot 11.png").unlink()
    assert tree(tmp_path) == before


def test_nothing_is_replaced_that_is_no_result(trained: Path, image: Path, tmp_path: Path) -> None:
    frames = tmp_path / "out" / "first-seed0-frames"
    frames.mkdir(parents=True)
    (frames / "mine.psd").touch()
    assert message(UsageError, trained, image, tmp_path / "out", frames=True) == (
        f"--frames: {frames} holds something else than frames (mine.psd). Rename it, or give another --out."
    )
    (frames / "mine.psd").rename(frames / "0009.png")
    made(trained, image, tmp_path / "out", frames=True)
    assert len(list(frames.iterdir())) == 4
    (tmp_path / "out" / "first-seed1.mp4").mkdir()
    assert "is a folder, and a file of that name is to be written" in message(
        UsageError, trained, image, tmp_path / "out", seeds=(1,)
    )
    adapter = export(trained / "checkpoints" / "step-00000002", tmp_path / "mine" / "base")
    text = message(UsageError, model_of(trained), image, tmp_path / "out", lora=adapter, compare=True)
    assert (
        text
        == f"--out: two results would have the name {tmp_path}/out/first-seed0-base.mp4. Rename the LoRA or the picture."
    )


@pytest.mark.parametrize("interrupted", [0, 1, 2])
def test_interrupted(
    trained: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: int
) -> None:
    """Finished videos stay whole, and nothing half done does; a folder that stayed empty goes."""
    calls = []
    real = cli.sample_video

    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) > interrupted:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(cli, "sample_video", dies)
    monkeypatch.setattr(cli.tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    paths = []
    with pytest.raises(KeyboardInterrupt):
        paths.extend(sample(Request(Choice(str(trained)), image, tmp_path / "new" / "out", (0, 1, 2, 3), sheet=True)))
    written = sorted(path for path in (tmp_path / "new").rglob("*.mp4")) if interrupted else []
    assert [path.name for path in written] == [f"first-seed{seed}.mp4" for seed in range(interrupted)]
    assert all(frames_of(path).shape == (4, 16, 24, 3) for path in written)
    assert (tmp_path / "new").exists() == bool(interrupted)
    assert tree(tmp_path / "tmp") == set()


def test_other_numbers_than_trained_are_said_once(trained: Path, image: Path, model_folder: Path, tmp_path: Path,
                                                  capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    made(trained, image, tmp_path / "a", asked=Asked(num_frames=3, fps=7.5, width=32, steps=1), compare=True)
    assert capsys.readouterr().err.splitlines()[0] == "num_frames: 3, trained with 4; width: 32, trained with 24"
    made(trained, image, tmp_path / "b", asked=Asked(num_frames=4, steps=1, noise_aug_strength=0.1))
    made(model_folder, image, tmp_path / "c", asked=Asked(num_frames=2, height=16, width=16, steps=1))
    assert "trained with" not in capsys.readouterr().err
    write_config(trained, model_folder, "data.num_frames=5")
    save(trained, 3)
    made(trained, image, tmp_path / "d", checkpoints=("1", "2", "3"), asked=Asked(steps=1))
    assert capsys.readouterr().err.count("num_frames: 5, trained with 4") == 1


def test_the_command(
    trained: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """stdout is the path and nothing else, so that a script can take it."""
    from svdtune.cli import main

    monkeypatch.setattr(sys, "argv", ["svdtune", "sample", str(trained), str(image), "--steps", "1"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    assert capsys.readouterr().out == f"{trained}/samples/first-seed0.mp4\n"
    arguments = [
        "--checkpoint",
        "1",
        "--checkpoint",
        "2",
        "--seed",
        "1",
        "--seed",
        "2",
        "--out",
        str(tmp_path / "out"),
        "--compare",
    ]
    monkeypatch.setattr(
        sys, "argv", ["svdtune", "sample", str(trained), str(image), "--steps", "1", "--frames", *arguments]
    )
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(set(lines)) == 3 * 2 * 2 + 2 * 2
    assert all(Path(line).exists() for line in lines)
    monkeypatch.setattr(sys, "argv", ["svdtune", "sample", str(trained), str(image), "--seed", "-1"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert (stopped.value.code, capsys.readouterr().err) == (
        2,
        "error: seed: got -1, expected a whole number from 0 to 2**63 - 1\n",
    )


def test_a_terminal_sees_a_bar_and_stdout_stays_clean(
    trained: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    err, out = Terminal(), io.StringIO()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(sys, "stdout", out)
    real = cli.sample_video
    monkeypatch.setattr(cli, "sample_video", lambda *args, **kwargs: print("a library") or real(*args, **kwargs))
    made(trained, image, seeds=(0, 1), asked=Asked(steps=3))
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", err.getvalue())
    assert "video 2/2 step-00000002 first.png seed 1" in shown
    assert "3/3" in shown
    assert "->" not in shown
    assert out.getvalue() == "a library\n" * 2  # the bar takes nothing of it to stderr
