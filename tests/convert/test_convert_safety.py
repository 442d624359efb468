"""Nothing takes the name DST before it was read back; nothing is left of what failed; nothing is overwritten."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from convert_models import UNET, differing, folder_tensors, make_folder, originals, tree
from safetensors.torch import load_file, save_file

from svdtune.checkpoint import stream
from svdtune.convert import cli, verify
from svdtune.convert.cli import convert
from svdtune.convert.progress import Progress
from svdtune.errors import CheckpointError, UsageError
from svdtune.model.facts import FILES, STEMS
from svdtune.model.load import build_part
from svdtune.model.weights import Form, Weights

NAMES = ("new.safetensors", "new")


def refused(kind, tmp_path, source, name, **options):
    """What is said; there is no DST, and nothing hidden."""
    before = tree(tmp_path)
    with pytest.raises(kind) as caught:
        convert(str(source), tmp_path / name, **options)
    assert tree(tmp_path) == before
    return str(caught.value)


# Verification.


@pytest.mark.parametrize("name", NAMES)
def test_one_flipped_bit_is_found(tmp_path, folder, file, monkeypatch, name):
    write = cli.write_weights

    def flipped(path, weights, *rest):
        write(path, weights, *rest)
        content = bytearray(path.read_bytes())
        content[-3] ^= 4
        path.write_bytes(content)

    monkeypatch.setattr(cli, "write_weights", flipped)
    text = refused(CheckpointError, tmp_path, folder, name)
    assert (
        "does not read back as it was written. Nothing was kept. Try again on another disk; if it stays, please report it."
        in text
    )
    assert "does not read back as it was written" in refused(
        CheckpointError, tmp_path, folder, "new.safetensors", into=file
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("what", ["less", "other dtype"])
def test_a_tensor_that_was_not_written_as_meant_is_named(tmp_path, folder, monkeypatch, name, what):
    write = cli.write_weights

    def other(path, weights, *rest):
        first = min(weights.forms)
        forms = {n: f for n, f in weights.forms.items() if n != first}
        if what != "less":
            forms[first] = replace(weights.forms[first], dtype=torch.float16)
        write(path, Weights(forms, lambda n: weights.read(n).to(forms[n].dtype)), *rest)

    monkeypatch.setattr(cli, "write_weights", other)
    text = refused(CheckpointError, tmp_path, folder, name)
    assert "1 tensors were not written as meant (" in text


@pytest.mark.parametrize("name", NAMES)
def test_a_rule_that_mixes_two_weights_up_is_found(tmp_path, folder, monkeypatch, name):
    """Every bit reads back, but the network computes something else."""

    def mixed(weights):
        """Two of the same shape change places."""
        forms = weights.forms
        pairs = (("conv1.bias", "conv2.bias"), ("in_layers.2.bias", "out_layers.3.bias"))
        one, two = next(
            (key, key.replace(a, b))
            for key in sorted(forms)
            for a, b in pairs
            if a in key and forms.get(key.replace(a, b)) == forms[key]
        )
        return Weights(forms, lambda n: weights.read({one: two, two: one}.get(n, n)))

    if name == "new":
        outputs = verify.forward

        def of_the_unmixed(whole, where):
            found = outputs(whole, where)
            whole.parts["unet"] = mixed(whole.parts["unet"])
            return found

        monkeypatch.setattr(verify, "forward", of_the_unmixed)
    else:
        made = cli.original_weights
        monkeypatch.setattr(cli, "original_weights", lambda *given: mixed(made(*given)))
    text = refused(CheckpointError, tmp_path, folder, name)
    assert "does not compute what the source's does (relative difference " in text


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("part", ["unet", "vae", "image_encoder"])
def test_a_network_that_computes_something_else_is_found(tmp_path, folder, monkeypatch, name, part):
    load = verify.load_part

    def other(configs, which, variant):
        network = load(configs, which, variant)
        if which == part:
            parameter = next(p for n, p in network.named_parameters() if p.dim() > 1 and "embedding" not in n)
            parameter.data = parameter.data * 1.01
        return network

    monkeypatch.setattr(verify, "load_part", other)
    assert f"its {part} does not compute what the source's does" in refused(CheckpointError, tmp_path, folder, name)


# Atomic.


def stopped_by(error):
    def stop(*_arguments, **_options):
        raise error

    return stop


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("error", [RuntimeError("unforeseen"), KeyboardInterrupt()])
def test_an_exception_or_ctrl_c_leaves_nothing(tmp_path, folder, monkeypatch, name, error):
    monkeypatch.setattr(verify, "same_tensors", stopped_by(error))
    refused(type(error), tmp_path, folder, name)


KILLED = """
import os, signal, sys
from pathlib import Path
from svdtune.convert import verify
from svdtune.convert.cli import convert
verify.same_tensors = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
convert(sys.argv[1], Path(sys.argv[2]))
"""


@pytest.mark.parametrize("name", NAMES)
def test_killed_in_the_middle_leaves_no_dst_and_the_next_try_works(tmp_path, folder, name):
    # a new process, no fork: a copy of one whose threads hold locks can wait for ever
    done = subprocess.run([sys.executable, "-c", KILLED, folder, tmp_path / name], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [f".{name}.partial"]
    convert(str(folder), tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk_is_told(tmp_path, folder, monkeypatch, name):
    monkeypatch.setattr(cli, "write_weights", stopped_by(OSError(errno.ENOSPC, "No space left on device")))
    text = refused(CheckpointError, tmp_path, folder, name)
    assert text.startswith(f"{tmp_path / name}: the disk is full, available are ")
    assert text.endswith(" GiB. Nothing was left there: free space and try again.")


def test_a_full_disk_is_told_of_a_lora_too(tmp_path, runs, monkeypatch):
    monkeypatch.setattr(cli, "write_weights", stopped_by(OSError(errno.EDQUOT, "Disk quota exceeded")))
    for name in NAMES:
        assert ": the disk is full, available are " in refused(CheckpointError, tmp_path, runs["lora"], name)


@pytest.mark.parametrize("name", NAMES)
def test_a_place_that_takes_no_files_is_told(folder, name):
    """Root may write anywhere but in /proc."""
    with pytest.raises(UsageError) as caught:
        convert(str(folder), Path("/proc") / name)
    assert str(caught.value) == f"/proc/{name}: it cannot be written: No such file or directory. Give another place."


# Nothing is overwritten.


def test_what_is_there_is_not_overwritten(tmp_path, folder):
    (tmp_path / "file.safetensors").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "nowhere")
    for name in ("file.safetensors", "folder", "link", "link.safetensors"):
        assert refused(UsageError, tmp_path, folder, name) == (
            f"{tmp_path / name}: it is there already, and convert overwrites nothing. Give another name, or remove it."
        )
    assert (tmp_path / "file.safetensors").read_text() == "mine"


def test_what_appeared_meanwhile_is_not_overwritten(tmp_path, folder, monkeypatch):
    for name in NAMES:
        same = verify.same_forward

        def appears(*given, name=name, same=same):
            same(*given)
            (tmp_path / name).write_text("mine")

        monkeypatch.setattr(verify, "same_forward", appears)
        with pytest.raises(UsageError, match="it is there already, and convert overwrites nothing"):
            convert(str(folder), tmp_path / name)
        monkeypatch.undo()
        assert (tmp_path / name).read_text() == "mine"
    assert tree(tmp_path) == set(NAMES)


def test_source_and_destination_may_not_be_one(folder, file, own, tmp_path):
    mine = own(folder)
    for source in (mine, shutil.copy(file, tmp_path / "mine.safetensors")):
        with pytest.raises(UsageError, match="it is there already"):
            convert(str(source), Path(source))


def test_a_destination_inside_the_source_leaves_the_source_as_it_was(own, folder, runs):
    mine = own(folder)
    before = folder_tensors(mine)
    convert(str(mine), mine / "svd.safetensors")
    convert(str(mine), mine / "half", dtype="fp16")
    assert differing(folder_tensors(mine), before) == set()
    assert differing(load_file(mine / "svd.safetensors"), originals(folder)) == set()


def test_the_folder_of_the_destination_must_exist(tmp_path, folder):
    assert refused(UsageError, tmp_path, folder, "no/such/new.safetensors") == (
        f"{tmp_path}/no/such/new.safetensors: there is no folder {tmp_path}/no/such. Make it first."
    )


@pytest.mark.parametrize("ending", [".ckpt", ".pt", ".pth", ".bin", ".gguf", ".CKPT"])
def test_other_endings_are_refused(tmp_path, folder, ending):
    assert refused(UsageError, tmp_path, folder, f"svd{ending}") == (
        f"{tmp_path}/svd{ending}: svdtune writes .safetensors files and folders, no {ending}."
    )


def test_names_with_spaces_and_other_scripts(tmp_path, folder, runs):
    place = tmp_path / "meine Modelle ⟨ü⟩"
    place.mkdir()
    convert(str(folder), place / "日本 語.safetensors")
    convert(str(place / "日本 語.safetensors"), place / "v1.0 final (2)")
    convert(str(runs["lora"]), place / "ленточка v2.safetensors")
    assert tree(place) >= {"日本 語.safetensors", "v1.0 final (2)", "ленточка v2.safetensors"}
    assert differing(folder_tensors(place / "v1.0 final (2)"), folder_tensors(folder)) == set()


def test_the_ending_may_be_in_capitals(tmp_path, folder):
    convert(str(folder), tmp_path / "SVD.SAFETENSORS")
    assert differing(load_file(tmp_path / "SVD.SAFETENSORS"), originals(folder)) == set()


def test_relative_paths(tmp_path, folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    convert(str(folder), Path("a.safetensors"))
    convert("a.safetensors", Path("b"))
    assert tree(tmp_path) >= {"a.safetensors", "b/model_index.json"}


# Progress.


def test_no_bar_without_a_terminal(tmp_path, folder, capfd):
    convert(str(folder), tmp_path / "a.safetensors")
    assert capfd.readouterr() == ("", "")


def test_a_bar_on_a_terminal_counts_written_and_read_bytes():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with Progress("writing x", 10, stream) as progress:
        progress.told(10)
        progress.say("reading it back")
    assert "reading it back" in stream.getvalue()


def test_all_bytes_are_told_twice(tmp_path, folder, monkeypatch):
    told, total = [], sum(tensor.nbytes for tensor in folder_tensors(folder).values())
    quant = sum(tensor.nbytes for name, tensor in folder_tensors(folder).items() if "/quant_conv." in name)
    monkeypatch.setattr(Progress, "told", lambda _, count: told.append(count))
    for name in NAMES:
        told.clear()
        convert(str(folder), tmp_path / name)
        assert sum(told) == 2 * (total if name == "new" else total - quant)


# The stream.


def test_a_written_file_is_what_the_library_writes(tmp_path):
    tensors = {
        "b": torch.randn(3, 5), "a": torch.randn(()).double(), "c": torch.arange(6).reshape(2, 3), "d": torch.randn(7).bfloat16(),
        "e": torch.tensor([True, False]), "f": torch.zeros(0, 4), "g": torch.randn(4, 4).half().T,
    }  # fmt: skip
    weights = Weights({n: Form(t.dtype, tuple(t.shape)) for n, t in tensors.items()}, lambda n: tensors[n])
    stream.write_weights(tmp_path / "ours.safetensors", stream.by_width(weights), {"format": "pt", "x": "ü"})
    save_file(
        {n: t.contiguous() for n, t in tensors.items()}, tmp_path / "theirs.safetensors", {"format": "pt", "x": "ü"}
    )
    ours, theirs = (load_file(tmp_path / f"{name}.safetensors") for name in ("ours", "theirs"))
    assert differing(ours, theirs) == set()
    sizes = [ours[name].element_size() for name in ours]
    assert sizes == sorted(sizes, reverse=True)  # each tensor lies at a multiple of its own size


MEASURE = """
import sys, threading
from pathlib import Path
import torch
torch.set_num_threads(1)
from svdtune.convert.cli import convert

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

small, big, out = map(Path, sys.argv[1:])
convert(str(small), out / "small.safetensors")  # what libraries keep from their first use is not the model's
before, peak, done = anonymous(), [0], threading.Event()

def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], anonymous())

watcher = threading.Thread(target=watch)
watcher.start()
convert(str(big), out / "big.safetensors")
done.set()
watcher.join()
print(peak[0] - before)
"""


def test_memory_is_that_of_the_largest_network(tmp_path, folder):
    """Tensors are streamed: what is there at once is one network in float32, for the verification."""
    big = make_folder(tmp_path / "big", vae={"block_out_channels": [32, 64]})
    config = {**UNET, "block_out_channels": [320, 320], "num_attention_heads": [5, 5], "cross_attention_dim": 24}
    with torch.device("meta"):
        unet = build_part("unet", config)
    tensors = {name: torch.full(tensor.shape, 0.01) for name, tensor in unet.state_dict().items()}
    save_file(tensors, big / "unet" / f"{STEMS['unet']}.safetensors", {"format": "pt"})
    (big / FILES["unet"]).write_text(json.dumps(config))
    largest = sum(tensor.nbytes for tensor in tensors.values())
    assert largest > 200e6
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, folder, big, tmp_path], capture_output=True, text=True, check=True,
        # what the allocator keeps of small blocks that were freed is not measured
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
    )  # fmt: skip
    assert largest * 0.9 < int(done.stdout) < largest * 1.25


def test_a_tensor_that_is_not_what_was_announced_is_not_written(tmp_path):
    weights = Weights({"a": Form(torch.float32, (2,))}, lambda _: torch.zeros(3))
    with pytest.raises(ValueError, match=r"a: read torch.float32 \(3,\), announced torch.float32 \(2,\)"):
        stream.write_weights(tmp_path / "x.safetensors", weights, {})
