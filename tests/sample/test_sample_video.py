"""The mp4 as other programs read it, and pictures as people have them."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from svdtune.errors import DataError
from svdtune.sample import video
from svdtune.sample.video import read_image, write_mp4


def clip(num_frames: int = 10, height: int = 48, width: int = 64) -> np.ndarray:
    """A coloured slope that moves, with every frame different."""
    t, y, x = np.meshgrid(np.arange(num_frames), np.arange(height), np.arange(width), indexing="ij")
    red, green, blue = 40 + 2 * x + 3 * t, 200 - 2 * y, 128 + 60 * np.sin((x + y + 4 * t) / 12)
    return np.stack([red, green, blue], axis=-1).clip(0, 255).astype(np.uint8)


def decode(path: Path) -> np.ndarray:
    """RGB by the formulas of BT.709, limited range (swscale's own way back is off by up to one level)."""
    with av.open(str(path)) as container:
        return np.stack([to_rgb(frame) for frame in container.decode(video=0)])


def to_rgb(frame: av.VideoFrame) -> np.ndarray:
    planes = [np.array(p, dtype=float).reshape(p.height, p.line_size)[:, : p.width] for p in frame.planes]
    luma = (planes[0] - 16) / 219
    blue, red = ((plane.repeat(2, 0).repeat(2, 1) - 128) / 224 for plane in planes[1:])
    r, b = luma + 1.5748 * red, luma + 1.8556 * blue
    g = (luma - 0.2126 * r - 0.0722 * b) / 0.7152
    return 255 * np.stack([r, g, b], axis=-1)


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    return 10 * np.log10(255**2 / np.mean((first.astype(float) - second) ** 2))


def boxes(path: Path) -> list[str]:
    content, names, at = path.read_bytes(), [], 0
    while at < len(content):
        names.append(content[at + 4 : at + 8].decode())
        at += int.from_bytes(content[at : at + 4], "big")
    return names


@pytest.mark.parametrize(
    ("fps", "rate"),
    [(7, Fraction(7)), (7.5, Fraction(15, 2)), (30000 / 1001, Fraction(30000, 1001)), (0.5, Fraction(1, 2))],
)
def test_mp4_reads_back(tmp_path: Path, fps: float, rate: Fraction) -> None:
    frames = clip()
    write_mp4(tmp_path / "new" / "a.mp4", frames, fps)
    with av.open(str(tmp_path / "new" / "a.mp4")) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        assert (context.name, context.profile, stream.format.name) == ("h264", "High", "yuv420p")
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (1, 1, 1, 1)
        assert (stream.average_rate, stream.frames, stream.width, stream.height) == (rate, 10, 64, 48)
        assert stream.duration * stream.time_base == pytest.approx(float(10 / rate), rel=1e-4)
        packets = [packet for packet in container.demux(stream) if packet.size]
    times = [float(packet.pts * packet.time_base) for packet in packets]
    assert times == pytest.approx([index / fps for index in range(10)], rel=1e-4)
    assert [packet.dts for packet in packets] == [packet.pts for packet in packets]
    order = boxes(tmp_path / "new" / "a.mp4")
    assert order.index("moov") < order.index("mdat")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.mp4"]


def test_mp4_keeps_colours_and_order(tmp_path: Path) -> None:
    frames = clip()
    write_mp4(tmp_path / "a.mp4", frames, 7)
    decoded = decode(tmp_path / "a.mp4")
    assert decoded.shape == frames.shape
    assert psnr(decoded, frames) > 40
    assert psnr(decoded[1:], frames[:-1]) < 32
    assert np.abs((decoded - frames).mean(axis=(0, 1, 2))).max() < 0.4  # no colour cast


@pytest.mark.parametrize("color", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (128, 128, 128)])
def test_mp4_plain_colours(tmp_path: Path, color: tuple[int, int, int]) -> None:
    """The matrix that converts is the one in the tags: bt601 in the one and bt709 in the other turns green by 30 levels."""
    frames = np.full((3, 32, 32, 3), color, dtype=np.uint8)
    write_mp4(tmp_path / "a.mp4", frames, 7)
    assert np.abs(decode(tmp_path / "a.mp4") - frames).max() <= 2.5


def test_mp4_odd_size(tmp_path: Path) -> None:
    frames = clip(4, 47, 63)
    write_mp4(tmp_path / "a.mp4", frames, 7)
    decoded = decode(tmp_path / "a.mp4")
    assert decoded.shape == (4, 48, 64, 3)
    assert psnr(decoded[:, :47, :63], frames) > 38
    assert psnr(decoded[:, 47], np.pad(frames, ((0, 0), (0, 0), (0, 1), (0, 0)), mode="edge")[:, 46]) > 34


def test_mp4_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.mp4"
    write_mp4(path, clip(), 7)
    before = path.read_bytes()

    def dies(partial: Path, *_: object) -> None:
        partial.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(video, "_encode", dies)
    with pytest.raises(KeyboardInterrupt):
        write_mp4(path, clip(3), 7)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("frames", [clip().astype(np.float32), clip()[0], clip()[:0], clip()[..., :1]])
def test_mp4_wrong_frames(tmp_path: Path, frames: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"frames: got .*, expected uint8 \(t, h, w, 3\)"):
        write_mp4(tmp_path / "a.mp4", frames, 7)


def test_image_range_and_order(tmp_path: Path) -> None:
    pixels = np.zeros((4, 6, 3), dtype=np.uint8)
    pixels[0, 0] = (255, 0, 51)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png", height=4, width=6)
    assert (image.shape, image.dtype) == ((3, 4, 6), torch.float32)
    assert image[:, 0, 0].tolist() == pytest.approx([1.0, -1.0, -0.6])
    assert image[:, 1:].eq(-1).all()


@pytest.mark.parametrize(("resize", "size"), [("squash", (30, 50)), ("cover", (40, 40)), ("cover", (24, 60))])
def test_image_resize_is_antialiased(tmp_path: Path, resize: str, size: tuple[int, int]) -> None:
    """Within a rounding of torch's antialiased bicubic on the whole picture, centre cropped."""
    noise = np.random.default_rng(0).integers(0, 256, (120, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    height, width = size
    scaled = size if resize == "squash" else max((height, round(200 * height / 120)), (round(120 * width / 200), width))
    full = torch.nn.functional.interpolate(
        torch.from_numpy(noise).permute(2, 0, 1)[None].float(), scaled, mode="bicubic", antialias=True
    )[0].clamp(0, 255)
    top, left = (scaled[0] - height) // 2, (scaled[1] - width) // 2
    expected = full[:, top : top + height, left : left + width] / 127.5 - 1
    image = read_image(tmp_path / "a.png", height=height, width=width, resize=resize)
    assert (image - expected).abs().max() < 2.1 / 127.5


def test_image_pad_has_black_borders(tmp_path: Path) -> None:
    Image.new("RGB", (100, 50), "white").save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png", height=40, width=40, resize="pad")
    assert image[:, 10:30].eq(1).all()
    assert image[:, :10].eq(-1).all()
    assert image[:, 30:].eq(-1).all()


def test_image_exif_rotation(tmp_path: Path) -> None:
    upright = Image.new("RGB", (20, 40), "black")
    upright.paste("white", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=exif)
    image = read_image(tmp_path / "a.png", height=40, width=20)
    assert image[:, :20].eq(1).all()
    assert image[:, 20:].eq(-1).all()


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [
        ("RGBA", (255, 0, 0, 0), (1, 1, 1)),
        ("L", 255, (1, 1, 1)),
        ("P", 0, (-1, -1, -1)),
        ("CMYK", (0, 0, 0, 255), (-1, -1, -1)),
    ],
)
def test_image_modes(tmp_path: Path, mode: str, color: object, expected: tuple[int, ...]) -> None:
    path = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
    Image.new(mode, (8, 8), color).save(path)
    assert tuple(read_image(path, height=8, width=8)[:, 0, 0].tolist()) == expected


def message(path: Path) -> str:
    with pytest.raises(DataError) as error:
        read_image(path, height=16, width=16)
    return str(error.value)


def test_image_missing(tmp_path: Path) -> None:
    (tmp_path / "kitten.png").touch()
    assert message(tmp_path / "kiten.png") == (
        f"image {tmp_path}/kiten.png: no such file. Did you mean {tmp_path}/kitten.png?"
    )
    assert message(tmp_path / "zzzzzzz") == f"image {tmp_path}/zzzzzzz: no such file; {tmp_path} holds one other file."
    assert message(tmp_path / "no" / "a.png") == (
        f"image {tmp_path}/no/a.png: no such file; there is no folder {tmp_path}/no either."
    )
    assert message(tmp_path) == f"image {tmp_path}: this is a folder, expected one picture file (PNG, JPEG or WebP)."


def test_image_missing_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert message(Path("nope.png")) == "image nope.png: no such file; the current folder holds no files."
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).touch()
    assert message(Path("nope.png")) == "image nope.png: no such file; the current folder holds 2 other files."


def test_image_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("hello")
    assert message(tmp_path / "a.png") == (
        f"image {tmp_path}/a.png: this is not a picture that Pillow can read. "
        "Give the first frame as PNG, JPEG or WebP (a video file has to be cut to a frame first)."
    )


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_image_cut_short(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    text = message(path)
    assert text.startswith(f"image {path}: the picture cannot be decoded (")
    assert text.endswith("). It is damaged or cut short; save it anew.")


def test_image_16_bit_grey(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 40000, dtype=np.uint16)).save(tmp_path / "a.png")
    assert message(tmp_path / "a.png") == (
        f"image {tmp_path}/a.png: got I;16 (grey with more than 8 bits), expected 8 bits a channel. "
        "Its brightness would be cut off; save it as an 8-bit PNG or JPEG."
    )
