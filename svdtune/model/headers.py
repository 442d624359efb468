"""What a weight file really is, from its first bytes: a safetensors header, or what lies there under that name. Needs no torch."""

from __future__ import annotations

import json
import re
import struct
import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Literal

from svdtune.errors import ModelError

Kind = Literal["missing", "empty", "lfs", "html", "json", "text", "pickle", "zip", "other", "truncated", "damaged"]

BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
"""Bytes of one number, by the dtype names of safetensors."""

_LIMIT = 100_000_000  # The format's own: longer headers are refused by its readers.
_AGAIN = "Download it again, and compare its size with the one on its page."
_PICKLE = "It can run code when it is opened; svdtune reads safetensors only. Take the safetensors of the release."
_MAGIC: tuple[tuple[bytes, Kind, str], ...] = (
    (b"version https://git-lfs", "lfs", "a git-LFS pointer: the repository was cloned without its large files. Run "
     "`git lfs pull` in it, or download with `hf download`."),
    (b"GGUF", "other", "a GGUF file, quantised for inference. Take the safetensors of the release."),
    (b"\x89HDF", "other", "an HDF5 file (Keras). Take the safetensors of the release."),
    (b"\x1f\x8b", "other", "gzip-compressed. Unpack it first."),
    (b"ustar", "other", "a tar archive. Unpack it first."),
)  # fmt: skip


class BadFile(ModelError):
    """A file that holds no readable safetensors; `kind` says what it holds instead."""

    def __init__(self, path: Path, kind: Kind, what: str) -> None:
        super().__init__(f"{path}: {what}")
        self.path, self.kind, self.what = path, kind, what


@dataclass(frozen=True)
class Entry:
    """One tensor as a header declares it."""

    dtype: str
    """As safetensors writes it: F32, F16, BF16, I8, F8_E4M3, ..."""
    shape: tuple[int, ...]
    extent: tuple[int, int] = field(default=(0, 0), compare=False)
    """First byte in the file, and the one behind the last: where it lies, not what it is."""

    @property
    def numbers(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Header:
    """A safetensors file without its tensors."""

    path: Path
    tensors: Mapping[str, Entry]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """Names, dtypes and shapes of a safetensors file, checked against its size. Reads the header only.

    Raises BadFile saying what the file is instead, or how it is damaged.
    """
    if not path.is_file():
        what = "a link that leads nowhere." if path.is_symlink() else "no such file."
        raise BadFile(path, "missing", what)
    size = path.stat().st_size
    with _opened(path) as file:
        start = file.read(512)
        _refuse_other_kinds(path, size, start)
        length = struct.unpack("<Q", start[:8])[0]
        if length > size - 8:
            raise _cut(path, size, f"its header alone is {length:,} bytes long")
        file.seek(8)
        content = _parse(path, file.read(length))
    metadata = content.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise BadFile(path, "damaged", f"its header's __metadata__ is no object of texts. {_AGAIN}")
    if not content:
        raise BadFile(path, "empty", f"it is whole and holds no tensor. {_AGAIN}")
    tensors, end = _entries(path, content, 8 + length)
    expected = 8 + length + end
    if size < expected:
        raise _cut(path, size, f"its header declares tensors up to byte {expected:,}")
    if size > expected:
        raise BadFile(
            path, "damaged", f"{size - expected:,} bytes follow the last tensor that its header declares. {_AGAIN}"
        )
    return Header(path, tensors, metadata)


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise BadFile(path, "other", f"cannot be opened: {error.strerror}.") from None


def read_index(path: Path) -> list[str]:
    """File names that a sharded model's `*.safetensors.index.json` names, sorted. Raises BadFile."""
    try:
        weights = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weights.values()))
        if not all(isinstance(name, str) for name in names):
            raise TypeError
        return names
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BadFile(path, "damaged", f"not an index of shards (a JSON object with `weight_map`). {_AGAIN}") from None


def _refuse_other_kinds(path: Path, size: int, start: bytes) -> None:
    """Raise BadFile unless `start` begins as a safetensors file does: 8 bytes of length, then `{`."""
    if size == 0:
        raise BadFile(path, "empty", f"it is empty (0 bytes). {_AGAIN}")
    if len(start) > 8 and start[8:9] == b"{" and struct.unpack("<Q", start[:8])[0] <= _LIMIT:
        return
    kind, what = _sniff(path, start)
    raise BadFile(path, kind, f"it is no safetensors file but {what}")


def _sniff(path: Path, start: bytes) -> tuple[Kind, str]:
    for magic, kind, what in _MAGIC:
        if start.startswith(magic) or (magic == b"ustar" and start[257:262] == magic):
            return kind, what
    if start.startswith(b"PK"):
        return _zip(path)
    # Protocols 2 to 5 begin so; protocol 0 begins with a global (`cmodule\nname\n`) or a mark.
    if re.match(rb"\x80[\x02-\x05]|c[\w.]+\n[\w.]+\n|\(d?[lp]|[\]}(]q\x00", start):
        return "pickle", f"a pickle, as torch.save and others write. {_PICKLE}"
    return _text(start)


def _zip(path: Path) -> tuple[Kind, str]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        return "truncated", f"a zip archive (torch.save makes such) that is cut off or damaged. {_AGAIN}"
    if any(name.endswith("data.pkl") for name in names):
        return "pickle", f"a file of torch.save, whatever its name says. {_PICKLE}"
    return "zip", f"a zip archive of {len(names)} files. Unpack it first."


def _text(start: bytes) -> tuple[Kind, str]:
    head = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    if re.match(rb"<(!doctype|html|\?xml|head|error)", head, re.IGNORECASE):
        return (
            "html",
            f"a web page: the download saved the answer of a server (a login or error page) as weights. {_AGAIN}",
        )
    if head[:1] in (b"{", b"["):
        return "json", f"JSON text, such as a config or the error message of a server. {_AGAIN}"
    if start and all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in start):
        return "text", f"text: {head[:60].decode('ascii')!r}. {_AGAIN}"
    if len(start) <= 8:
        return "truncated", f"cut off after {len(start)} bytes. {_AGAIN}"
    return "other", f"of an unknown kind (it begins with {start[:8].hex(' ')}). Take the safetensors of the release."


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) != len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise BadFile(
                path, "damaged", f"its header names {twice!r} twice. Write the file again; one of both is lost."
            )
        return content

    try:
        content = json.loads(raw, object_pairs_hook=unique)
    except (ValueError, RecursionError):
        raise BadFile(path, "damaged", f"its header is not valid JSON. {_AGAIN}") from None
    return content


def _entries(path: Path, content: Mapping[str, Any], start: int) -> tuple[dict[str, Entry], int]:
    """The declared tensors, and the byte behind the last, counted from the end of the header, which is at `start`."""
    tensors, extents = {}, []
    for name, entry in content.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            if dtype not in BYTES or not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
                raise TypeError
            wrong = prod(shape) * BYTES[dtype] != end - begin
        except (TypeError, KeyError, ValueError):
            raise BadFile(
                path,
                "damaged",
                f"its header says of {name!r} no dtype, shape and data_offsets that safetensors know. {_AGAIN}",
            ) from None
        if wrong:
            raise BadFile(
                path, "damaged", f"{name} is declared as {dtype} {list(shape)} = {prod(shape) * BYTES[dtype]:,} bytes, but has "
                f"{end - begin:,}. {_AGAIN}",
            )  # fmt: skip
        tensors[name] = Entry(dtype, shape, (start + begin, start + end))
        extents.append((begin, end, name))
    reached = 0
    for begin, end, name in sorted(extents):
        if begin != reached:
            raise BadFile(
                path,
                "damaged",
                f"{name} begins at byte {begin:,} of the data, the one before ends at {reached:,}. {_AGAIN}",
            )
        reached = end
    return tensors, reached


def _cut(path: Path, size: int, said: str) -> BadFile:
    return BadFile(path, "truncated", f"it is cut off: {said}, the file has {size:,} bytes. {_AGAIN}")
