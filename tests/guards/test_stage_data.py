"""The data stage, on real files of a few frames: what headers tell, and silence on clips that are right."""

from __future__ import annotations

import shutil
from fractions import Fraction
from pathlib import Path

import pytest

from svdtune.config.load import load_config, with_overrides
from svdtune.data import catalog
from svdtune.data.demo import write_demo
from svdtune.guards import clips
from svdtune.guards.clips import check_clips, sample
from tests.data.conftest import write_video

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"


def config(root, *overrides):
    """5 frames at 5 fps (0.8 s) of 48 x 64."""
    base = [f"data.root={root}", "data.num_frames=5", "data.fps=5", "data.height=48", "data.width=64"]
    return load_config(TINY, [*base, *overrides])


def video(root, name, *, shade=0, **options):
    """One file; `shade` makes its content another."""
    return write_video(root / name, frames=options.pop("frames", 20), options={"crf": str(20 + shade)}, **options)


@pytest.fixture
def root(tmp_path):
    """Three sound files of 20 frames at 10 fps, 48 x 64."""
    folder = tmp_path / "clips"
    for number in range(3):
        video(folder, f"{number}.mp4", shade=number)
    return folder


def codes(found):
    return [finding.code for finding in found]


def check(root, *overrides):
    """The findings, each patch tried: it must make its finding go away."""
    made = config(root, *overrides)
    found = check_clips(made)
    for finding in found:
        if finding.patch:
            assert finding.code not in codes(check_clips(with_overrides(made, finding.patch)))
    return found


def test_sound_files_are_silent(root):
    assert check(root) == []
    assert check(root, "data.resize=pad") == []
    assert check(root, "data.height=96", "data.width=128") == []  # twice as large is allowed
    assert check(root, "data.on_bad_clip=error") == []


def test_demo_clips_are_silent(tmp_path):
    write_demo(tmp_path / "demo", clips=4, motion="down", seed=0)
    assert check_clips(load_config(TINY, [f"data.root={tmp_path / 'demo'}"])) == []


def test_no_folder_and_no_videos(tmp_path):
    (found,) = check(tmp_path / "gone")
    assert (found.code, found.severity, found.where) == ("DAT301", "error", "data.root")
    assert found.got.startswith(f"no such folder: {tmp_path / 'gone'}")
    (found,) = check(tmp_path)
    assert "no videos in" in found.got


def test_files_that_cannot_be_read(root):
    (root / "text.mp4").write_text("no video")
    (found,) = check(root)
    assert (found.code, found.severity, found.where) == ("DAT302", "warning", str(root / "text.mp4"))
    assert found.got == "is a text file, not a video (it starts with 'no video')"
    assert found.why == "data.on_bad_clip=skip leaves such files out of training."
    (root / "text2.mp4").write_text("no video")
    (found,) = check(root, "data.on_bad_clip=error")
    assert (found.severity, found.where) == ("error", str(root))
    assert found.got.startswith("2 of 5 files: text.mp4, text2.mp4; the first is a text file")
    assert found.fix.endswith("or set data.on_bad_clip=skip.")


def test_none_that_can_be_used(tmp_path):
    for number in range(5):
        (tmp_path / f"{number}.mp4").write_text("no video")
    none, broken = check(tmp_path)
    assert (none.code, none.got) == ("DAT301", f"none of the 5 file(s) in {tmp_path} can be used")
    assert (broken.code, broken.severity) == ("DAT302", "error")
    assert "5 of 5 files: 0.mp4, 1.mp4, 2.mp4, ..." in broken.got


def test_one_short_file_is_left_out(root):
    video(root, "short.mp4", frames=4)
    (found,) = check(root)
    assert (found.code, found.severity, found.where) == ("DAT304", "warning", str(root / "short.mp4"))
    assert found.got == "0.30 s from first to last frame: 1 of 4 files: short.mp4"
    assert found.expected == "0.80 s for data.num_frames=5 at data.fps=5"
    assert found.patch == ()


def test_files_that_are_nearly_all_too_short_offer_the_fps_that_fits(root):
    none, found = check(root, "data.num_frames=14")
    assert (none.code, found.code, found.severity) == ("DAT301", "DAT304", "error")
    assert found.expected == "2.60 s for data.num_frames=14 at data.fps=5"
    assert found.patch == ("data.fps=6.9",)  # 13 intervals in 1.9 s
    assert check_clips(config(root, "data.num_frames=14", "data.fps=6.5")) != []


def test_files_too_short_at_any_fps_offer_the_frames_that_fit(root):
    _, found = check(root, "data.num_frames=25")
    assert (found.code, found.patch, found.fix) == ("DAT304", ("data.num_frames=10",), "Set data.num_frames=10.")
    assert check_clips(config(root, "data.num_frames=11")) != []


def test_files_slower_than_the_clip(root):
    none, found = check(root, "data.fps=15")
    assert (none.code, found.code, found.severity) == ("DAT301", "DAT305", "error")
    assert found.got == "10.00 frames per second: 3 of 3 files: 0.mp4, 1.mp4, 2.mp4"
    assert found.patch == ("data.fps=10",)
    assert "At data.fps=15 frames would repeat" in found.why


def test_one_slow_file_is_no_reason_to_slow_all_down(root):
    video(root, "slow.mp4", frames=20, fps=3)
    (found,) = check(root)
    assert (found.code, found.severity, found.patch) == ("DAT305", "warning", ())


@pytest.mark.parametrize(
    ("resize", "why"),
    [
        ("cover", "Cropping the centre throws away 67% of the picture."),
        ("pad", "Black borders fill 67% of the frame, and the model learns to paint them."),
        ("squash", "Pictures are stretched 3.0 times in one direction."),
    ],
)
def test_upright_files_for_a_wide_frame(tmp_path, resize, why):
    for number in range(2):
        video(tmp_path, f"{number}.mp4", shade=number, height=112, width=64)
    found = check(tmp_path, "data.height=56", "data.width=96", f"data.resize={resize}")
    assert [(f.code, f.severity, f.why) for f in found if f.code == "DAT306"] == [("DAT306", "warning", why)]
    assert found[0].patch == ("data.height=96", "data.width=56")
    assert check(tmp_path, "data.height=96", "data.width=56", f"data.resize={resize}") == []


def test_rotated_files_are_judged_as_shown(tmp_path):
    for number in range(2):
        video(tmp_path, f"{number}.mp4", shade=number, height=64, width=112, rotation=90)
    assert codes(check(tmp_path, "data.height=56", "data.width=96")) == ["DAT306"]


def test_pixels_that_are_not_square_count_as_shown(tmp_path):
    """64 x 64 pixels three times as wide as high are shown 192 x 64."""

    def wide(stream):
        stream.codec_context.sample_aspect_ratio = Fraction(3, 1)

    for number in range(2):
        video(tmp_path, f"{number}.mp4", shade=number, height=64, width=64, setup=wide)
    assert check(tmp_path, "data.height=64", "data.width=192") == []
    assert codes(check(tmp_path, "data.height=64", "data.width=64")) == ["DAT306"]


def test_small_files_for_a_large_frame(root):
    (found,) = check(root, "data.height=192", "data.width=256")
    assert (found.code, found.severity) == ("DAT307", "warning")
    assert found.got == "64x48 (width x height) and the like: 3 of 3 files: 0.mp4, 1.mp4, 2.mp4"
    assert found.why == "They are scaled up 4.0 times, and the model learns their blur."
    assert found.patch == ("data.height=64", "data.width=64")


def test_files_that_decord_reads_wrongly(tmp_path):
    for number in range(3):
        video(tmp_path, f"{number}.mp4", shade=number, width=96)
    assert check(tmp_path, "data.decoder=decord") == []
    video(tmp_path, "turned.mp4", rotation=180, width=96)
    assert check(tmp_path) == []
    (found,) = check(tmp_path, "data.decoder=decord")
    assert (found.code, found.patch) == ("DAT308", ("data.decoder=auto",))
    assert found.got == "the file is stored rotated or mirrored: 1 of 4 files: turned.mp4"


def test_files_all_of_which_decord_reads_wrongly(tmp_path):
    video(tmp_path, "turned.mp4", rotation=180)
    found = check(tmp_path, "data.decoder=decord", "data.holdout=0")
    assert [(f.code, f.severity) for f in found] == [("DAT301", "error"), ("DAT308", "error")]
    assert found[1].patch == ("data.decoder=auto",)


def test_all_files_are_one(root):
    for name in ("1.mp4", "2.mp4"):
        shutil.copy(root / "0.mp4", root / name)
    (found,) = check(root)
    assert (found.code, found.severity, found.got) == ("DAT309", "warning", "all 3 files looked at are copies of one")


def test_a_held_out_file_that_is_trained_on(root):
    made = config(root)
    held = catalog.scan(made.data).held_out[0].path
    trained = [index.path for index in catalog.scan(made.data).train]
    shutil.copy(held, trained[0])
    (found,) = check(root)
    assert (found.code, found.got) == (
        "DAT309",
        f"1 held-out file(s) equal a training file: {held.name} = {trained[0].name}",
    )
    assert check(root, "data.holdout=0") == []
    shutil.copy(trained[1], trained[0])  # twice among the training files: an oversampled clip
    assert check(root) == []


def test_a_single_file_cannot_be_held_out(root):
    for name in ("1.mp4", "2.mp4"):
        (root / name).unlink()
    (found,) = check(root)
    assert (found.code, found.severity, found.patch) == ("DAT310", "warning", ("validation.clips=0",))
    assert check(root, "data.holdout=0") == []


def test_a_validation_image_that_cannot_be_opened(root, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    (found,) = check(root, f"validation.images=[{tmp_path / 'text.png'}]")
    assert (found.code, found.severity, found.where) == ("DAT303", "error", "validation.images")
    assert str(tmp_path / "text.png") in found.got


@pytest.fixture
def many(tmp_path):
    """300 names, one of them broken; contents are links to three files."""
    folder = tmp_path / "many"
    folder.mkdir()
    made = [video(tmp_path / "of", f"{number}.mp4", shade=number) for number in range(3)]
    for number in range(299):
        (folder / f"{number:03}.mp4").symlink_to(made[number % 3])
    (folder / "broken.mp4").write_text("no video")
    return folder


def test_many_files_are_sampled_and_the_finding_says_so(many, monkeypatch):
    looked = []
    real = clips.index_files

    def index_files(root, paths, chosen):
        looked.append(list(chosen))
        return real(root, paths, chosen)

    monkeypatch.setattr(clips, "index_files", index_files)
    data = config(many).data
    paths = catalog.find_videos(many)
    chosen = sample(paths, data)
    assert chosen == sample(paths, data)
    assert 64 <= len(chosen) <= 96
    held_out = catalog.split([path.name for path in paths], data.holdout)[1]
    assert len({paths[i] for i in held_out} & set(chosen)) >= min(32, len(held_out))
    found = check_clips(config(many, "data.num_frames=14"))
    assert len(looked[1]) == len(paths), "none usable in the sample: all are looked at before saying so"
    assert codes(found)[0] == "DAT301"
    looked.clear()
    found = check_clips(config(many), exhaustive=True)
    assert [len(files) for files in looked] == [300]
    broken = next(finding for finding in found if finding.code == "DAT302")
    assert broken.where == str(many / "broken.mp4")


def test_a_sample_names_how_much_it_saw(root, monkeypatch):
    monkeypatch.setattr(clips, "_SAMPLED", 2)
    monkeypatch.setattr(clips, "_HELD_OUT", 0)
    for number in range(3, 6):
        video(root, f"{number}.mp4", shade=number)
    (found,) = check(root, "data.height=192", "data.width=256")
    assert "2 of 2 files looked at (of 6; --all looks at every one): " in found.got


def test_interlaced_files(root):
    video(root, "3.mp4", shade=3)
    write_video(root / "4.mp4", frames=20, options={"crf": "24", "x264-params": "tff=1:interlaced=1"})
    [found] = check(root)
    assert (found.code, found.severity, found.where) == ("DAT312", "warning", str(root / "4.mp4"))
    assert found.got == "interlaced: 1 of 5 files: 4.mp4"
    assert "combs" in found.why


def test_clips_behind_a_linked_folder(root, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    video(elsewhere, "5.mp4", shade=5)
    (root / "more").symlink_to(elsewhere)
    [found] = check(root)
    assert (found.code, found.where) == ("DAT313", str(root / "more"))
    assert found.why == "Linked folders are not followed, so no clip in them is used."
