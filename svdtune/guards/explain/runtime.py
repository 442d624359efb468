"""Types, devices, ranks, memory, files of data: where the text itself names the kind of cause."""

from __future__ import annotations

import re

from svdtune.guards.explain.explanation import Explanation, commas
from svdtune.guards.explain.messages import Message
from svdtune.guards.explain.numbers import Numbers

_WRAPPERS = {
    "DistributedDataParallel",
    "DataParallel",
    "FullyShardedDataParallel",
    "DeepSpeedEngine",
    "OptimizedModule",
}
_NETWORK_PARTS = {"down_blocks", "up_blocks", "mid_block", "conv_in", "config", "add_embedding", "time_embedding"}
_DTYPES = {
    "c10::Half": "float16",
    "Half": "float16",
    "c10::BFloat16": "bfloat16",
    "BFloat16": "bfloat16",
    "float": "float32",
    "Float": "float32",
    "double": "float64",
    "Double": "float64",
}


def dtypes(message: Message, numbers: Numbers) -> list[Explanation]:
    """Input and weights of different types."""
    given, weights = (_DTYPES.get(name, name) for name in message.groups[:2])
    if given == weights:
        return []
    double = (
        "numpy makes float64 by default: convert the array with .astype('float32'). "
        if "float64" in (given, weights)
        else ""
    )
    what = "weights" if message.kind != "dtype_attention" else "keys"
    return [
        Explanation(
            "NUM650",
            f"the input is {given}, the {what} are {weights}",
            "high",
            "the text names both types",
            f"{given} and {weights}.",
            "Without autocast, torch multiplies only tensors of one type. Frozen parts in half precision (VAE, CLIP) "
            "meet float32 inputs, or the reverse.",
            f"{double}Run the call under autocast, or cast the input to the {what}' type: x.to(next(module.parameters()).dtype).",
        )
    ]


def unscale(message: Message, numbers: Numbers) -> list[Explanation]:
    """The gradient scaler met fp16 gradients."""
    return [
        Explanation(
            "NUM601",
            "trained parameters are float16",
            "high",
            "the gradient scaler refuses nothing else with these words",
            message.groups[0],
            "The scaler of fp16 training divides float32 gradients. The weights were loaded or cast to float16, also "
            "by a pipeline's .to(float16) "
            "that moved the network in training.",
            "Keep trained parameters in float32 (diffusers: cast_training_params) and only frozen ones in half; "
            "train.precision=bf16 needs no scaler.",
        )
    ]


def nan(message: Message, numbers: Numbers) -> list[Explanation]:
    """Something found values that are not finite."""
    latents = "latent" in message.line
    return [
        Explanation(
            "NUM651",
            "the VAE gave values that are not finite" if latents else "values are not finite",
            "medium" if latents else "low",
            "the text names latents" if latents else "the text does not say where they arose",
            message.line[:160],
            "float16 ends at 65504, and activations of the VAE pass it; a learning rate that is too high does the same to weights.",
            "Run the VAE in float32 or bfloat16; if training itself diverges, train.precision=bf16, a lower train.lr "
            "and a longer train.warmup.",
        )
    ]


def attribute(message: Message, numbers: Numbers) -> list[Explanation]:
    """`'X' object has no attribute 'y'`: a wrapper, a missing part, or a class without that surface."""
    owner, name = ("", message.groups[0]) if message.kind == "attribute_bare" else message.groups[:2]
    text = f"{owner or 'a class that the text leaves out'} has no {name}."
    if owner in _WRAPPERS or (not owner and name in _NETWORK_PARTS):
        return [
            Explanation(
                "DST801",
                f"{name} is asked of the wrapper, not of the network",
                "high" if owner else "low",
                f"{owner} wraps a network" if owner else f"{name} is a part of a UNet; the text leaves the class out",
                text,
                "accelerator.prepare wraps the network when there are several processes, so this fails only there.",
                f"accelerator.unwrap_model(model).{name}, or keep the value from before prepare. Call forward on the "
                f"wrapped model all the same: "
                "otherwise gradients are not averaged.",
            )
        ]
    if name == "module" and re.search(r"Model$|UNet|Transformer|Encoder", owner):
        return [
            Explanation(
                "DST801",
                "`.module` is asked of a network that is not wrapped",
                "high",
                "only wrappers have `.module`",
                text,
                "With one process accelerator.prepare gives the network itself back.",
                "accelerator.unwrap_model(model) instead of model.module.",
            )
        ]
    if re.search(r"Pipeline$", owner) and "lora" in name:
        return [
            Explanation(
                "ENV055",
                f"{owner} cannot {name.replace('_', ' ')}",
                "high",
                "the class has no LoRA mixin",
                text,
                "diffusers' video pipeline was written without LoRA; a script finds out at its first checkpoint, "
                "after the steps are spent.",
                "Save and load adapters with peft (PeftModel), as svdtune's export does.",
            )
        ]
    if "Scheduler" in owner and name in ("get_velocity", "add_noise", "alphas_cumprod", "betas"):
        return [
            Explanation(
                "SEM550",
                f"{owner} has no {name}: an image training recipe on SVD's scheduler",
                "high",
                "the class and the name are in the text",
                text,
                "SVD is trained with continuous noise levels (EDM): sigma is drawn, x = x0 + sigma n, timestep = ln(sigma) / 4.",
                "Compute the noisy latents from sigma; do not use integer timesteps.",
            )
        ]
    return _of_none(name, message, text) if owner == "NoneType" else []


def _of_none(name: str, message: Message, text: str) -> list[Explanation]:
    if name == "encode_image" or re.search(rf"image_encoder\.{name}\b", message.context):
        return [
            Explanation(
                "CKP257",
                "the image encoder is not loaded",
                "high" if name == "encode_image" else "medium",
                f"{name} is what an image encoder has, and it is None",
                text,
                "The checkpoint holds the UNet and the VAE only; the loader put None where the image encoder should be.",
                "Load image_encoder/ of the SVD release beside it, or a file that includes it.",
            )
        ]
    if "save_attn_procs" in message.context or "weights_name" in message.context:
        return [
            Explanation(
                "ENV055",
                "this diffusers cannot save attention processors so",
                "medium",
                "the traceback names save_attn_procs",
                text,
                "An old version takes weights_name None for a name and fails at saving, after training.",
                "Upgrade diffusers, or save with peft.",
            )
        ]
    return []


def memory(message: Message, numbers: Numbers) -> list[Explanation]:
    """An allocation failed."""
    asked = re.search(r"[Tt]ried to allocate ([\d.]+ ?\w+)", message.context)
    free = re.search(r"([\d.]+ [GM]i?B) (?:is )?free", message.context)
    where = (
        "decode"
        if re.search(r"decode|vae", message.context, re.IGNORECASE)
        else "sampling"
        if "sampler" in message.context
        else ""
    )
    details = [
        f"asked for {asked[1]}" if asked else "",
        f"{free[1]} free" if free else "",
        f"in {where}" if where else "",
    ]
    return [
        Explanation(
            "MEM701",
            "out of memory",
            "high",
            "the text says it",
            ", ".join(filter(None, [message.groups[0], *details])),
            "Activations grow with batch x frames x height x width; the VAE decodes all frames of a chunk at once.",
            "memory.vae_chunk=1 where the VAE fails. "
            * (where == "decode")
            + "Fewer frames (data.num_frames), a smaller size, adapt.method=lora, memory.checkpointing=diffusers, train.batch_size=1. "
            "`svdtune preflight CONFIG` says what a step needs.",
        )
    ]


def launch_shape(message: Message, numbers: Numbers) -> list[Explanation]:
    """`CUDA error: invalid configuration argument`: a kernel's grid is too large."""
    temporal = bool(re.search(r"xformers|memory_efficient|attention|temporal", message.context, re.IGNORECASE))
    positions = (numbers.height or 576) // numbers.factor * ((numbers.width or 1024) // numbers.factor)
    return [
        Explanation(
            "ENV050",
            "a kernel was launched with too large a grid: attention folds positions and heads into the batch",
            "medium" if temporal else "low",
            "the traceback names attention"
            if temporal
            else "the text does not name the kernel; temporal attention is where video models do this",
            f"{positions} latent positions x heads per clip in temporal attention at {numbers.height or 576} x "
            f"{numbers.width or 1024}; the limit is 65,535.",
            "Temporal attention has one row for every latent position; xformers puts rows x heads on a grid axis that ends at 65,535.",
            "Use torch's scaled_dot_product_attention (do not enable xformers), or a smaller batch or size.",
        )
    ]


def operator(message: Message, numbers: Numbers) -> list[Explanation]:
    """An operator that this device or build lacks."""
    xformers, mps, kind = message.groups
    name = xformers or mps or kind
    return [
        Explanation(
            "ENV051",
            f"{name} has no kernel here",
            "high" if xformers or mps else "medium",
            "the text says it",
            message.line[:200],
            "The xformers build has no kernel for this device, type or head width (the VAE's middle block has one head of 512)."
            if xformers
            else "SVD's temporal layers are Conv3d; this device or torch version cannot run them."
            if mps
            else "This operator does not exist for that type on this device, mostly half precision on a CPU.",
            "Do not enable xformers: torch's own attention needs nothing."
            if xformers
            else "Upgrade torch, or use another device."
            if mps
            else "Use float32 there (train.precision=no).",
        )
    ]


def device(message: Message, numbers: Numbers) -> list[Explanation]:
    """Two devices in one operation."""
    a, b = message.groups
    meta = "meta" in (a, b)
    return [
        Explanation(
            "ENV052",
            f"tensors on {a} and {b} meet",
            "high",
            "the text names both",
            f"{a} and {b}.",
            "AlphaBlender makes its mix_factor in a way that ignores `with torch.device('meta')`: 38 parameters of "
            "SVD's UNet stay on the CPU."
            if meta
            else "A part was left on the CPU, or an input was not moved.",
            "network.to('meta') after building it."
            if meta
            else "Move network and inputs to one device before the call.",
        )
    ]


def stack(message: Message, numbers: Numbers) -> list[Explanation]:
    """Clips of a batch that are not equally large."""
    if message.groups[1] and re.search(r"\d", message.groups[0]):
        a, b = message.shape(0), message.shape(1)
        if len(a) != len(b) or a == b:
            return []
        axes = [axis for axis, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]
        differ = commas([f"{a[axis]} against {b[axis]} on axis {axis}" for axis in axes])
        pixels = all(axis >= len(a) - 2 for axis in axes)
    else:
        a, differ, pixels = message.shape(1), "the text gives one shape only", False
    video = len(a) >= 4
    what = "heights or widths" if pixels else "numbers of frames" if video else "sizes"
    return [
        Explanation(
            "DAT350",
            f"clips of one batch have different {what}",
            "high" if video and "one shape" not in differ else "medium",
            "stack compares whole shapes",
            f"{message.line[:160]}: {differ}.",
            "The collate function stacks the clips of a batch: each must have the same frames, height and width. "
            "Rounding of clip length, short files "
            "and a resize of the short side alone give others.",
            "Sample a fixed number of frames by time, and crop to a fixed size after resizing (data.resize=cover).",
        )
    ]


def short_clip(message: Message, numbers: Numbers) -> list[Explanation]:
    """A clip has too few frames."""
    return [
        Explanation(
            "DAT351",
            f"a clip has fewer than {message.groups[0]} frames",
            "high",
            "the text says it",
            message.line[:200],
            "The check runs only when that clip is drawn, so training stops at a random step.",
            "Run `svdtune data scan CONFIG` first; data.on_bad_clip=skip leaves short clips out, a smaller data.num_frames keeps them.",
        )
    ]


def decode(message: Message, numbers: Numbers) -> list[Explanation]:
    """A video that the decoder cannot read."""
    return [
        Explanation(
            "DAT352",
            "a video file cannot be decoded",
            "medium",
            "the decoder's own words; damaged, missing and unsupported files give the same ones",
            message.line[:200],
            "A damaged or cut file, a path that does not exist, or a container that the decoder's FFmpeg cannot seek in.",
            "Find it with `svdtune data scan CONFIG`; re-encode it or leave it out. data.decoder=pyav has a newer FFmpeg than decord.",
        )
    ]


def ranks(message: Message, numbers: Numbers) -> list[Explanation]:
    """What goes wrong between processes, in gradients and on resume."""
    known = {
        "reduction": (
            "DST802",
            "some trained parameters got no gradient on a rank",
            "high",
            "DDP waits for every trained parameter in every step",
            "Trained parameters that the loss does not use, a loss that skips a branch on one rank, or reentrant "
            "checkpointing with inputs that need no gradient.",
            "Freeze what the loss does not use; gradient checkpointing with use_reentrant=False; "
            "find_unused_parameters=True only hides it.",
        ),
        "no_grad": (
            "SHP406",
            "nothing that is trained reaches the loss",
            "medium",
            "backward found no gradient at all",
            "Nothing requires gradients, or the way to it is cut by a detach or no_grad; also reentrant checkpointing.",
            "Check that some parameter has requires_grad (adapt.method, adapt.targets), and that the network is called outside no_grad.",
        ),
        "watchdog": (
            "DST803",
            "one rank waited for another that never came",
            "medium",
            "a collective timed out",
            "Ranks ran different code: save_state or another collective on the main process only, uneven data, or a "
            "rank that died earlier.",
            "Call accelerator.save_state on all ranks; look for the first rank that failed, its own traceback is the cause.",
        ),
        "optimizer": (
            "DST804",
            "the trained parameters are not those of the checkpoint",
            "high",
            "optimizer or EMA state counts other parameters",
            "Another set is trained than when the checkpoint was written (another adapt.method, rank or targets, or "
            "code that freezes others).",
            "Resume with the same adapt section, or start a new run from the exported weights.",
        ),
        "seed": (
            "DST805",
            "the seed is None",
            "high",
            "the text says it",
            "A script's default seed is None and it is used before that is checked.",
            "Give a seed (run.seed).",
        ),
    }
    code, title, confidence, reason, why, fix = known[message.kind]
    assert confidence in ("high", "medium")
    return [Explanation(code, title, confidence, reason, message.line[:200], why, fix)]


def scheduler(message: Message, numbers: Numbers) -> list[Explanation]:
    """A scheduler of another family."""
    if message.kind == "scheduler":
        return [
            Explanation(
                "SEM550",
                f"the scheduler does not know prediction_type {message.groups[1]}",
                "high",
                "the text says it",
                message.line[:200],
                "The model or the sampler is of another family (flow matching); SVD predicts v.",
                "Take scheduler/scheduler_config.json of the model's own release.",
            )
        ]
    noisy = "add_noise" in message.context or "scheduling_" in message.context
    return [
        Explanation(
            "SEM550",
            "a timestep that is not in the scheduler's schedule",
            "high" if noisy else "low",
            "the traceback is inside a scheduler"
            if noisy
            else "a search for a timestep that is not there ends in an empty tensor; other code may too",
            message.line[:200],
            "add_noise looks the integer timestep up in continuous timesteps and finds none.",
            "For SVD draw sigma, x = x0 + sigma n, and timestep = ln(sigma) / 4.",
        )
    ]


def none_tensor(message: Message, numbers: Numbers) -> list[Explanation]:
    """A function was given None for a tensor."""
    image = message.groups[0] == "randn_like"
    return (
        [
            Explanation(
                "SEM551",
                f"{message.groups[0]} got None",
                "low",
                "in SVD's sampling the first noise is made like the conditioning image; other code may give None too"
                if image
                else "only the None is certain",
                message.line[:200],
                "An input is None: in image-to-video, mostly the picture that was not given or not found.",
                "Give a first frame, and check its path.",
            )
        ]
        if image
        else []
    )
