"""Runs with nothing wrong: all shipped files, many sizes, methods and options."""

from __future__ import annotations

from tests.mutations.sandbox import Sandbox, Sound, edit_json, put, weights


def _frames(count: int):
    def apply(box: Sandbox) -> None:
        edit_json(box.model / "unet/config.json", num_frames=count)
        box.set(f"data.num_frames={count}")

    return apply


def _size(height: int, width: int, *more: str) -> Sound:
    return Sound(f"{height}x{width}", (f"data.height={height}", f"data.width={width}", "train.batch_size=1", *more))


def _variant(box: Sandbox) -> None:
    for part in ("unet", "vae", "image_encoder"):
        path = weights(box.model, part)
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    box.set("model.variant=fp16")


def _image(box: Sandbox) -> None:
    from PIL import Image

    Image.new("RGB", (192, 128), (10, 120, 200)).save(box.work / "first.png")
    box.set(f"validation.images=[{box.work / 'first.png'}]")


def _nested(box: Sandbox) -> None:
    (box.clips / "a" / "b").mkdir(parents=True)
    for path in box.videos[:3]:
        path.rename(box.clips / "a" / "b" / path.name)
    put(box.clips / "a" / "captions.txt", b"one clip per line")


def _both_variants(box: Sandbox) -> None:
    path = weights(box.model, "unet")
    put(path.with_name("diffusion_pytorch_model.fp16.safetensors"), path.read_bytes())
    put(box.model / "README.md", b"# a model\n")


def _resumed(*overrides: str):
    def apply(box: Sandbox) -> None:
        from tests.mutations.configuration_cases import checkpointed

        checkpointed(box, *overrides)
        box.set(*overrides)

    return apply


def _wide_clip(box: Sandbox) -> None:
    from tests.mutations.data_cases import video

    for path in box.videos:
        path.unlink()
    for number, (codec, pixels, suffix) in enumerate(
        [
            ("libx264", "yuv420p", ".mp4"),
            ("libx264", "yuv420p", ".mkv"),
            ("mpeg4", "yuv420p", ".avi"),
            ("libx264", "yuv444p", ".mov"),
        ]
    ):
        video(box.clips / f"clip-{number}{suffix}", codec=codec, pixels=pixels, height=128, width=96, fps=30, frames=60)


FULL_SIZE = ("ENV", "MEM")
"""A GPU that knows bf16 and its memory are what full size needs, and this machine need not have them."""

SOUND = [
    Sound("tiny.yaml", ("data.workers=0",), base="tiny"),
    Sound("tiny.yaml with workers", base="tiny"),
    Sound("svd_lora.yaml", (), "svd_lora.yaml", "shipped", FULL_SIZE),
    Sound("svd_temporal.yaml", (), "svd_temporal.yaml", "shipped", FULL_SIZE),
    Sound("svd_xt_lora.yaml", (), "svd_xt_lora.yaml", "shipped", FULL_SIZE),
    Sound("svd_xt_full.yaml", (), "svd_xt_full.yaml", "shipped", FULL_SIZE),
    Sound("svd_lora.yaml at 320x576", ("data.height=320", "data.width=576"), "svd_lora.yaml", "shipped", FULL_SIZE),
    Sound("the small model", ()),
    _size(320, 576),
    _size(544, 960),
    _size(72, 40),
    _size(64, 64),
    _size(40, 72),
    _size(16, 16),
    _size(256, 448),
    _size(360, 640),
    Sound("tiny at 72x40", ("data.height=72", "data.width=40", "train.batch_size=1"), base="tiny"),
    Sound("tiny at 320x576", ("data.height=320", "data.width=576", "train.batch_size=1"), base="tiny"),
    Sound("two frames", apply=_frames(2)),
    Sound("four frames, as many as latent channels", apply=_frames(4)),
    Sound("seven frames", apply=_frames(7)),
    Sound("eight frames, as many as the UNet's channels", apply=_frames(8)),
    Sound("full", ("adapt.method=full",)),
    Sound("temporal", ("adapt.method=temporal",)),
    Sound("spatial", ("adapt.method=spatial",)),
    Sound("lora", ("adapt.method=lora",)),
    Sound("lora of rank 1", ("adapt.method=lora", "adapt.rank=1")),
    Sound("lora of rank 64 and alpha 8", ("adapt.method=lora", "adapt.rank=64", "adapt.alpha=8")),
    Sound("dora", ("adapt.method=lora", "adapt.rank=4", "adapt.dora=true")),
    Sound("lora on convolutions", ("adapt.method=lora", "adapt.rank=4", "adapt.targets=[conv1, conv2]")),
    Sound("lora on attn2.to_v", ("adapt.method=lora", "adapt.rank=4", "adapt.targets=[attn2.to_v, attn2.to_out.0]")),
    Sound("lora on the feed-forward layers", ("adapt.method=lora", "adapt.targets=[ff.net.0.proj, ff.net.2]")),
    Sound("bf16, full", ("train.precision=bf16", "adapt.method=full")),
    Sound("bf16, lora", ("train.precision=bf16", "adapt.method=lora")),
    Sound("bf16, temporal", ("train.precision=bf16", "adapt.method=temporal")),
    Sound("adafactor", ("train.optimizer=adafactor",)),
    Sound("batch 1, accumulation 4", ("train.batch_size=1", "train.accumulation=4")),
    Sound("batch 3, as many as frames", ("train.batch_size=3",)),
    Sound("batch 4", ("train.batch_size=4",)),
    Sound("ema", ("train.ema=true", "train.ema_decay=0.99")),
    Sound("workers", ("data.workers=2",)),
    Sound("decord", ("data.decoder=decord",)),
    Sound("pyav", ("data.decoder=pyav",)),
    Sound("pad", ("data.resize=pad",)),
    Sound("squash and flip", ("data.resize=squash", "data.flip=true")),
    Sound("nothing held out", ("data.holdout=0",)),
    Sound("no validation", ("validation.samples=0", "validation.clips=0")),
    Sound("a validation image", apply=_image),
    Sound("fps 24", ("data.fps=24",)),
    Sound("fps 7", ("data.fps=7",)),
    Sound("fps 12.5", ("data.fps=12.5",)),
    Sound("slow clips", ("data.fps=1",)),
    Sound("gradient checkpointing", ("memory.checkpointing=diffusers", "memory.vae_chunk=1", "adapt.method=full")),
    Sound("a large VAE chunk", ("memory.vae_chunk=64",)),
    Sound("no dropout, no guidance", ("conditioning.dropout=0", "validation.guidance=[1.0, 1.0]")),
    Sound("constant schedule, no clipping", ("train.schedule=constant", "train.warmup=0", "train.clip_norm=null")),
    Sound("noise levels of SVD", ("objective.p_mean=0.7", "objective.p_std=1.6")),
    Sound("tensorboard", ("tracking.backends=[tensorboard]",)),
    Sound("fp16 files", apply=_variant),
    Sound("both variants side by side", apply=_both_variants),
    Sound("clips in folders", apply=_nested),
    Sound("clips of several containers, upright", apply=_wide_clip),
    Sound("on_bad_clip=error with good clips", ("data.on_bad_clip=error",)),
    Sound("a run that goes on", apply=_resumed("adapt.method=lora", "adapt.rank=4")),
    Sound("tiny with lora", ("adapt.method=lora", "train.precision=bf16", "train.batch_size=1"), base="tiny"),
    Sound("tiny with temporal", ("adapt.method=temporal", "train.batch_size=2"), base="tiny"),
]  # fmt: skip
