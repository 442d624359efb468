"""Types, devices, attributes, memory, stacked clips: what a text names, read with the stack it stands in."""

from __future__ import annotations

import re

from svdtune.guards.explain.explanation import Confidence, Explanation, commas
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
_ADAPTERS = re.compile(r"lora|adapter|attn_procs")
_DTYPES = {"half": "float16", "bfloat16": "bfloat16", "float": "float32", "double": "float64"}
_GRID = 65535
_TIB = 2**40
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def dtypes(message: Message, numbers: Numbers) -> list[Explanation]:
    """Input and weights of different types, or on different devices: old type names hold both."""
    given, weights = (_dtype(name) for name in message.groups[:2])
    cuda = ["cuda" in name for name in message.groups[:2]]
    if cuda[0] != cuda[1]:
        places = ["the GPU" if here else "the CPU" for here in cuda]
        return [_two_devices(places[0], places[1], "A part was left on the CPU, or an input was not moved.", "Move network and inputs to "
                             "one device before the call: x.to(device).")]  # fmt: skip
    if given == weights:
        return []
    what = "weights" if message.kind != "dtype_attention" else "keys"
    double = (
        "numpy makes float64 by default: convert the array with .astype('float32'). "
        if "float64" in (given, weights)
        else ""
    )
    return [
        Explanation(
            code="NUM650",
            title=f"the input is {given}, the {what} are {weights}",
            confidence="high",
            reason="the text names both types",
            evidence=f"{given} and {weights}.",
            why="Without autocast, torch multiplies only tensors of one type. Frozen parts in half precision (VAE, CLIP) meet float32 "
            "inputs, or the reverse.",
            fix=f"{double}Run the call under autocast, or cast the input to the {what}' type: x.to(next(module.parameters()).dtype).",
        )
    ]  # fmt: skip


def _dtype(name: str) -> str:
    """`c10::Half`, `torch.cuda.HalfTensor`, `Float`: torch's own name of the type."""
    bare = re.sub(r"^.*[.:]|Tensor$", "", name)
    return _DTYPES.get(bare.lower(), bare)


def nan(message: Message, numbers: Numbers) -> list[Explanation]:
    """Something found values that are not finite."""
    latents = bool(re.search(r"\blatents\b", message.line))
    loss = bool(re.search(r"\bloss\b|returned nan", message.line, re.IGNORECASE))
    return [
        Explanation(
            code="NUM651",
            title="the VAE gave values that are not finite" if latents else "values are not finite",
            confidence="medium" if latents or loss else "low",
            reason="the text names latents" if latents else "the text does not say where they arose",
            evidence=message.line[:160],
            why="float16 ends at 65504, and activations of the VAE pass it; a learning rate that is too high does the same to weights.",
            fix="Run the VAE in float32 or bfloat16; if training itself diverges, train.precision=bf16, a lower train.lr and a longer "
            "train.warmup.",
        )
    ]


def attribute(message: Message, numbers: Numbers) -> list[Explanation]:
    """`'X' object has no attribute 'y'`: a wrapper, a missing part, or a class without that surface."""
    owner, name = ("", message.groups[0]) if message.kind == "attribute_bare" else message.groups[:2]
    text = f"{owner or 'a class that the text leaves out'} has no {name}."
    if owner in _WRAPPERS or (not owner and name in _NETWORK_PARTS):
        return [
            Explanation(
                code="DST801",
                title=f"{name} is asked of the wrapper, not of the network",
                confidence="high" if owner else "low",
                reason=f"{owner} wraps a network"
                if owner
                else f"{name} is a part of a UNet; the text leaves the class out",
                evidence=text,
                why="accelerator.prepare wraps the network when there are several processes, so this fails only there.",
                fix=f"accelerator.unwrap_model(model).{name}, or keep the value from before prepare. Call forward on the wrapped model all "
                "the same: otherwise gradients are not averaged.",
            )
        ]
    if name == "module" and re.search(r"Model$|UNet|Transformer|Encoder", owner):
        return [
            Explanation(
                code="DST801",
                title="`.module` is asked of a network that is not wrapped",
                confidence="high",
                reason="only wrappers have `.module`",
                evidence=text,
                why="With one process accelerator.prepare gives the network itself back.",
                fix="accelerator.unwrap_model(model) instead of model.module.",
            )
        ]
    if re.search(r"Pipeline$|UNet\w*Model$", owner) and _ADAPTERS.search(name):
        return [_no_adapters(owner, name, text)]
    if "Scheduler" in owner and name in ("get_velocity", "add_noise", "alphas_cumprod", "betas"):
        return [_image_recipe(f"{owner} has no {name}: an image training recipe on SVD's scheduler", "high", "the class and the name are "
                              "in the text", text)]  # fmt: skip
    return _of_none(name, message, text) if owner == "NoneType" else []


def _no_adapters(owner: str, name: str, text: str) -> Explanation:
    video = bool(re.search(r"SpatioTemporal|StableVideo", owner))
    why = (
        "diffusers' SVD classes were written without LoRA functions; a script finds out at its first checkpoint, after the steps are spent."
        if video
        else "The class was written without it, or this diffusers is older than the function."
    )
    inject = (
        "unet = peft.inject_adapter_in_model(LoraConfig(...), unet)"
        if owner.endswith("Model")
        else "Save and load adapters with peft"
    )
    return Explanation(
        code="ENV055",
        title=f"{owner} has no {name}",
        confidence="high",
        reason="the text names class and function",
        evidence=text,
        why=why,
        fix=f"{inject}, as svdtune does"
        + ("." if video else "; or upgrade diffusers where newer versions of the class have it."),
    )


def _image_recipe(title: str, confidence: Confidence, reason: str, evidence: str) -> Explanation:
    return Explanation(
        code="SEM550",
        title=title,
        confidence=confidence,
        reason=reason,
        evidence=evidence,
        why="SVD is trained with continuous noise levels (EDM): its schedule has no integer timesteps, and add_noise looks them "
        "up in vain.",
        fix="Draw sigma, x = x0 + sigma n, timestep = ln(sigma) / 4.",
    )


def _of_none(name: str, message: Message, text: str) -> list[Explanation]:
    if message.ran(rf"added_time_ids\.{name}\b"):
        return [
            Explanation(
                code="SHP402",
                title="added_time_ids is None",
                confidence="high",
                reason="the failing line reads added_time_ids",
                evidence=text,
                why="SVD's UNet always needs its micro-conditions; image UNets do not have them.",
                fix="added_time_ids of shape (batch, 3) = [fps - 1, motion_bucket_id, noise_aug_strength].",
            )
        ]
    if name == "encode_image" or message.ran(rf"image_encoder\.{name}\b"):
        return [
            Explanation(
                code="CKP257",
                title="the image encoder is not loaded",
                confidence="high" if name == "encode_image" else "medium",
                reason=f"{name} is what an image encoder has, and it is None",
                evidence=text,
                why="The checkpoint holds the UNet and the VAE only; the loader put None where the image encoder should be.",
                fix="Load image_encoder/ of the SVD release beside it, or a file that includes it.",
            )
        ]
    if "save_attn_procs" in message.context or "weights_name" in message.context:
        return [
            Explanation(
                code="ENV055",
                title="this diffusers cannot save attention processors so",
                confidence="medium",
                reason="the text names save_attn_procs",
                evidence=text,
                why="An old version takes weights_name None for a name and fails at saving, after training.",
                fix="Upgrade diffusers, or save with peft.",
            )
        ]
    return []


def memory(message: Message, numbers: Numbers) -> list[Explanation]:
    """An allocation failed."""
    around = f"{message.line} {message.context}"
    asked = re.search(r"[Tt]ried to allocate ([\d.]+) ?(\w+)", around)
    free = re.search(r"([\d.]+ [GM]i?B) (?:is )?free", around)
    wanted = float(asked[1]) * _UNITS.get(asked[2], 0) if asked else 0.0
    if wanted > _TIB:
        return [
            Explanation(
                code="SHP410",
                title=f"a tensor of {wanted / _TIB:,.1f} TiB was asked for: its shape is wrong",
                confidence="medium",
                reason="no model of this kind has such a tensor",
                evidence=message.line[:200],
                why="A broadcast between axes that should be the same, or a size that was computed wrongly.",
                fix="Print the shapes before the failing line.",
            )
        ]
    if re.search(r"CPUAllocator|can't allocate memory|Cannot allocate memory", around):
        return [_main_memory(message)]
    if others := _other_processes(around):
        return [others]
    decoding = message.ran(r"decode|autoencoder")
    details = [message.groups[0], f"asked for {asked[1]} {asked[2]}" if asked else "", f"{free[1]} free" if free else "",
               "while decoding" if decoding else ""]  # fmt: skip
    return [
        Explanation(
            code="MEM701",
            title="out of memory",
            confidence="high",
            reason="the text says it",
            evidence=", ".join(filter(None, details)),
            why="Activations grow with batch x frames x height x width; the VAE decodes all frames of a chunk at once.",
            fix="memory.vae_chunk=1 where the VAE fails. "
            * decoding
            + "Fewer frames (data.num_frames), a smaller size, adapt.method=lora, memory.checkpointing=nested, train.batch_size=1. "
            "`svdtune preflight CONFIG` says what a step needs.",
        )
    ]


def _main_memory(message: Message) -> Explanation:
    return Explanation(
        "MEM750", "the machine's main memory is full", "high", "the allocator of the CPU says it", message.line[:200],
        "Not the GPU's: each process loads the model, and each loader worker holds clips.",
        "Fewer processes, a smaller data.workers, more memory, or a higher limit of the container.",
    )  # fmt: skip


def _other_processes(text: str) -> Explanation | None:
    """The GPU is full of somebody else's tensors: the text counts them."""
    held = {pid: float(size) for pid, size in re.findall(r"[Pp]rocess (\d+) has ([\d.]+) GiB memory in use", text)}
    total = re.search(r"total capacity of ([\d.]+) GiB", text)
    if not total or sum(held.values()) < float(total[1]) / 2:
        return None
    listed = commas([f"process {pid} holds {size:g} GiB" for pid, size in held.items()])
    return Explanation(
        "MEM701", "the GPU is full of another process's memory", "high", "the text counts it", f"{listed} of {total[1]} GiB.",
        "A run that was not stopped, a notebook, or another user's job keeps its memory until it ends.",
        "`nvidia-smi` lists the processes: end those that are yours, or take another GPU (CUDA_VISIBLE_DEVICES).",
    )  # fmt: skip


def launch_shape(message: Message, numbers: Numbers) -> list[Explanation]:
    """`CUDA error: invalid configuration argument`: a kernel's grid is too large."""
    height, width, batch = numbers.height or 576, numbers.width or 1024, numbers.batch or 1
    positions = batch * (height // numbers.factor) * (width // numbers.factor)
    rows = positions * numbers.heads
    enough = max(rows, positions) > _GRID or not numbers.own
    attention = message.ran(r"xformers|memory_efficient|attention|temporal")
    limit = "above" if rows > _GRID else "below"
    return [
        Explanation(
            code="ENV050",
            title="a kernel was launched with too large a grid: attention may fold positions and heads into the batch",
            confidence="medium" if attention and enough else "low",
            reason="the stack names attention" if attention
            else "the text does not name the kernel; temporal attention is where video models do this",
            evidence=f"batch {batch}, {height} x {width} pixels, {numbers.heads} heads ({numbers.whose}): {positions:,} latent positions x "
            f"heads = {rows:,} rows in temporal attention, {limit} the limit of {_GRID:,}."
            + ("" if enough else " So at these sizes it is another kernel or another batch."),
            why="Temporal attention has one row for every latent position; xformers puts rows x heads on a grid axis that ends at 65,535.",
            fix="Use torch's scaled_dot_product_attention (do not enable xformers), or a smaller batch or size.",
        )
    ]  # fmt: skip


def operator(message: Message, numbers: Numbers) -> list[Explanation]:
    """An operator that this device or build lacks."""
    xformers, mps, kind = message.groups
    why, fix = "This operator does not exist for that type on this device, mostly half precision on a CPU.", (
        "Use float32 there (train.precision=no).")  # fmt: skip
    if xformers:
        why = "The xformers build has no kernel for this device, type or head width (the VAE's middle block has one head of 512)."
        fix = "Do not enable xformers: torch's own attention needs nothing."
    elif mps:
        why = "SVD's temporal layers are Conv3d; this device or torch version cannot run them."
        fix = "Upgrade torch, or use another device."
    return [
        Explanation(
            code="ENV051",
            title=f"{xformers or mps or kind} has no kernel here",
            confidence="high" if xformers or mps else "medium",
            reason="the text says it",
            evidence=message.line[:200],
            why=why,
            fix=fix,
        )
    ]


def device(message: Message, numbers: Numbers) -> list[Explanation]:
    """Two devices in one operation."""
    a, b = message.groups
    why, fix = (
        "A part was left on the CPU, or an input was not moved.",
        "Move network and inputs to one device before the call.",
    )
    if "meta" in (a, b) and message.site != "other":
        why = (
            "AlphaBlender makes its mix_factor in a way that ignores `with torch.device('meta')`: 38 parameters of SVD's UNet stay on "
            "the CPU."
        )
        fix = "network.to('meta') after building it; for real numbers, load the weights first."
    elif "meta" in (a, b):
        why = "Meta tensors have shapes and no numbers: a part was built under torch.device('meta') and never filled."
        fix = "Load the weights (or to_empty) before the call, and give inputs on the same device."
    elif re.search(r"/torch/optim/", message.context):
        why = "It failed inside the optimizer: its state was loaded on the CPU, or the network was moved after the optimizer was made."
        fix = "Move the network first, then make the optimizer, then load its state (load_state_dict puts it beside the parameters)."
    return [_two_devices(a, b, why, fix)]


def _two_devices(a: str, b: str, why: str, fix: str) -> Explanation:
    return Explanation(
        "ENV052", f"tensors on {a} and {b} meet", "high", "the text names both", f"{a} and {b}.", why, fix
    )


def stack(message: Message, numbers: Numbers) -> list[Explanation]:
    """Clips of a batch that are not equally large."""
    a, b = message.shape(0), message.shape(1)
    if len(a) != len(b) or a == b:
        return []
    names = _axes(a, b)
    axes = [axis for axis, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]
    differ = commas([f"{a[axis]} against {b[axis]} on axis {axis}" for axis in axes])
    kinds = list(dict.fromkeys(names[axis] for axis in axes)) if names else []
    channels = kinds == ["channels"]
    noun = "clips" if len(a) >= 4 else "pictures" if names else "samples"
    return [
        Explanation(
            code="DAT350",
            title=f"{noun} of one batch have different {commas(kinds).replace(' or ', ' and ') if kinds else 'sizes'}",
            confidence="high" if names and len(a) >= 4 else "medium" if len(a) >= 3 else "low",
            reason="stack compares whole shapes" if names else "stack compares whole shapes; which axis is which they do not tell",
            evidence=f"{list(a)} and {list(b)}: {differ}.",
            why="RGBA and grey pictures have another number of channels than RGB." if channels
            else "The collate function stacks the samples of a batch: each must have the same shape. Rounding of clip length, "
            "short files and "
            "a resize of the short side alone give others.",
            fix="picture.convert('RGB') for every frame." if channels
            else "Sample a fixed number of frames by time, and crop to a fixed size after resizing (data.resize=cover).",
        )
    ]  # fmt: skip


def _axes(a: tuple[int, ...], b: tuple[int, ...]) -> list[str]:
    """What the axes of clips or pictures mean, told by the one that can only be colour; [] where two could be."""
    orders = {4: (["channels", "frames", "heights", "widths"], ["frames", "channels", "heights", "widths"],
                  ["frames", "heights", "widths", "channels"]),
              3: (["channels", "heights", "widths"], ["heights", "widths", "channels"])}  # fmt: skip
    fitting = [
        order
        for order in orders.get(len(a), ())
        if {a[order.index("channels")], b[order.index("channels")]} <= {1, 3, 4}
    ]
    return fitting[0] if len(fitting) == 1 else []


def short_clip(message: Message, numbers: Numbers) -> list[Explanation]:
    """A clip has too few frames."""
    return [
        Explanation(
            code="DAT351",
            title=f"a clip has fewer than {message.groups[0]} frames",
            confidence="high",
            reason="the text says it",
            evidence=message.line[:200],
            why="The check runs only when that clip is drawn, so training stops at a random step.",
            fix="Run `svdtune data scan CONFIG` first; data.on_bad_clip=skip leaves short clips out, a smaller data.num_frames keeps them.",
        )
    ]


def scheduler(message: Message, numbers: Numbers) -> list[Explanation]:
    """A scheduler of another family."""
    return [
        Explanation(
            code="SEM550",
            title=f"the scheduler does not know prediction_type {message.groups[1]}",
            confidence="high",
            reason="the text says it",
            evidence=message.line[:200],
            why="The model or the sampler is of another family (flow matching); SVD predicts v.",
            fix="Take scheduler/scheduler_config.json of the model's own release.",
        )
    ]


def empty_lookup(message: Message, numbers: Numbers) -> list[Explanation]:
    """A timestep that was looked up in the schedule and not found."""
    inside = message.ran(r"scheduling_|add_noise|get_velocity|index_for_timestep") or "add_noise" in message.context
    if not inside and "elements" not in message.groups[0]:
        return []
    return [_image_recipe("a timestep that is not in the scheduler's schedule", "high" if inside else "low", "the stack is "
    "inside a scheduler"
                          if inside else "a search for a timestep that is not there ends in an empty tensor; other code may too",
                          message.line[:200])]  # fmt: skip


def none_tensor(message: Message, numbers: Numbers) -> list[Explanation]:
    """A function was given None for a tensor."""
    if message.groups[0] != "randn_like":
        return []
    return [
        Explanation(
            code="SEM551",
            title="randn_like got None",
            confidence="low",
            reason="in SVD's sampling the first noise is made like the conditioning image; other code may give None too",
            evidence=message.line[:200],
            why="An input is None: in image-to-video, mostly the picture that was not given or not found.",
            fix="Give a first frame, and check its path.",
        )
    ]


CAUSES = {
    "dtype_conv": dtypes, "dtype_product": dtypes, "dtype_attention": dtypes, "nan": nan, "attribute": attribute,
    "attribute_bare": attribute, "memory": memory, "launch_shape": launch_shape, "operator": operator, "device": device, "stack": stack,
    "short_clip": short_clip, "scheduler": scheduler, "empty_scalar": empty_lookup, "none_tensor": none_tensor,
}  # fmt: skip
