"""What a case is, and the private world it may spoil."""

from __future__ import annotations
import __future__

import inspect
import json
import os
import shutil
import textwrap
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

Kind = Literal["shape", "file", "silent"]
"""silent: diffusers and torch would run without a word. file: something on disk is not what it should be. shape: it raises."""


@dataclass
class Sandbox:
    """One sound run of the small SVD on 64x96 clips: batch 2, 3 frames. A case changes it, nobody else sees the change."""

    clips: Path
    """Six H.264 clips of 4 s, 24 fps, hard-linked: write through `put` only."""
    model: Path
    """A diffusers folder, hard-linked: write through `put`, `edit_json` and `edit_weights` only."""
    work: Path
    monkeypatch: pytest.MonkeyPatch
    overrides: list[str] = field(default_factory=list)
    config: str = "tiny.yaml"
    """Below configs/."""

    def set(self, *overrides: str) -> None:
        """Append overrides; later ones win."""
        self.overrides += overrides

    @property
    def videos(self) -> list[Path]:
        """The clips, sorted."""
        return sorted(self.clips.glob("*.mp4"))


@dataclass(frozen=True)
class Mutation:
    """One way to break a run."""

    name: str
    kind: Kind
    topic: tuple[str, ...]
    """Prefixes one of which the code must have: ENV CFG CKP DAT SHP SEM NUM MEM DST."""
    failure: str
    """Rows of the corpus of real failures it stands for, or `own`."""
    apply: Callable[[Sandbox], None]
    warning_is_enough: bool = False
    """The run goes on but is spoiled, or is spoiled only in part."""


@dataclass(frozen=True)
class Sound:
    """A run with nothing wrong."""

    name: str
    overrides: tuple[str, ...] = ()
    config: str = "tiny.yaml"
    base: Literal["svd", "tiny", "shipped"] = "svd"
    """svd: the small random SVD. tiny: the embedded base. shipped: what the YAML says, whose weights are not here."""
    unless: tuple[str, ...] = ()
    """Topics that this machine may fail: full size needs a GPU and weights that are not here."""
    apply: Callable[[Sandbox], None] | None = None
    """A change of the model or the clips that stays sound."""


def base_overrides(box: Sandbox) -> list[str]:
    """The sound run that every case starts from: nothing is recomputed and no video sampled, a third of the time."""
    return [
        f"model.pretrained={box.model}", "model.variant=null", f"data.root={box.clips}", "data.num_frames=3",
        "data.height=64", "data.width=96", "data.workers=0", "train.batch_size=2", f"run.dir={box.work / 'runs'}",
        "run.threads=1", "adapt.method=temporal_attention", "memory.checkpointing=none", "validation.samples=0",
    ]  # fmt: skip


def put(path: Path, content: bytes) -> None:
    """Replace a file; the hard-linked original keeps its bytes."""
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def edit_json(path: Path, remove: tuple[str, ...] = (), **changes: Any) -> None:
    """Change keys of a JSON object and take some away; each one taken away must have been there."""
    content = json.loads(path.read_text())
    for key in remove:
        del content[key]
    put(path, json.dumps({**content, **changes}).encode())


def weights(folder: Path, part: str) -> Path:
    """The weight file of a part."""
    return folder / part / ("model.safetensors" if part == "image_encoder" else "diffusion_pytorch_model.safetensors")


def edit_weights(box: Sandbox, part: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Rewrite the weights of a part as what `change` makes of them; fails when it changes nothing."""
    from safetensors.torch import load_file, save

    path = weights(box.model, part)
    before = load_file(path)
    after = change(dict(before))
    same = before.keys() == after.keys() and all(before[name] is after[name] for name in before)
    assert not same, "this case changes nothing"
    put(path, save({name: tensor.contiguous() for name, tensor in after.items()}, {"format": "pt"}))


def edit_code(box: Sandbox, function: Any, *changes: tuple[str, str]) -> None:
    """Replace text in the source of a real function, in place, so that everybody who imported it runs the broken one.

    Each old text must occur exactly once: a case that no longer fits the code fails instead of testing nothing.
    """
    source = textwrap.dedent(inspect.getsource(function))
    for old, new in changes:
        assert source.count(old) == 1, f"{function.__qualname__}: {old!r} occurs {source.count(old)} times"
        source = source.replace(old, new)
    name = f"<{function.__qualname__}, mutated>"
    module = compile(source, name, "exec", flags=__future__.annotations.compiler_flag, dont_inherit=True)
    code = next(constant for constant in module.co_consts if isinstance(constant, types.CodeType))
    box.monkeypatch.setattr(function, "__code__", code)


def link_tree(source: Path, target: Path) -> Path:
    """A copy whose files share their bytes with the original."""
    return Path(shutil.copytree(source, target, copy_function=_link))


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)
    return target
