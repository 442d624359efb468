"""The real conditioning, step, mathematics and adaptation, each with one mistake in it."""

from __future__ import annotations

from typing import Any

from tests.mutations.sandbox import Kind, Mutation, Sandbox, edit_code, edit_json

SHAPE, NUMBER = ("SHP",), ("SHP", "NUM")


def _frames(box: Sandbox, count: int) -> None:
    """As many frames as the model's own config says, so that the frame count is not what is wrong."""
    box.set(f"data.num_frames={count}")
    edit_json(box.model / "unet/config.json", num_frames=count)


def _code(
    name: str, kind: Kind, failure: str, target: str, *changes: tuple[str, str], overrides: tuple[str, ...] = (),
    frames: int | None = None, topic: tuple[str, ...] = SHAPE, warning: bool = False,
) -> Mutation:  # fmt: skip
    def apply(box: Sandbox) -> None:
        edit_code(box, _function(target), *changes)
        box.set(*overrides)
        if frames is not None:
            _frames(box, frames)

    return Mutation(name, kind, topic, failure, apply, warning)


def _function(target: str) -> Any:
    from svdtune.data import clips, loader, transform
    from svdtune.diffusion import conditioning, draws, edm
    from svdtune.model import adapt, recompute
    from svdtune.trainer import build, optimizer, step

    modules = {"conditioning": conditioning, "edm": edm, "draws": draws, "step": step, "adapt": adapt, "build": build,
               "loader": loader, "transform": transform, "optimizer": optimizer, "clips": clips,
               "recompute": recompute}  # fmt: skip
    module, _, name = target.partition(".")
    return getattr(modules[module], name)


SQUARE = ("data.height=64", "data.width=64")
TARGET, IMAGE, EMBEDS, CLIP, IDS, INPUT, POSTERIOR = (
    f"conditioning.{name}"
    for name in ("target_latents", "image_latents", "image_embeds", "clip_pixels", "added_time_ids", "unet_input", "posterior")
)  # fmt: skip
_BACK = 'rearrange(sample, "(b t) z h w -> b t z h w", b=b)'
_NOISY = 'append_dims(c.c_in, noisy) * noisy, repeat(condition, "b z h w -> b t z h w", t=noisy.shape[1])'
_SAMPLE = f"torch.cat(\n            [{_NOISY}], dim=2\n        )"
_STACK = "torch.stack([batch.fps - 1, batch.motion_bucket, draws.noise_aug_strength], dim=1)"
_TOKEN = 'rearrange(token, "b d -> b 1 d")'

ENCODING = [
    _code("latents keep clip and frame axis merged", "shape", "E23", TARGET, (_BACK, "sample")),
    _code("latents with the frame axis first", "shape", "C18", TARGET, (_BACK, f'{_BACK}.transpose(0, 1)')),
    _code("latents with the frame axis first, as many clips as frames", "silent", "C18 F33", TARGET,
          (_BACK, f"{_BACK}.transpose(0, 1)"), overrides=("train.batch_size=3",)),
    _code("latents with channels before frames", "shape", "C18", TARGET, (_BACK, f"{_BACK}.transpose(1, 2)")),
    _code("latents with channels before frames, as many frames as channels", "silent", "C18", TARGET,
          (_BACK, f"{_BACK}.transpose(1, 2)"), frames=4),
    _code("latents viewed channels first", "shape", "C18", TARGET,
          (_BACK, "sample.reshape(b, sample.shape[1], -1, *sample.shape[2:])")),
    _code("latents with height and width swapped", "shape", "D15", TARGET, (_BACK, f"{_BACK}.transpose(3, 4)")),
    _code("latents with height and width swapped, square frames", "silent", "C18", TARGET,
          (_BACK, f"{_BACK}.transpose(3, 4)"), overrides=SQUARE),
    _code("video given to the VAE with five axes", "shape", "F10", TARGET,
          ('rearrange(batch.pixels, "b t c h w -> (b t) c h w")', "batch.pixels")),
    _code("pixels given to the VAE channels last", "shape", "C13", TARGET,
          ('"b t c h w -> (b t) c h w"', '"b t c h w -> (b t) h w c"')),
    _code("only the first frame encoded", "shape", "E13", TARGET,
          ('rearrange(batch.pixels, "b t c h w -> (b t) c h w")', "batch.pixels[:, 0]")),
    _code("posterior noise with its five axes", "shape", "F26", TARGET,
          ('rearrange(draws.posterior_noise, "b t z h w -> (b t) z h w")', "draws.posterior_noise")),
    _code("last chunk of the VAE lost", "shape", "I08 E15", POSTERIOR,
          ("in pixels.split(chunk)]", "in pixels.split(chunk)[: len(pixels) // chunk]]")),
    _code("chunks of the VAE joined on channels", "shape", "D03", POSTERIOR,
          ("return torch.cat([p.mean for p in parts])", "return torch.cat([p.mean for p in parts], dim=1)"),
          overrides=("memory.vae_chunk=2",)),
    _code("mean and log-variance taken for the latents", "shape", "C03", POSTERIOR,
          ("torch.cat([p.mean for p in parts])", "torch.cat([p.parameters for p in parts])")),
    _code("VAE fed half precision", "shape", "G20 G25", POSTERIOR, ("part.float()", "part.half()"), topic=NUMBER),
    _code("VAE fed double precision", "shape", "G23", POSTERIOR, ("part.float()", "part.double()"), topic=NUMBER),
    _code("conditioning latent keeps its frame axis", "shape", "E23", IMAGE,
          ("return posterior(vae, noisy, chunk)[0]", "return posterior(vae, noisy, chunk)[0][:, None]")),
    _code("conditioning latent of half the channels", "shape", "C01", IMAGE,
          ("return posterior(vae, noisy, chunk)[0]", "return posterior(vae, noisy, chunk)[0].chunk(2, dim=1)[0]")),
    _code("conditioning latent transposed, square frames", "silent", "C18", IMAGE,
          ("return posterior(vae, noisy, chunk)[0]", "return posterior(vae, noisy, chunk)[0].mT"), overrides=SQUARE),
    _code("conditioning latent averaged over its pixels", "shape", "I25", IMAGE,
          ("return posterior(vae, noisy, chunk)[0]",
           "return posterior(vae, noisy, chunk)[0].mean((2, 3), keepdim=True)")),
    _code("noise strength of one clip read out for all", "silent", "M11", IMAGE,
          ("draws.noise_aug_strength)",
           "torch.full_like(draws.noise_aug_strength, draws.noise_aug_strength[0].item()))"),
          topic=("SHP", "SEM", "NUM")),
    _code("first frame keeps its frame axis", "shape", "F10", "step.encode", ("batch.pixels[:, 0]", "batch.pixels[:, :1]")),
    _code("frames of the first clip taken for the first frames", "shape", "C18", "step.encode",
          ("batch.pixels[:, 0]", "batch.pixels[0]")),
    _code("frames of the first clip taken for the first frames, as many clips as frames", "silent", "F33", "step.encode",
          ("batch.pixels[:, 0]", "batch.pixels[0]"), overrides=("train.batch_size=3",)),
    _code("red of every frame taken for the first frame, three frames", "silent", "C18", "step.encode",
          ("batch.pixels[:, 0]", "batch.pixels[:, :, 0]")),
    _code("red of every frame taken for the first frame", "shape", "C13", "step.encode",
          ("batch.pixels[:, 0]", "batch.pixels[:, :, 0]"), frames=5),
    _code("every frame taken for the first frame", "shape", "F28", "step.encode",
          ("batch.pixels[:, 0]", "batch.pixels.flatten(0, 1)")),
    _code("target and conditioning latents change places", "shape", "own", "step.encode",
          ("encoded = Encoded(", "encoded = (lambda a, b, c: Encoded(b, a, c))(")),
    _code("all 257 CLIP tokens", "shape", "F13 F28", EMBEDS, (".image_embeds.float()", ".last_hidden_state.float()")),
    _code("CLIP's inner state before the projection", "shape", "F15 F16", EMBEDS,
          (".image_embeds.float()", ".last_hidden_state[:, 0].float()")),
    _code("CLIP embedding with a token axis of its own", "shape", "F26", EMBEDS,
          (".image_embeds.float()", ".image_embeds.float()[:, None]")),
    _code("CLIP embedding left in bf16", "shape", "G26", EMBEDS, (".image_embeds.float()", ".image_embeds"),
          overrides=("train.precision=bf16",), topic=NUMBER),
    _code("one embedding for the whole batch", "silent", "F28 E01", EMBEDS,
          (".image_embeds.float()", ".image_embeds.float().mean(0, keepdim=True)")),
    _code("CLIP fed the frame at its own size", "shape", "F10 F11", CLIP,
          ("resize_with_antialiasing(first_frame.float(), clip.size)", "first_frame.float()")),
    _code("CLIP fed a picture of half its side", "shape", "F10", CLIP,
          ("(first_frame.float(), clip.size)", "(first_frame.float(), clip.size // 2)")),
    _code("CLIP fed one grey channel", "shape", "C13", CLIP,
          ("return (resized - mean) / std", "return ((resized - mean) / std).mean(1, keepdim=True)")),
    _code("CLIP fed channels last", "shape", "C13", CLIP,
          ("return (resized - mean) / std", "return ((resized - mean) / std).permute(0, 2, 3, 1)")),
    _code("CLIP statistics along the width", "shape", "I25", CLIP, (".reshape(1, -1, 1, 1)", ".reshape(1, 1, 1, -1)")),
    _code("CLIP statistics along the batch", "shape", "F33", CLIP, (".reshape(1, -1, 1, 1)", ".reshape(-1, 1, 1, 1)")),
    _code("CLIP statistics along the batch, three clips", "silent", "F33", CLIP,
          (".reshape(1, -1, 1, 1)", ".reshape(-1, 1, 1, 1)"), overrides=("train.batch_size=3",)),
]  # fmt: skip

CONDITIONS = [
    _code("one time id", "shape", "F30 A23", IDS, (_STACK, "draws.noise_aug_strength[:, None]")),
    _code("two time ids", "shape", "F30", IDS, ("draws.noise_aug_strength], dim=1", "], dim=1")),
    _code("four time ids", "shape", "F30", IDS, ("draws.noise_aug_strength], dim=1", "*[draws.noise_aug_strength] * 2], dim=1")),
    _code("time ids (3, b)", "shape", "F31", IDS, ("dim=1", "dim=0")),
    _code("time ids (3, b), three clips", "silent", "F31", IDS, ("dim=1", "dim=0"), overrides=("train.batch_size=3",)),
    _code("time ids reshaped instead of transposed, three clips", "silent", "F31", IDS,
          (_STACK, f"{_STACK.replace('dim=1', 'dim=0')}.reshape(3, -1)"), overrides=("train.batch_size=3",)),
    _code("time ids flat", "silent", "F31", IDS, (_STACK, f"{_STACK}.flatten()")),
    _code("time ids for every frame", "shape", "F28", IDS, (_STACK, f"{_STACK}.repeat_interleave(batch.pixels.shape[1], dim=0)")),
    _code("time ids twice, as for guidance", "shape", "E03 F28", IDS, (_STACK, f"{_STACK}.repeat(2, 1)")),
    _code("time ids of the first clip only", "shape", "F28", IDS, (_STACK, f"{_STACK}[:1]")),
    _code("time ids as whole numbers", "silent", "M11", IDS, (_STACK, f"{_STACK}.long()"), topic=NUMBER),
    _code("condition not concatenated", "shape", "C16", INPUT, (_SAMPLE, "append_dims(c.c_in, noisy) * noisy")),
    _code("condition concatenated along the frames", "shape", "C16", INPUT, ("dim=2\n", "dim=1\n")),
    _code("condition concatenated along the width", "shape", "C16", INPUT, ("dim=2\n", "dim=4\n")),
    _code("condition concatenated three times", "shape", "A03 C05", INPUT, ("t=noisy.shape[1])],", "t=noisy.shape[1])] + [noisy],")),
    _code("condition on the first frame only", "shape", "E13", INPUT,
          ('repeat(condition, "b z h w -> b t z h w", t=noisy.shape[1])', "condition[:, None]")),
    _code("condition repeated behind its channels", "shape", "C18", INPUT,
          ('"b z h w -> b t z h w"', '"b z h w -> b z t h w"')),
    _code("condition repeated behind its channels, as many frames as channels", "silent", "C18", INPUT,
          ('"b z h w -> b t z h w"', '"b z h w -> b z t h w"'), frames=4),
    _code("sample with channels before frames", "shape", "C18", INPUT, (_SAMPLE, f"{_SAMPLE}.transpose(1, 2)")),
    _code("sample with channels before frames, as many frames as channels", "silent", "C18", INPUT,
          (_SAMPLE, f"{_SAMPLE}.transpose(1, 2)"), frames=8),
    _code("sample without a clip axis", "shape", "E23", INPUT, (_SAMPLE, f"{_SAMPLE}.flatten(0, 1)")),
    _code("sample with height and width swapped, square frames", "silent", "C18", INPUT,
          (_SAMPLE, f"{_SAMPLE}.transpose(3, 4)"), overrides=SQUARE),
    _code("sample with clips and frames swapped, as many clips as frames", "silent", "F33", INPUT,
          (_SAMPLE, f"{_SAMPLE}.transpose(0, 1)"), overrides=("train.batch_size=3",)),
    _code("noisy and clean latents, three times the channels", "shape", "A03 C01", INPUT, ("[append_dims(c.c_in", "[noisy, append_dims(c.c_in")),
    _code("CLIP embedding without a token axis", "shape", "F26", INPUT, (_TOKEN, "token")),
    _code("CLIP token on the batch axis", "shape", "F26", INPUT, ('"b d -> b 1 d"', '"b d -> 1 b d"')),
    _code("CLIP token repeated for every frame", "shape", "F28", INPUT,
          (_TOKEN, 'repeat(token, "b d -> (b t) 1 d", t=noisy.shape[1])')),
    _code("CLIP token repeated to 77 tokens", "silent", "F13", INPUT, (_TOKEN, 'repeat(token, "b d -> b n d", n=77)')),
    _code("CLIP token beside a null token, as for guidance", "shape", "F28", INPUT,
          (_TOKEN, f"torch.cat([{_TOKEN}, 0 * {_TOKEN}])")),
    _code("sigma with four axes", "shape", "F26 F33", "edm.append_dims", ("(1,) * (like.ndim - values.ndim)", "(1, 1, 1)")),
    _code("c_in with four axes, as many clips as frames", "silent", "F33", INPUT,
          ("append_dims(c.c_in, noisy)", "c.c_in[:, None, None, None]"), overrides=("train.batch_size=3",)),
    _code("sigma without axes of its own", "shape", "F26", "edm.append_dims",
          ("values.reshape(values.shape + (1,) * (like.ndim - values.ndim))", "values")),
    _code("sigma along the width", "shape", "F33", "edm.append_dims",
          ("values.shape + (1,) * (like.ndim - values.ndim)", "(1,) * (like.ndim - values.ndim) + values.shape")),
    _code("timestep for every frame", "shape", "F28", INPUT,
          ("timestep=c.c_noise", "timestep=c.c_noise.repeat_interleave(noisy.shape[1])")),
    _code("timestep of the first clip for all", "silent", "M20", INPUT, ("timestep=c.c_noise", "timestep=c.c_noise[0]")),
    _code("timestep with the axes of the latents", "shape", "F26", INPUT,
          ("timestep=c.c_noise", "timestep=append_dims(c.c_noise, noisy)")),
    _code("timestep as a whole number", "silent", "F01 F03", INPUT, ("timestep=c.c_noise", "timestep=c.c_noise.long()"), topic=NUMBER),
    _code("timestep in bf16", "silent", "G26", INPUT, ("timestep=c.c_noise", "timestep=c.c_noise.bfloat16()"), topic=NUMBER),
    _code("dropped embeddings cut out of the batch", "shape", "I10", INPUT,
          ("encoded.image_embeds * append_dims(draws.keep_image_embeds, encoded.image_embeds)",
           "encoded.image_embeds[draws.keep_image_embeds.bool()]"), overrides=("conditioning.dropout=0.9",)),
    _code("dropout of the token along its width", "shape", "F26", INPUT,
          ("append_dims(draws.keep_image_embeds, encoded.image_embeds)", "draws.keep_image_embeds")),
]  # fmt: skip

_LOSS = 'reduce((model_output - target) ** 2, "b ... -> b", "mean")'

STEP = [
    _code("target averaged over channels", "silent", "own", "edm.v_target",
          ("return (noise", "return (lambda v: v.mean(2, keepdim=True))((noise"), ("rsqrt()", "rsqrt())")),
    _code("target of the first frame only", "silent", "own", "edm.v_target",
          ("return (noise", "return (lambda v: v[:, :1])((noise"), ("rsqrt()", "rsqrt())")),
    _code("sigma without axes in the target", "shape", "F26", "edm.v_target", ("append_dims(sigma, latents)", "sigma")),
    _code("sigma with four axes in the target, as many clips as frames", "silent", "F33", "edm.v_target",
          ("append_dims(sigma, latents)", "sigma[:, None, None, None]"), overrides=("train.batch_size=3",)),
    _code("loss over the whole batch", "shape", "own", "edm.v_loss", ('"b ... -> b"', '"... -> "')),
    _code("loss averaged over the batch only", "shape", "own", "edm.v_loss", (_LOSS, "((model_output - target) ** 2).mean(0)")),
    _code("loss per frame", "shape", "own", "edm.v_loss", ('"b ... -> b"', '"b t ... -> t"')),
    _code("loss per frame, as many clips as frames", "silent", "F33", "edm.v_loss", ('"b ... -> b"', '"b t ... -> t"'),
          overrides=("train.batch_size=3",)),
    _code("difference zeroed before the backward pass", "shape", "own", "edm.v_loss",
          (f"return {_LOSS}",
           'd = model_output - target\n    squared = d**2\n    d.detach().zero_()\n    return reduce(squared, "b ... -> b", "mean")'),
          topic=("SHP", "NUM", "SEM")),
    _code("sigma in half precision", "silent", "G15", "edm.scalings", ("variance = ", "sigma = sigma.half()\n    variance = "), topic=NUMBER),
    _code("sigma in double precision", "shape", "G23", "edm.scalings", ("variance = ", "sigma = sigma.double()\n    variance = "),
          topic=NUMBER),
    _code("prediction detached", "shape", "J18", "step.predict", ("return output.float()", "return output.detach().float()"),
          topic=("SHP", "NUM", "SEM")),
    _code("UNet asked without gradients", "shape", "J18", "step.predict",
          ("output = parts.unet(", "output = torch.no_grad()(parts.unet)("), topic=("SHP", "NUM", "SEM")),
    _code("a copy of the UNet asked", "silent", "J11 J16", "step.predict",
          ("output = parts.unet(", 'output = __import__("copy").deepcopy(parts.unet)('), topic=("SHP", "NUM", "SEM", "DST")),
    _code("a copy of one trained layer used", "silent", "J16", "step.predict",
          ("    with torch.autocast(",
           '    parts.unet.conv_out = __import__("copy").deepcopy(parts.unet.conv_out)\n    with torch.autocast('),
          overrides=("adapt.method=full",), topic=("SHP", "NUM", "SEM", "DST")),
    _code("prediction compared with itself", "shape", "J18", "step.denoise",
          ("edm.v_loss(prediction.model_output, prediction.target)", "edm.v_loss(prediction.target, prediction.target)"),
          topic=("SHP", "NUM", "SEM")),
    _code("loss detached", "shape", "J18", "step.denoise", ("loss_per_clip.mean()", "loss_per_clip.mean().detach()"),
          topic=("SHP", "NUM", "SEM")),
    _code("loss as a Python number", "shape", "J18", "step.denoise", ("loss_per_clip.mean()", "loss_per_clip.mean().item()")),
    _code("loss per clip taken for the loss", "shape", "own", "step.denoise", ("loss_per_clip.mean(), loss", "loss_per_clip, loss")),
    _code("loss in double precision", "shape", "G23", "step.denoise", ("loss_per_clip.mean()", "loss_per_clip.double().mean()"),
          topic=NUMBER),
    _code("UNet's input overwritten before the backward pass", "shape", "own", "step.denoise",
          ("    result = ", "    unet_input.sample.zero_()\n    result = "), overrides=("adapt.method=full",),
          topic=("SHP", "NUM", "SEM")),
    _code("UNet's answer left as a tuple", "shape", "own", "step.predict", (")[0]", ")")),
    _code("UNet fed half precision", "shape", "G26", "step.predict",
          ("unet_input.sample.to(parts.dtype)", "unet_input.sample.half()"), topic=NUMBER),
    _code("no autocast around a bf16 UNet", "shape", "G26", "step.predict", ("enabled=parts.dtype != torch.float32", "enabled=False"),
          overrides=("train.precision=bf16",), topic=NUMBER),
    _code("prediction left in bf16", "shape", "G26", "step.predict", ("return output.float()", "return output"),
          overrides=("train.precision=bf16",), topic=NUMBER),
    _code("UNet given an argument it does not know", "shape", "A06 K01", "step.predict",
          ("return_dict=False", "class_labels=None, return_dict=False")),
    _code("first frame left out of the UNet", "shape", "E13 E01", "step.predict",
          ("unet_input.sample.to(parts.dtype)", "unet_input.sample[:, 1:].to(parts.dtype)")),
    _code("prediction without its last channel", "shape", "C11", "step.predict", ("return output.float()", "return output.float()[:, :, :-1]")),
    _code("prediction without a frame axis", "shape", "E23", "step.predict", ("return output.float()", "return output.float().flatten(0, 1)")),
    _code("prediction with height and width swapped, square frames", "silent", "C18", "step.predict",
          ("return output.float()", "return output.float().mT"), overrides=SQUARE),
    _code("prediction with frames and channels swapped, as many frames as channels", "silent", "C18", "step.predict",
          ("return output.float()", "return output.float().transpose(1, 2)"), frames=4),
    _code("time ids not given to the UNet", "shape", "F23", "step.predict",
          ("            added_time_ids=unet_input.added_time_ids,\n", "")),
    _code("width bound to the height of the batch", "shape", "D13", "step.encode",
          ("axes = batch.axes(parts.facts)", "axes = batch.axes(parts.facts)\n    axes = {**axes, 'h': axes['w'], 'w': axes['h']}")),
]  # fmt: skip

ADAPT = [
    _code("a method that matches no parameter", "shape", "J18 M15", "adapt._learns",
          ('return method == "full" or not TEMPORAL.search(name)', "return False"), overrides=("adapt.method=full",),
          topic=("SEM", "CFG", "SHP")),
    _code("nothing trained and nobody told", "shape", "J18", "adapt.adapt",
          ("if not matched:", "unet.requires_grad_(False)\n    trained = {}\n    if False:"), topic=("SEM", "CFG", "SHP", "NUM")),
    _code("trained parameters frozen afterwards", "shape", "J18 J15", "adapt.adapt",
          ("if not matched:", "unet.requires_grad_(False)\n    if not matched:"), topic=("SEM", "CFG", "SHP", "NUM")),
    _code("trained parameters kept in bf16", "silent", "G01 L03", "adapt.adapt",
          ("trained_dtype if parameter.requires_grad else dtype", "dtype"), overrides=("train.precision=bf16",),
          topic=("SEM", "SHP", "NUM")),
    _code("trained parameters in double precision", "shape", "G23", "adapt.adapt",
          ("trained_dtype if parameter.requires_grad", "torch.float64 if parameter.requires_grad"), topic=("SEM", "SHP", "NUM")),
    _code("frozen parameters in half precision without autocast", "shape", "G26 G20", "adapt.adapt",
          ("else dtype)", "else torch.float16)"), topic=("SEM", "SHP", "NUM")),
    _code("half of the trained parameters not handed to the optimizer", "silent", "J16", "adapt.adapt",
          ("in unet.named_parameters() if parameter.requires_grad}",
           'in unet.named_parameters() if parameter.requires_grad and not name.endswith("bias")}'),
          topic=("SEM", "SHP", "NUM")),
    _code("LoRA not injected", "shape", "K06 J18", "adapt._inject_lora",
          ("    with torch.random", "    return\n    with torch.random"), overrides=("adapt.method=lora",),
          topic=("SEM", "CFG", "SHP")),
    _code("LoRA on dead layers only", "silent", "M15", "adapt.lora_modules",
          ("alive = [name for name in matched if not DEAD.search(name)]", "alive = matched"),
          overrides=("adapt.method=lora", "adapt.targets=[attn2.to_q]"), topic=("SEM", "CFG", "SHP")),
]  # fmt: skip

_REENTRANT = "__import__('functools').partial(torch.utils.checkpoint.checkpoint, use_reentrant=True)"

INPUTS = [
    _code("CLIP's picture size doubled", "shape", "F10", "build.clip_pixels", ("model.facts.clip_size", "2 * model.facts.clip_size")),
    _code("reentrant checkpointing with frozen inputs", "silent", "J15", "recompute.recompute",
          ("enable_gradient_checkpointing()", f"enable_gradient_checkpointing({_REENTRANT})"),
          overrides=("memory.checkpointing=diffusers", "adapt.method=lora"), topic=("SHP", "SEM", "NUM", "DST")),
    _code("noise drawn with the batch axis inside", "shape", "I11", "draws.make_draws",
          ("torch.stack([row[name] for row in rows])", "torch.stack([row[name] for row in rows], dim=-1)")),
    _code("noise of every clip joined on the frame axis", "shape", "I11", "draws.make_draws",
          ("torch.stack([row[name] for row in rows])",
           "torch.stack([row[name] for row in rows]) if rows[0][name].ndim == 0 else torch.cat([row[name] for row in rows])")),
    _code("sigma drawn for every frame", "shape", "F33", "draws._draw_one",
          ('"sigma": log_normal(sigma,', '"sigma": log_normal(sigma.expand(axes["t"]),')),
    _code("dropout as true and false", "shape", "G20", "draws._draw_one", (").float()", ")"), topic=NUMBER),
    _code("clips with channels before frames", "shape", "C18", "transform.to_pixels",
          ("return pixels", "return pixels.transpose(0, 1).contiguous()"),
          frames=5, topic=("SHP", "DAT")),
    _code("clips with one grey channel", "shape", "I25", "transform.to_pixels",
          ("return pixels", "return pixels.mean(1, keepdim=True)"),
          topic=("SHP", "DAT")),
    _code("frames per second as whole numbers", "shape", "G23", "loader._tensors",
          ("torch.full((count,), float(data.fps))", "torch.full((count,), int(data.fps))"), topic=("SHP", "DAT", "NUM")),
    _code("pixels stay bytes", "shape", "G23", "transform.to_pixels",
          ("return pixels", "return pixels.byte()"), topic=("SHP", "DAT", "NUM")),
]  # fmt: skip

SETS = ("SHP", "SEM", "NUM", "CFG")
LEARNING = [
    _code("dead layers trained with method full", "silent", "M15", "adapt._learns",
          ("    if DEAD.search(name):\n        return False\n", ""), overrides=("adapt.method=full",), topic=SETS),
    _code("of the temporal layers only the mix factors", "silent", "J16", "adapt._learns",
          ("return bool(TEMPORAL.search(name))", 'return name.endswith(".mix_factor")'), overrides=("adapt.method=temporal",), topic=SETS),
    _code("of the temporal layers only the biases", "silent", "J16", "adapt._learns",
          ("return bool(TEMPORAL.search(name))", 'return bool(TEMPORAL.search(name)) and name.endswith("bias")'),
          overrides=("adapt.method=temporal",), topic=SETS),
    _code("temporal layers trained with method spatial", "silent", "own", "adapt._learns",
          ('return method == "full" or not TEMPORAL.search(name)', "return True"), overrides=("adapt.method=spatial",), topic=SETS),
    _code("copies of the parameters handed to the optimizer", "silent", "J16", "build.prepare_networks",
          ("    return trained", "    return {n: torch.nn.Parameter(p.detach().clone()) for n, p in trained.items()}"), topic=SETS),
    _code("half of the parameters in the optimizer", "silent", "J16", "optimizer.make_learning",
          ("make_optimizer(config, trained.values(), device)", "make_optimizer(config, list(trained.values())[::2], device)"), topic=SETS),
    _code("an average over nothing", "silent", "own", "optimizer.make_ema", ("EMAModel(parameters,", "EMAModel(iter(()),"),
          overrides=("train.ema=true",), topic=SETS),
    _code("names in the optimizer", "shape", "J18", "optimizer.make_learning",
          ("make_optimizer(config, trained.values(), device)", "make_optimizer(config, trained.keys(), device)"), topic=SETS),
    _code("a schedule that does not exist", "shape", "own", "optimizer.make_schedule",
          ("SCHEDULES[config.schedule]", 'SCHEDULES[config.schedule] + "s"'), topic=SETS),
    _code("a target of one frame, and nobody checks", "silent", "F33", "step.denoise",
          ("    require(prediction, axes)\n", ""), ("Prediction(predict(parts, unet_input), target)", "Prediction(predict(parts, unet_input), target[:, :1])")),
    _code("draws for another size than the batch's", "shape", "own", "draws.draws_for",
          ("batch.axes(facts)", "{**batch.axes(facts), 'h': batch.axes(facts)['w'], 'w': batch.axes(facts)['h']}")),
    _code("the UNet's answer detached", "silent", "J18", "step.predict", ("return output.float()", "return output.detach().float()")),
    _code("the last chunk of frames dropped", "shape", "D18", POSTERIOR,
          ("for part in pixels.split(chunk)]", "for part in pixels.split(chunk) if len(part) == min(chunk, len(pixels))]")),
    _code("pixels in half precision", "shape", "G20", "transform.to_pixels", ("return pixels", "return pixels.half()"),
          topic=("SHP", "DAT", "NUM")),
    _code("a window one frame too long", "shape", "I08", "clips.window_frames", ("np.arange(num_frames)", "np.arange(num_frames + 1)"), topic=("SHP", "DAT")),
]  # fmt: skip

CODE = [*ENCODING, *CONDITIONS, *STEP, *ADAPT, *INPUTS, *LEARNING]
