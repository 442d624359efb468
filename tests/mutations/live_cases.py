"""Mistakes that only the running step shows: no shape, no dtype and no file is wrong. Each names the check that must see it."""

from __future__ import annotations

from typing import Any, Literal

from tests.mutations.sandbox import Mutation, Sandbox, edit_code

Check = Literal["batch", "meaning", "gradients"]
TOPIC = ("SEM", "NUM", "SHP")


def _live(name: str, failure: str, target: str, *changes: tuple[str, str], overrides: tuple[str, ...] = ()) -> Mutation:
    def apply(box: Sandbox) -> None:
        box.set(*overrides)
        edit_code(box, _function(target), *changes)

    return Mutation(name, "silent", TOPIC, failure, apply)


def _function(target: str) -> Any:
    from svdtune.checkpoint import state, tensors
    from svdtune.data import clips, dataset, loader, readers, transform
    from svdtune.diffusion import conditioning, draws, edm
    from svdtune.model import adapt, recompute
    from svdtune.trainer import build, loop, optimizer, step
    from svdtune.trainer import state as trainer_state

    modules = {"dataset": dataset, "recompute": recompute, "trainer_state": trainer_state,
               "conditioning": conditioning, "edm": edm, "draws": draws, "step": step, "loader": loader, "transform": transform,
               "clips": clips, "readers": readers, "loop": loop, "optimizer": optimizer, "state": state, "adapt": adapt,
               "tensors": tensors, "build": build}  # fmt: skip
    module, _, path = target.partition(".")
    found: Any = modules[module]
    for part in path.split("."):
        found = getattr(found, part)
    return found


_DRAW = "draws._draw_one"
_PIXELS = '"pixels": torch.stack([clip.pixels for clip in clips])'

BATCH = [
    _live("blue and red swapped by the reader", "F38", "readers.PyavReader._decode", ('format="rgb24"', 'format="bgr24"'),
          overrides=("data.decoder=pyav",)),
    _live("blue and red swapped by the transform", "F38", "transform.to_pixels", (".permute(2, 0, 1)[None]",
        ".permute(2, 0, 1).flip(0)[None]")),
    _live("pixels in [0, 1]", "F36", "transform.to_pixels", (".div_(127.5).sub_(1.0)", ".div_(255)")),
    _live("pictures upside down", "own", "transform.to_pixels", ("fitted.flip(-1) if flip else fitted", "fitted.flip(-2)")),
    _live("frames read backwards", "own", "clips.window_frames", ("np.maximum(numbers, 0).tolist()",
        "np.maximum(numbers, 0).tolist()[::-1]")),
    _live("frames sorted as strings", "I17", "clips.window_frames", ("np.maximum(numbers, 0).tolist()",
        "sorted(np.maximum(numbers, 0).tolist(), key=lambda n: str(n - numbers[0]))"),
          overrides=("data.num_frames=12", "data.fps=24")),
    _live("every frame twice", "own", "clips.window_frames", ("np.maximum(numbers, 0).tolist()",
        "[numbers[i // 2 * 2] for i in range(len(numbers))]"),
          overrides=("data.num_frames=8",)),
    _live("clips at half the rate that is told", "M06", "clips.window_frames", ("np.arange(num_frames) / fps",
        "np.arange(num_frames) / fps / 2"),
          overrides=("data.num_frames=9",)),
    _live("frames of each clip shuffled", "own", "loader._tensors", (_PIXELS,
        '"pixels": torch.stack([clip.pixels.roll(1, 0) for clip in clips])')),
    _live("the first clip for every clip of the batch", "M21", "loader._tensors", (_PIXELS,
        '"pixels": torch.stack([clips[-1].pixels for clip in clips])')),
    _live("sigma cut off at the scheduler's 14.6", "F02", _DRAW, ("log_normal(sigma, objective.p_mean, objective.p_std)",
          "log_normal(sigma, objective.p_mean, objective.p_std).clamp(max=14.6)")),
    _live("sigma within two deviations", "own", _DRAW, ("log_normal(sigma, objective", "log_normal(sigma.clamp(-2, 2), objective")),
    _live("sigma uniform in its logarithm", "own", _DRAW, ("log_normal(sigma, objective",
        "log_normal(torch.rand((), generator=g) * 3.46 - 1.73, objective")),
    _live("p_mean and p_std exchanged", "own", _DRAW, ("objective.p_mean, objective.p_std", "objective.p_std, objective.p_mean")),
    _live("sigma of SVD for SVD-XT", "own", _DRAW, ("objective.p_mean, objective.p_std", "objective.p_mean - 0.3, objective.p_std")),
    _live("noise strength not of noise_aug", "M11", _DRAW, ("log_normal(strength, *conditioning.noise_aug)",
        "log_normal(strength, -2.0, 0.5)")),
    _live("one flag for token and latent", "own", _DRAW, ('"keep_image_latents": keep[1]', '"keep_image_latents": keep[0]')),
    _live("kept as often as it should be dropped", "own", _DRAW, (">= conditioning.dropout", "< conditioning.dropout")),
    _live("nothing is ever dropped", "own", _DRAW, (">= conditioning.dropout", ">= -1")),
    _live("noise of half the size", "own", _DRAW, ("torch.randn(shape, generator=g) for", "torch.randn(shape, generator=g) / 2 for")),
    _live("uniform noise", "own", _DRAW, ("torch.randn(shape, generator=g) for", "torch.rand(shape, generator=g) for")),
    _live("sigma and noise strength from one number", "own", _DRAW, ("sigma, strength = torch.randn(2, generator=g)",
        "sigma = strength = torch.randn((), generator=g)")),
    _live("every second sample has the draws of the one before", "F33", "draws.make_draws", ("generator(seed, sample)",
        "generator(seed, sample // 2)")),
]  # fmt: skip

MEANING = [
    _live("file's rate for the clip's", "M06", "loader._tensors", ("float(data.fps)", "24.0")),
    _live("another motion bucket than configured", "own", "loader._tensors", ("float(data.motion_bucket)",
        "float(data.motion_bucket) - 1")),
    _live("condition and target change places in the sample", "own", "conditioning.unet_input", ("], dim=2", "][::-1], dim=2")),
    _live("one clip's noise level for all", "M20", "conditioning.unet_input", ("scalings(draws.sigma)",
        "scalings(draws.sigma[:1].expand_as(draws.sigma))")),
    _live("one clip's noise for all", "F33", "conditioning.unet_input", ("encoded.latents, draws.noise, draws.sigma)",
        "encoded.latents, draws.noise[:1].expand_as(draws.noise), draws.sigma)")),
    _live("image latents of the neighbouring clip", "M21", "step.encode", ("conditioning.image_latents(parts.vae, first_frame, draws,",
        "conditioning.image_latents(parts.vae, first_frame.flip(0), draws,")),
    _live("CLIP embedding of the neighbouring clip", "M21", "step.encode", ("conditioning.image_embeds(parts.image_encoder, first_frame,",
        "conditioning.image_embeds(parts.image_encoder, first_frame.flip(0),")),
    _live("CLIP sees the noised frame", "own", "step.encode", ("conditioning.image_embeds(parts.image_encoder, first_frame,",
          "conditioning.image_embeds(parts.image_encoder, first_frame + draws.noise_aug_strength.reshape(-1, 1, 1, 1) * "
          "draws.pixel_noise,")),
    _live("CLIP sees the last frame", "own", "step.encode", ("conditioning.image_embeds(parts.image_encoder, first_frame,",
          "conditioning.image_embeds(parts.image_encoder, batch.pixels[:, -1],")),
    _live("target of zero noise level", "own", "step.denoise", ("edm.v_target(encoded.latents, draws.noise, draws.sigma)",
        "edm.v_target(encoded.latents, draws.noise, draws.sigma * 0)")),
    _live("target with the posterior's noise", "own", "step.denoise", ("edm.v_target(encoded.latents, draws.noise,",
        "edm.v_target(encoded.latents, draws.posterior_noise,")),
    _live("answer detached from the loss", "B07", "step.denoise", ("edm.v_loss(prediction.model_output, prediction.target)",
          "edm.v_loss(prediction.model_output.detach(), prediction.target) + 0 * prediction.model_output.mean()")),
    _live("loss of the first frames alone", "own", "edm.v_loss", ("(model_output - target) ** 2",
        "(model_output[:, :1] - target[:, :1]) ** 2")),
    _live("absolute error for the squared one", "own", "edm.v_loss", ("(model_output - target) ** 2", "(model_output - target).abs()")),
    _live("loss weighted by sigma", "own", "step.denoise", ("loss_per_clip.mean()", "(loss_per_clip * draws.sigma).mean()")),
    _live("loss computed in bfloat16", "F05", "edm.v_loss", ("(model_output - target) ** 2",
        "((model_output - target).bfloat16() ** 2).float()")),
    _live("sigma rounded to half precision", "F05", "edm.v_target", ("s = append_dims(sigma, latents)",
        "s = append_dims(sigma.bfloat16().float(), latents)")),
    _live("latents rounded to half precision", "C20", "conditioning.target_latents", ("mean + std *", "mean.bfloat16().float() + std *")),
    _live("VAE under autocast", "C20", "conditioning.posterior", ("enabled=False", "enabled=True, dtype=torch.bfloat16"),
          ("torch.cat([p.mean for p in parts]), torch.cat([p.std for p in parts])",
          "torch.cat([p.mean.float() for p in parts]), torch.cat([p.std.float() for p in parts])")),
    _live("UNet called with the ids turned round", "F31", "step.predict", ("unet_input.added_time_ids,",
        "unet_input.added_time_ids.flip(1),")),
    _live("UNet called with another timestep", "F01", "step.predict", ("unet_input.timestep,", "unet_input.timestep * 1000,")),
    _live("UNet called without its token", "own", "step.predict", ("unet_input.encoder_hidden_states.to(parts.dtype)",
        "unet_input.encoder_hidden_states.to(parts.dtype) * 0")),
    _live("UNet called with a sample rounded to bfloat16", "own", "step.predict", ("unet_input.sample.to(parts.dtype)",
        "unet_input.sample.bfloat16().to(parts.dtype)")),
]  # fmt: skip

GRADIENTS = [
    _live("old gradients are kept", "own", "loop.update", ("optimizer.zero_grad(set_to_none=True)", "pass")),
    _live("no update is made", "own", "loop.update", ("        optimizer.step()\n", "        pass\n")),
    _live("averages never follow", "own", "loop.update", ("session.ema.step(trained)", "pass"), overrides=("train.ema=true",)),
    _live("micro-steps are summed", "F20", "loop.accumulate", ("result.loss / config.train.accumulation", "result.loss"),
        overrides=("train.accumulation=2",)),
    _live("micro-steps are divided twice", "F20", "loop.accumulate", ("result.loss / config.train.accumulation",
        "result.loss / config.train.accumulation**2"),
          overrides=("train.accumulation=2",)),
    _live("the last micro-step alone counts", "own", "loop.accumulate", ("    result = train_step(parts, batch, draws)",
        "    session.optimizer.zero_grad(); result = train_step(parts, batch, draws)"),
          overrides=("train.accumulation=2",)),
    _live("UNet asked without gradients", "B07", "step.predict", ("return output.float()",
        "return output.detach().float().requires_grad_()")),
    _live("half of the parameters in the optimizer", "M30", "optimizer.make_learning",
        ("make_optimizer(config, trained.values(), device)", "make_optimizer(config, list(trained.values())[::2], device)")),
    _live("another learning rate than asked for", "own", "optimizer.make_optimizer", ("trained, lr=train.lr, betas=train.betas, weight_decay=train.weight_decay, fused",
        "trained, lr=train.lr / 10, betas=train.betas, weight_decay=train.weight_decay, fused")),
    _live("frozen parameters get gradients", "own", "build.prepare_networks", ("    model.unet.train()",
        "    model.unet.train()\n    model.unet.conv_in.requires_grad_(True)")),
    _live("recomputed reentrantly, with frozen inputs", "B07", "recompute.recompute", ("unet.enable_gradient_checkpointing()",
          "unet.enable_gradient_checkpointing(lambda f, *a: __import__('torch').utils.checkpoint.checkpoint(f, *a, "
          "use_reentrant=True))"),
          overrides=("memory.checkpointing=diffusers",)),
    _live("checkpoints hold rounded weights", "own", "state.save_trained", ("dict(named_parameters)",
        "{n: p.bfloat16().float() for n, p in dict(named_parameters).items()}")),
    _live("checkpoints are loaded and not used", "own", "state._copy_exactly", ("target.copy_(shared_out(saved[name], target))", "pass")),
    _live("trained weights in bfloat16, updates rounded away", "M01", "build.prepare_networks",
          ("    return trained", "    for p in trained.values():\n        p.data = p.data.bfloat16()\n    return trained"),
          overrides=("adapt.method=full", "train.precision=bf16", "train.lr=1e-5")),
    Mutation("a rate that float32 rounds away", "silent", TOPIC, "M01", lambda box: box.set("adapt.method=full", "train.lr=1e-10")),
]  # fmt: skip

FRESH = [
    _live(
        "noise_aug twice",
        "own",
        "conditioning.image_latents",
        (
            "posterior(vae, noisy, chunk)[0]",
            "posterior(vae, add_noise(noisy, draws.pixel_noise, draws.noise_aug_strength), chunk)[0]",
        ),
    ),
    _live(
        "ids dropped with token",
        "own",
        "conditioning.unet_input",
        (
            "added_time_ids=added_time_ids(batch, draws)",
            "added_time_ids=added_time_ids(batch, draws) * draws.keep_image_embeds[:, None]",
        ),
    ),
    _live(
        "CLIP picture zeroed before encoder (dropped token = embedding of grey)",
        "own",
        "step.encode",
        (
            "conditioning.image_embeds(parts.image_encoder, first_frame,",
            "conditioning.image_embeds(parts.image_encoder, first_frame * draws.keep_image_embeds[:, None, None, None],",
        ),
    ),
    _live(
        "inverted dropout: kept flags 1/(1-p)",
        "own",
        "draws._draw_one",
        (">= conditioning.dropout).float()", ">= conditioning.dropout).float() / (1 - conditioning.dropout)"),
    ),
    _live(
        "c_in of sigma clamped to 80",
        "own",
        "conditioning.unet_input",
        ("scalings(draws.sigma)", "scalings(draws.sigma.clamp(max=80))"),
    ),
    _live(
        "weight decay ignored",
        "own",
        "optimizer.make_optimizer",
        ("betas=train.betas, weight_decay=train.weight_decay, fused", "betas=train.betas, weight_decay=0.0, fused"),
    ),
    _live(
        "betas swapped",
        "own",
        "optimizer.make_optimizer",
        (
            "betas=train.betas, weight_decay=train.weight_decay, fused",
            "betas=train.betas[::-1], weight_decay=train.weight_decay, fused",
        ),
    ),
    _live("Adam not AdamW", "own", "optimizer.make_optimizer", ("torch.optim.AdamW(", "torch.optim.Adam(")),
    _live(
        "no clipping",
        "own",
        "loop.update",
        ("max_norm = session.config.train.clip_norm or math.inf", "max_norm = math.inf"),
        overrides=("train.clip_norm=1e-4",),
    ),
    _live(
        "clipping per parameter",
        "own",
        "loop.update",
        (
            "grad_norm = torch.as_tensor(accelerator.clip_grad_norm_(trained, max_norm))",
            "grad_norm = torch.stack([accelerator.clip_grad_norm_([p], max_norm) for p in trained]).norm()",
        ),
        overrides=("train.clip_norm=1e-4",),
    ),
    _live(
        "schedule ticks twice",
        "own",
        "loop.update",
        ("session.schedule.step()", "session.schedule.step(); session.schedule.step()"),
    ),
    _live(
        "schedule never ticks (lr stays 0 in warm-up)",
        "own",
        "loop.update",
        ("session.schedule.step()", "pass"),
        overrides=("train.warmup=10",),
    ),
    _live(
        "warm-up as long as the run",
        "own",
        "optimizer.make_schedule",
        ("num_warmup_steps=config.warmup", "num_warmup_steps=config.steps"),
    ),
    _live(
        "cosine counts micro-steps",
        "own",
        "optimizer.make_schedule",
        ("num_training_steps=config.steps", "num_training_steps=config.steps // config.accumulation"),
        overrides=("train.accumulation=2",),
    ),
    _live(
        "EMA decay 1-decay",
        "own",
        "optimizer.make_ema",
        ("decay=config.ema_decay", "decay=1 - config.ema_decay"),
        overrides=("train.ema=true",),
    ),
    _live(
        "EMA stepped before the update",
        "own",
        "loop.update",
        ("        optimizer.step()\n", "        session.ema.step(trained); optimizer.step()\n"),
        overrides=("train.ema=true",),
    ),
    _live(
        "EMA one name behind (same-shape params rotated)",
        "own",
        "loop.update",
        (
            "session.ema.step(trained)",
            "session.ema.step([trained[(i + 0)] if i % 2 else trained[i].detach() * 0 for i in range(len(trained))])",
        ),
        overrides=("train.ema=true",),
    ),
    _live(
        "draws of micro-step 0 reused",
        "own",
        "loop.accumulate",
        (
            "draws = draws_for(batch, parts.facts, config)",
            "draws = draws_for(__import__('dataclasses').replace(batch, sample=batch.sample if not samples else samples[0].cpu()), "
            "parts.facts, config)",
        ),
        overrides=("train.accumulation=2",),
    ),
    _live(
        "one batch for all micro-steps",
        "own",
        "loop.accumulate",
        ("batch = next(batches)", "batch = next(batches) if micro == 0 else batch"),
        overrides=("train.accumulation=2",),
    ),
    _live(
        "draws repeat every 1000 samples",
        "own",
        "draws.make_draws",
        ("generator(seed, sample)", "generator(seed, sample % 1000)"),
    ),
    _live(
        "only the file's first window",
        "own",
        "dataset.window_number",
        ("number = int(rng.integers(starts))", "number = 0"),
    ),
    _live(
        "clips at fps-1",
        "own",
        "clips.window_frames",
        ("np.arange(num_frames) / fps", "np.arange(num_frames) / (fps - 1)"),
        overrides=("data.num_frames=8",),
    ),
    _live(
        "third and later clips get clip 1's condition",
        "own",
        "step.encode",
        (
            "    require(encoded, axes)",
            "    encoded.image_latents.copy_(encoded.image_latents[torch.arange(len(batch.fps)).clamp(max=1)].clone())\n    "
            "require(encoded, axes)",
        ),
        overrides=("train.batch_size=4",),
    ),
    _live(
        "clips behind the first reversed in time",
        "own",
        "loader._tensors",
        (
            "torch.stack([clip.pixels for clip in clips])",
            "torch.stack([clips[0].pixels, *(c.pixels.flip(0) for c in clips[1:])])",
        ),
    ),
    _live(
        "CLIP mean and std swapped",
        "own",
        "build.clip_pixels",
        (
            'tuple(extractor["image_mean"]), tuple(extractor["image_std"])',
            'tuple(extractor["image_std"]), tuple(extractor["image_mean"])',
        ),
    ),
    _live(
        "scaling_factor of SDXL in the facts",
        "own",
        "build.build",
        (
            "model.facts, dtype, config.memory.vae_chunk",
            "__import__('dataclasses').replace(model.facts, scaling_factor=0.13025), dtype, config.memory.vae_chunk",
        ),
    ),
    _live(
        "LoRA alpha 1",
        "own",
        "adapt._inject_lora",
        ("lora_alpha=config.rank if config.alpha is None else config.alpha,", "lora_alpha=1,"),
        overrides=("adapt.rank=16",),
    ),
    _live(
        "held-out files trained on",
        "own",
        "loop.loader_from",
        ("session.catalog.train,", "[*session.catalog.train, *session.catalog.held_out],"),
        overrides=("data.holdout=0.3",),
    ),
    _live(
        "CLIP token cached over steps",
        "own",
        "step.encode",
        (
            "conditioning.image_embeds(parts.image_encoder, first_frame, parts.clip)",
            "parts.image_encoder.__dict__.setdefault('_cache', conditioning.image_embeds(parts.image_encoder, first_frame, parts.clip))",
        ),
    ),
    _live(
        "optimizer steps twice",
        "own",
        "loop.update",
        ("        optimizer.step()\n", "        optimizer.step(); optimizer.step()\n"),
    ),
    _live(
        "clip on half the parameters",
        "own",
        "loop.update",
        ("accelerator.clip_grad_norm_(trained, max_norm)", "accelerator.clip_grad_norm_(trained[::2], max_norm)"),
        overrides=("train.clip_norm=1e-4",),
    ),
    _live(
        "same file order each epoch",
        "own",
        "dataset.file_number",
        ("_order(seed, epoch,", "_order(seed, 0,"),
    ),
    _live(
        "noise strength beyond 1 clipped in cond only",
        "own",
        "conditioning.image_latents",
        ("draws.noise_aug_strength)", "draws.noise_aug_strength.clamp(max=0.1))"),
    ),
    _live(
        "loss clamped at 2",
        "own",
        "edm.v_loss",
        ("(model_output - target) ** 2", "((model_output - target) ** 2).clamp(max=2)"),
    ),
    _live(
        "resume: schedule at 0",
        "own",
        "trainer_state.restore",
        ("_advance(session, position.step)", "_advance(session, 0)"),
    ),
    _live(
        "resume: samples from 0",
        "own",
        "trainer_state.restore",
        ('Position(trainer["step"], trainer["samples"])', 'Position(trainer["step"], 0)'),
    ),
    _live(
        "one noise for all frames (one for all channels of pixel noise)",
        "own",
        "draws._draw_one",
        ("torch.randn(shape, generator=g) for", "torch.randn((1, *shape[1:]), generator=g).expand(shape).clone() for"),
    ),
    _live(
        "noise constant over the picture",
        "own",
        "draws._draw_one",
        (
            "torch.randn(shape, generator=g) for",
            "torch.randn((*shape[:-2], 1, 1), generator=g).expand(shape).clone() for",
        ),
    ),
    _live(
        "noise of frame i+1 correlated .9 with i",
        "own",
        "draws._draw_one",
        (
            "torch.randn(shape, generator=g) for",
            "(0.95 * torch.randn((1, *shape[1:]), generator=g) + 0.3122 * torch.randn(shape, generator=g)) for",
        ),
    ),
    _live(
        "clip on the loader's last frame dup (t-1 repeated)",
        "own",
        "clips.window_frames",
        (
            "np.maximum(numbers, 0).tolist()",
            "[*np.maximum(numbers, 0).tolist()[:-1], np.maximum(numbers, 0).tolist()[-2]]",
        ),
        overrides=("data.num_frames=8",),
    ),
    _live(
        "first frame repeated (off by one)",
        "own",
        "clips.window_frames",
        (
            "np.maximum(numbers, 0).tolist()",
            "[np.maximum(numbers, 0).tolist()[0], *np.maximum(numbers, 0).tolist()[:-1]]",
        ),
        overrides=("data.num_frames=8",),
    ),
    _live(
        "pixels squared-gamma",
        "own",
        "transform.to_pixels",
        (".div_(127.5).sub_(1.0)", ".div_(255).pow_(1.1).mul_(2).sub_(1.0)"),
    ),
    _live(
        "ring: update skipped every second step",
        "own",
        "loop.update",
        ("        optimizer.step()\n", "        optimizer.step() if session.schedule.last_epoch % 2 == 0 else None\n"),
    ),
    _live(
        "off-centre crop (top)",
        "own",
        "transform._fit",
        (
            "(height - pixels.shape[2]) // 2, (width - pixels.shape[3]) // 2",
            "(height - pixels.shape[2]), (width - pixels.shape[3])",
        ),
        overrides=("data.height=64", "data.width=64"),
    ),
]
"""Thought of by somebody who had not written the checks: 38 of these 44 passed unseen at first."""
