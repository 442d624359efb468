"""What a weight file really is: sound ones are read, and every impostor is named for what it is."""

import json
import pickle
import struct
import zipfile

import pytest

from svdtune.model.facts import TINY
from svdtune.model.headers import BadFile, Entry, read_header, read_index


def write(path, header, body=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + body)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def bad(path):
    with pytest.raises(BadFile) as caught:
        read_header(path)
    return caught.value


def test_a_sound_file_is_read(tmp_path):
    header = {
        "__metadata__": {"format": "pt"},
        "a": entry(),
        "b": entry("F16", (), (8, 10)),
        "c": entry("I8", (0,), (10, 10)),
    }
    found = read_header(write(tmp_path / "x.safetensors", header, bytes(10)))
    assert found.tensors == {"a": Entry("F32", (2,)), "b": Entry("F16", ()), "c": Entry("I8", (0,))}
    assert found.metadata == {"format": "pt"}
    assert [e.numbers for e in found.tensors.values()] == [2, 1, 0]


def test_the_shipped_base_is_read():
    assert len(read_header(TINY / "unet/diffusion_pytorch_model.fp16.safetensors").tensors) == 422


def test_what_safetensors_itself_writes_is_read(tmp_path):
    import numpy as np
    from safetensors.numpy import save_file

    save_file({"w": np.zeros((3, 5), np.float16), "n": np.zeros((1,), np.int64)}, tmp_path / "x")
    assert read_header(tmp_path / "x").tensors == {"w": Entry("F16", (3, 5)), "n": Entry("I64", (1,))}


def test_a_truncated_file_says_how_long_it_should_be(tmp_path):
    path = write(tmp_path / "x.safetensors", {"a": entry()}, bytes(5))
    error = bad(path)
    size = path.stat().st_size
    assert error.kind == "truncated"
    assert f"declares tensors up to byte {size + 3:,}, the file has {size:,} bytes. Download it again" in str(error)


def test_a_header_that_is_cut_off(tmp_path):
    error = bad(write(tmp_path / "x", b'{"a":{"dtype":"F32","sha', length=4000))
    assert error.kind == "truncated"
    assert "its header alone is 4,000 bytes long" in error.what


def fake_torch_file(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"")


@pytest.mark.parametrize(
    ("content", "kind", "sentence"),
    [
        (b"", "empty", "it is empty (0 bytes)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "lfs", "a git-LFS pointer"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "html", "a web page"),
        (b"\n  <html lang='en'>404</html>", "html", "a web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "html", "a web page"),
        (b'{"error": "Repository not found"}', "json", "JSON text, such as a config"),
        (b"Entry not found, please log in", "text", "text: 'Entry not found"),
        (pickle.dumps({"w": [1.0]}), "pickle", "can run code when it is opened"),
        (b"cos\nsystem\n(S'true'\ntR.", "pickle", "can run code when it is opened"),
        (b"GGUF\x03\x00\x00\x00" + bytes(40), "other", "a GGUF file"),
        (b"\x1f\x8b\x08\x00" + bytes(40), "other", "gzip-compressed"),
        (b"\x89HDF\r\n\x1a\n" + bytes(40), "other", "an HDF5 file"),
        (b"PK\x03\x04" + bytes(60), "truncated", "a zip archive (torch.save makes such) that is cut off"),
        (bytes(range(200, 240)), "other", "of an unknown kind (it begins with c8 c9"),
        (b"\x10\x00\x00", "truncated", "cut off after 3 bytes"),
        (struct.pack("<Q", 10**12) + b"{" + bytes(30), "other", "of an unknown kind"),
    ],
)  # fmt: skip
def test_impostors_under_the_name_of_weights(tmp_path, content, kind, sentence):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    error = bad(path)
    assert (error.kind, sentence in error.what) == (kind, True), error.what
    assert str(path) in str(error)


def test_a_torch_file_under_the_name_of_safetensors(tmp_path):
    fake_torch_file(tmp_path / "unet.safetensors")
    error = bad(tmp_path / "unet.safetensors")
    assert error.kind == "pickle"
    assert "a file of torch.save, whatever its name says" in error.what


def test_another_zip_is_not_called_a_pickle(tmp_path):
    with zipfile.ZipFile(tmp_path / "x", "w") as archive:
        archive.writestr("readme.txt", b"hello")
    assert bad(tmp_path / "x").kind == "zip"


@pytest.mark.parametrize(
    ("header", "body", "sentence"),
    [
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
         8, "names 'a' twice"),
        (b'{"a": nonsense}', 8, "not valid JSON"),
        ({"a": entry(shape=(3,))}, 8, "a is declared as F32 [3] = 12 bytes, but has 8"),
        ({"a": {"dtype": "F32"}}, 8, "says of 'a' no dtype, shape and data_offsets that safetensors know"),
        ({"a": "x"}, 8, "says of 'a' no dtype"),
        ({"a": entry(), "b": entry(offsets=(12, 20))}, 20, "b begins at byte 12 of the data, the one before ends at 8"),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, 12, "b begins at byte 4 of the data"),
        ({"a": entry()}, 11, "3 bytes follow the last tensor"),
    ],
)  # fmt: skip
def test_damaged_headers(tmp_path, header, body, sentence):
    error = bad(write(tmp_path / "x", header, bytes(body)))
    assert (error.kind, sentence in error.what) == ("damaged", True), error.what


def test_a_missing_file(tmp_path):
    assert bad(tmp_path / "gone").kind == "missing"


def test_an_index_of_shards(tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": "2.safetensors", "b": "1.safetensors", "c": "2.safetensors"}}))
    assert read_index(path) == ["1.safetensors", "2.safetensors"]
    for text in ("{}", "[1]", "nonsense", '{"weight_map": 3}'):
        path.write_text(text)
        with pytest.raises(BadFile, match="not an index of shards"):
            read_index(path)
