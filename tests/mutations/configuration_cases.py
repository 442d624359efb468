"""Options that types allow, or nearly, and that break or spoil the run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tests.mutations.data_cases import video
from tests.mutations.sandbox import Kind, Mutation, Sandbox, base_overrides, put

REPO = Path(__file__).parents[2]
CFG = ("CFG",)


def _options(name: str, failure: str, *overrides: str, kind: Kind = "shape", topic: tuple[str, ...] = CFG,
             warning: bool = False) -> Mutation:  # fmt: skip
    return Mutation(name, kind, topic, failure, lambda box: box.set(*overrides), warning)


def checkpointed(box: Sandbox, *overrides: str, base: str | None = None) -> Path:
    """A run folder with a whole checkpoint at step 2, made as the trainer makes it but without steps; returns the checkpoint."""
    import torch

    from svdtune.checkpoint.optimizer import optimizer_state, write_optimizer
    from svdtune.checkpoint.state import save_trained
    from svdtune.checkpoint.store import publish
    from svdtune.config.load import load_config, resolved_yaml
    from svdtune.model.adapt import adapt
    from svdtune.model.load import load_model
    from svdtune.trainer.build import DTYPES, conventions

    config = load_config(REPO / "configs" / box.config, [*base_overrides(box), *overrides])
    model = load_model(config.model)
    trained = adapt(model.unet, config.adapt, dtype=DTYPES[config.train.precision], seed=0)
    known = conventions(config, model)
    if base is not None:
        known["base"]["unet_sha256"] = base
    resolved = resolved_yaml(config)
    trainer = {"step": 2, "samples": 4, "seed": 0, "world_size": 1, "batch_size": 2, "accumulation": 1, "threads": 1,
               "scaler": None}  # fmt: skip

    def write(folder: Path) -> None:
        save_trained(folder, trained, lora=config.adapt.method == "lora")
        write_optimizer(folder, optimizer_state(torch.optim.AdamW(trained.values()), trained))
        (folder / "scheduler.json").write_text(json.dumps({"last_epoch": 2}))
        (folder / "trainer.json").write_text(json.dumps(trainer))
        (folder / "config.yaml").write_text(resolved)

    run = Path(config.run.dir) / config.run.name
    return publish(run / "checkpoints", 2, write, conventions=known, config_hash="0" * 64, keep=3)


def _resumed(before: tuple[str, ...], now: tuple[str, ...], spoil: Callable[[Path], None] | None = None,
             base: str | None = None) -> Callable[[Sandbox], None]:  # fmt: skip
    def apply(box: Sandbox) -> None:
        folder = checkpointed(box, *before, base=base)
        if spoil is not None:
            spoil(folder)
        box.set(*now)

    return apply


def _cut(folder: Path) -> None:
    path = folder / "lora.safetensors"
    put(path, path.read_bytes()[:-100])


def _image(content: bytes | None) -> Callable[[Sandbox], None]:
    def apply(box: Sandbox) -> None:
        path = box.work / "first.png"
        if content is not None:
            put(path, content)
        box.set(f"validation.images=[{path}]")

    return apply


def _run_dir_is_a_file(box: Sandbox) -> None:
    put(box.work / "runs", b"")


def _more_than_memory(box: Sandbox) -> None:
    """A batch of about ten times this machine's memory in activations."""
    import psutil

    per_clip = 10 * 2**30
    box.set("data.height=1088", "data.width=1920", f"train.batch_size={10 * psutil.virtual_memory().total // per_clip}",
            "adapt.method=full")  # fmt: skip


def _for_decord(box: Sandbox) -> None:
    """BT.709 clips, which decord shows as BT.601."""
    for path in box.videos:
        path.unlink()
        video(path, colorspace=1)
    box.set("data.decoder=decord")


LORA = ("adapt.method=lora", "adapt.rank=4")
CONFIGURATION = [
    _options("height the VAE would floor", "D18", "data.height=100", kind="silent"),
    _options("width the VAE would floor", "D18 D03", "data.width=1022", kind="silent"),
    _options("frames the base was not made for", "E21", "data.num_frames=6", kind="silent", topic=("CFG", "SEM", "SHP", "CKP"),
             warning=True),
    _options("a LoRA target that does not exist", "K06", "adapt.method=lora", "adapt.targets=[attn1.query]"),
    _options("a LoRA target that is no layer", "K06", "adapt.method=lora", "adapt.targets=[attn1]"),
    _options("a LoRA target that is a norm", "K06", "adapt.method=lora", "adapt.targets=[norm1]"),
    _options("LoRA on dead weights only", "M15", "adapt.method=lora", "adapt.targets=[attn2.to_q, attn2.to_k]", kind="silent",
             topic=("CFG", "SEM")),
    _options("LoRA on one dead weight among live ones", "M15", "adapt.method=lora", "adapt.targets=[attn2.to_k, attn1.to_q]",
             kind="silent", topic=("CFG", "SEM")),
    _options("fps beyond the clips", "M06 I08", "data.fps=60", kind="silent", topic=("DAT", "CFG")),
    _options("window longer than the clips", "I23", "data.fps=1", "data.num_frames=12", topic=("DAT", "CFG")),
    Mutation("decord asked of clips whose colours it misreads", "silent", ("DAT", "ENV", "CFG"), "I05 F38", _for_decord),
    Mutation("resume with another LoRA rank", "shape", ("CFG", "CKP"), "J25 J26", _resumed(LORA, ("adapt.method=lora", "adapt.rank=8"))),
    Mutation("resume with another method", "shape", ("CFG", "CKP"), "J25 J26", _resumed(LORA, ("adapt.method=temporal",))),
    Mutation("resume with other LoRA targets", "shape", ("CFG", "CKP"), "J25", _resumed(LORA, (*LORA, "adapt.targets=[attn1.to_q]"))),
    Mutation("resume LoRA as DoRA", "shape", ("CFG", "CKP"), "J25 J28", _resumed(LORA, (*LORA, "adapt.dora=true"))),
    Mutation("resume with another optimizer", "shape", ("CFG", "CKP"), "J26", _resumed(LORA, (*LORA, "train.optimizer=adafactor"))),
    Mutation("resume on another base", "silent", ("CFG", "CKP"), "A08 J28", _resumed(LORA, LORA, base="0" * 64), warning_is_enough=True),
    Mutation("resume from a cut checkpoint", "file", ("CFG", "CKP"), "B01", _resumed(LORA, LORA, _cut)),
    Mutation("validation image missing", "file", ("CFG", "DAT"), "F23", _image(None)),
    Mutation("validation image that is text", "file", ("CFG", "DAT"), "F23", _image(b"not a picture")),
    _options("xformers without a GPU", "H10", "memory.attention=xformers", topic=("ENV", "CFG")),
    _options("fp16 without a GPU", "G01 G18", "train.precision=fp16", topic=("ENV", "CFG", "NUM")),
    _options("8-bit AdamW without a GPU", "H10", "train.optimizer=adamw8bit", topic=("ENV", "CFG")),
    _options("a bridge where none is needed", "own", "conditioning.bridge=linear", topic=("CFG", "CKP")),
    _options("guidance without dropout", "own", "conditioning.dropout=0", "validation.samples=1", kind="silent", topic=("CFG", "SEM"), warning=True),
    Mutation("run.dir is a file", "file", ("CFG", "ENV"), "own", _run_dir_is_a_file),
    Mutation("more than this machine's memory", "shape", ("MEM",), "L01 L06", _more_than_memory, warning_is_enough=True),
    _options("DoRA without LoRA", "own", "adapt.dora=true", kind="silent"),
    _options("an option of another name", "own", "train.learning_rate=1e-4", kind="silent"),
    _options("warm-up longer than the run", "own", "train.warmup=500", kind="silent"),
]  # fmt: skip
