"""Each kind of bad or unusual file: refused in a sentence that names it, or read rightly."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from svdtune.data.demo import write_demo
from svdtune.data.index import Orientation, index_video
from svdtune.data.readers import open_reader
from svdtune.errors import DataError

Video = Callable[..., Path]
FASTSTART = {"movflags": "faststart"}


def refusal(path: Path) -> str:
    """The sentence after the file's name."""
    with pytest.raises(DataError) as caught:
        index_video(path)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value).removeprefix(f"{path}: ")


def read(path: Path, numbers: list[int], decoder: str = "auto") -> np.ndarray:
    with closing(open_reader(index_video(path), decoder)) as reader:
        return reader.read(numbers)


def keep(path: Path, start: float, end: float) -> Path:
    """Cut a file to a part of its bytes, given as shares."""
    data = path.read_bytes()
    path.write_bytes(data[int(start * len(data)) : int(end * len(data))])
    return path


def test_text_file(tmp_path: Path) -> None:
    path = tmp_path / "notes.mp4"
    path.write_text("These are no pictures.\n" * 40)
    assert refusal(path) == "is a text file, not a video (it starts with 'These are no pictures.\\nT')"


def test_playlist_is_not_followed(tmp_path: Path, video: Video) -> None:
    video("other.ts")
    path = tmp_path / "list.mp4"
    path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\nother.ts\n#EXT-X-ENDLIST\n")
    assert refusal(path).startswith("is a text file, not a video")


def test_git_lfs_pointer(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    assert refusal(path) == "is a git-lfs pointer, not the video itself; run `git lfs pull`"


@pytest.mark.parametrize("kind", ["GIF", "PNG", "JPEG"])
def test_picture_named_like_a_video(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.mp4"
    Image.new("RGB", (64, 48)).save(path, format=kind)
    assert refusal(path) == f"is a {kind} picture, not a video; remove it from data.root, or convert it with ffmpeg"


def test_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.touch()
    assert refusal(path) == "is empty (0 bytes); copy it again"


def test_head_cut_off(video: Video) -> None:
    path = keep(video(container_options=FASTSTART), 0.3, 1)
    assert refusal(path).startswith("is not a video, or its header is cut (Invalid data found")


def test_mp4_header_at_the_end_cut_off(video: Video) -> None:
    path = keep(video(), 0, 0.3)
    expected = "has no MP4 header (moov): the end of the file is missing; copy or record it again"
    assert refusal(path) == expected


def test_cut_in_the_middle_mp4(video: Video) -> None:
    path = video(frames=100, container_options=FASTSTART)
    size = path.stat().st_size
    keep(path, 0, 0.8)
    assert refusal(path) == f"is cut: its header wants {size} bytes, the file has {int(0.8 * size)}; copy it again"


def test_cut_in_the_middle_matroska(video: Video) -> None:
    assert refusal(keep(video("a.mkv", frames=100), 0, 0.7)).startswith(
        "is cut: its header says 10.00 s, its frames end"
    )


def test_hole_in_the_middle_is_found_at_read_time(video: Video) -> None:
    path = video(frames=100, options={"g": "10"}, container_options=FASTSTART)
    data = bytearray(path.read_bytes())
    start, end = len(data) * 3 // 4, len(data) * 9 // 10
    data[start:end] = b"\xff" * (end - start)
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"clip\.mp4: frame \d+ \(at [\d.]+ s\): cannot be decoded"):
        read(path, list(range(100)), "pyav")


def test_audio_only(tmp_path: Path) -> None:
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 44100, 0, Fraction(1, 44100)
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert refusal(path) == "holds no pictures, only audio; remove it from data.root"


def test_one_frame(video: Video) -> None:
    assert refusal(video(frames=1)) == "has 1 frame(s); a clip needs at least 2. Remove it from data.root"


def test_alpha_is_refused(video: Video) -> None:
    sentence = refusal(video("a.mov", codec="qtrle", pixel_format="argb"))
    assert sentence == (
        "has an alpha channel (argb), and what lies under transparent pixels is undefined; "
        "flatten it with `ffmpeg -i IN -pix_fmt yuv420p OUT.mp4`"
    )


def test_hdr_is_refused(video: Video) -> None:
    def as_pq(stream: av.VideoStream) -> None:
        stream.codec_context.color_trc = 16

    path = video(pixel_format="yuv420p10le", options={"x264-params": "transfer=smpte2084"}, setup=as_pq)
    assert refusal(path).startswith("is HDR (PQ), and would look washed out without tone mapping; convert it to SDR")


def test_10_bit_is_read(video: Video) -> None:
    path = video(pixel_format="yuv420p10le")
    assert index_video(path).pixel_format == "yuv420p10le"
    pictures = read(path, [0, 20]).astype(int)
    assert pictures.dtype == int
    assert np.abs(pictures[:, 40, 60] - np.array([[20], [100]])).max() <= 4


def test_forced_decord_refuses_10_bit(video: Video) -> None:
    with pytest.raises(DataError, match="its pictures are yuv420p10le, not 8-bit yuv420p"):
        open_reader(index_video(video(pixel_format="yuv420p10le")), "decord")


@pytest.mark.parametrize("rotation", [90, 180, 270])
@pytest.mark.parametrize("decoder", ["auto", "pyav"])
def test_rotated_is_shown_upright(video: Video, rotation: int, decoder: str) -> None:
    path = video(rotation=rotation)
    index = index_video(path)
    assert (index.height, index.width) == ((48, 64) if rotation == 180 else (64, 48))
    shown = read(path, [0], decoder)[0]
    upright = np.rot90(read(video("upright.mp4"), [0], decoder)[0], rotation // 90)  # counter-clockwise, as FFmpeg
    assert shown.shape == upright.shape == (index.height, index.width, 3)
    assert np.abs(shown.astype(int) - upright).max() <= 1
    assert shown.std() > 20


def test_forced_decord_refuses_rotated(video: Video) -> None:
    with pytest.raises(DataError, match="the file is stored rotated or mirrored"):
        open_reader(index_video(video(rotation=90)), "decord")


def test_skewed_rotation_is_refused(video: Video) -> None:
    assert refusal(video(rotation=30)).endswith(
        "only quarter turns can be shown. Re-encode it with ffmpeg, which turns the pictures"
    )


def test_upright_has_no_orientation(video: Video) -> None:
    assert index_video(video()).orientation == Orientation()


def test_variable_frame_rate(video: Video) -> None:
    times = [0, 0.1, 0.2, 0.7, 0.8, 1.5]
    index = index_video(video(frames=6, times=times))
    np.testing.assert_allclose(index.times, times, atol=1e-4)
    assert index.fps == pytest.approx(5 / 1.5, rel=1e-3)


def test_odd_size(video: Video) -> None:
    path = video(width=63, height=47, pixel_format="yuv444p")
    assert read(path, [3]).shape == (1, 47, 63, 3)


def test_bt709_is_converted_with_its_own_matrix_and_kept_from_decord(video: Video) -> None:
    path = video(options={"x264-params": "colormatrix=bt709"})
    index = index_video(path)
    assert index.colorspace == 1
    with pytest.raises(DataError, match=r"its colours \(matrix 1\) are not BT\.601"):
        open_reader(index, "decord")


def test_hidden_vp8_frames_are_not_counted(video: Video) -> None:
    path = video("a.webm", codec="libvpx", frames=60, options={"auto-alt-ref": "1", "lag-in-frames": "16"})
    assert read(path, list(range(60)), "pyav").shape[0] == len(index_video(path)) == 60


def test_pictures_too_narrow_for_decord_are_read_by_pyav(tmp_path: Path) -> None:
    write_demo(tmp_path, clips=1, num_frames=6, fps=8, height=64, width=48)
    index = index_video(next(tmp_path.glob("*.mp4")))
    assert open_reader(index).read([0, 5]).shape == (2, 64, 48, 3)
    with pytest.raises(DataError, match="48 pixels wide"):
        open_reader(index, "decord")
