"""Weights that do not fit the model they are loaded into."""

from __future__ import annotations

import re

from svdtune.guards.explain.channels import meaning
from svdtune.guards.explain.explanation import ENCODERS, Confidence, Explanation
from svdtune.guards.explain.messages import Message
from svdtune.guards.explain.numbers import Numbers

_NEVER = (
    " Do not follow the advice `ignore_mismatched_sizes=True` (with low_cpu_mem_usage=False): it leaves this layer with random weights, "
    "the error goes and the model is broken."
)
_CHECK = (
    " `svdtune inspect FILE` says what the file is and whether it is whole; compare diffusers' version with the one that the model "
    "asks for."
)
_UNET_INPUT = re.compile(r"(?:^|\b(?:unet|model\.diffusion_model|module|_orig_mod)\.)conv_in\.weight$")
_VAE = re.compile(
    r"^(?:vae\.)?(?:en|de)coder\.(?:conv_in|conv_norm_out|conv_out|time_conv_out|mid_block|down_blocks|up_blocks)\."
)
_WRAPPERS = ("module.", "_orig_mod.", "base_model.model.")
Shape = tuple[int, ...]


def load(message: Message, numbers: Numbers) -> list[Explanation]:
    """A weight whose shape in the file is not the one in the model."""
    name, model, file = _shapes(message)
    text = f"{name}: the model has {model or 'another shape'}" + (
        f", the file {file}." if file else ", the text does not give the file's shape."
    )
    # Only diffusers' own message gives that advice; every conv_in is looked up with it.
    never = _NEVER if message.kind == "load_cannot" or "ignore_mismatched" in message.context else ""
    if "lora_" in name:
        return [_adapter(name, model, file, text)]
    if _UNET_INPUT.search(name) and len(model or file) in (3, 4, 5):
        return [_conv_in(model, file, text, numbers)]
    if _VAE.match(name):
        return [_autoencoder(name, model, file, text, numbers, never)]
    if re.search(r"attn2\.to_[kv]\b", name) and len(model) == len(file) == 2 and model[0] == file[0]:
        return [_context(text, model[1], file[1], never)]
    return [_differs(name, text, never)]


def _shapes(message: Message) -> tuple[str, Shape, Shape]:
    name = message.groups[0].strip(".…")
    first, second = message.shape(1), message.shape(2) if message.groups[2] else ()
    return (name, first, second) if message.kind == "load_cannot" else (name, second, first)


def _explained(
    title: str, confidence: Confidence, reason: str, evidence: str, why: str, fix: str, code: str = "CKP250"
) -> Explanation:
    return Explanation(code, title, confidence, reason, evidence, why, fix)


def _differs(name: str, text: str, never: str) -> Explanation:
    return _explained(
        f"{name} has another shape in the file than in the model",
        "medium",
        "the text says it; which of the two is meant it does not say",
        text,
        "Class, config.json and weights are not of one model: another architecture, another version, or a config that was "
        "inferred wrongly.",
        f"Take the config.json and the class of the release the file comes from.{never}{_CHECK}",
    )


def _adapter(name: str, model: Shape, file: Shape, text: str) -> Explanation:
    axis = 0 if "lora_A" in name or "down" in name else 1
    ranks = [shape[axis] for shape in (model, file) if len(shape) > axis]
    other_base = len(ranks) == 2 and ranks[0] == ranks[1]
    return _explained(
        "the adapter was made for another base" if other_base else "the adapter has another rank in the file than in the model",
        "high" if len(ranks) == 2 else "medium",
        "lora_A is (rank, in) and lora_B (out, rank)",
        text + ("" if other_base or len(ranks) < 2 else f" Rank {ranks[1]} in the file, {ranks[0]} in the model."),
        "A LoRA fits a model with the same layers, made with the same rank.",
        "Take the adapter's own base model." if other_base else "Build the adapter with the file's rank (adapt.rank).",
    )  # fmt: skip


def _conv_in(model: Shape, file: Shape, text: str, numbers: Numbers) -> Explanation:
    takes, has = _channels(model), _channels(file)
    if takes == has and model and file:
        return _explained(
            f"the UNet has {model[0]} filters at its first level, the file {file[0]}",
            "medium",
            "the text says it; which of the two is meant it does not say",
            text,
            "block_out_channels in config.json, or class defaults where it has none, are another model's than the weights.",
            f"Build the model from the file's own config.json.{_NEVER}{_CHECK}",
        )
    # Only the number of filters says that this is the UNet that is known here; other networks have a conv_in too.
    known = {shape[0] for shape in (model, file) if len(shape) > 3} <= {numbers.channels[0]}
    means = [f"{count}: {what}." for count in (takes, has) if known and count and (what := meaning(count, numbers))]
    image_class = known and takes == numbers.latent_channels and has == 2 * numbers.latent_channels
    both = len(means) == 2
    if not known:
        reason = f"another number of filters than {numbers.whose} has, so what the channels mean is not known"
    else:
        reason = (
            "both channel counts have one known use"
            if both
            else "one of the two counts is missing from the text, or has no known use"
        )
    return _explained(
        "an SVD checkpoint is opened as an image model"
        if image_class
        else f"the model is built with {takes or 'other'} input channels, the file has {has or 'others'}",
        "high" if both else "medium",
        reason,
        " ".join([text, *means]),
        "The number of input channels says what a UNet is fed; class or config.json are another model's than the weights.",
        (
            "Open it with the right class, UNetSpatioTemporalConditionModel (StableVideoDiffusionPipeline), and its own config.json with "
            f"in_channels {has}."
            if image_class
            else f"Build the model from the file's own config.json (in_channels {has or 'of the file'}), with the class it was made for."
        )
        + _NEVER
        + _CHECK,
    )


def _channels(shape: Shape) -> int | None:
    # The first axis may be left out (`[.., 9, 3, 3]`): the input channels stand before the kernel.
    if len(shape) == 3:
        return shape[0]
    return shape[1] if len(shape) > 3 else None


def _autoencoder(name: str, model: Shape, file: Shape, text: str, numbers: Numbers, never: str) -> Explanation:
    # 64 is the class default of block_out_channels; it is the first level, at either end.
    defaults = 64 in model[:2] and 64 not in file[:2] and numbers.channels[0] != 64
    channels = name.endswith("conv_in.weight") and bool(file) and model[:1] == file[:1]
    if defaults:
        title, reason = "the autoencoder was built from class defaults, not from the folder's config.json", (
            "64 is the class default of block_out_channels; the file has another width")  # fmt: skip
    elif channels:
        key = "latent_channels" if "decoder" in name else "in_channels"
        title, reason = f"the VAE has {key} {model[1]}, the file {file[1]}", "the text says it"
    else:
        title, reason = f"{name} has another shape in the file than in the VAE", "the text says it"
    return _explained(
        title,
        "medium",
        reason,
        text,
        "The VAE's config.json, or class defaults where there is none, are another model's than its weights.",
        f"Put vae/config.json of the release beside its weights.{never}{_CHECK}",
    )


def _context(text: str, model: int, file: int, never: str) -> Explanation:
    told = [f"{width}: {ENCODERS[width]}." for width in (model, file) if width in ENCODERS]
    return _explained(
        f"the cross-attention is {model} wide in the model and {file} in the file: another base model",
        "high" if len(told) == 2 else "medium",
        "the in-width of attn2.to_k is cross_attention_dim",
        " ".join([text, *told]),
        "cross_attention_dim is the width of the text or image encoder, so models of different bases do not mix.",
        f"Take base model and weights of one family.{never}{_CHECK}",
    )


def keys(message: Message, numbers: Numbers) -> list[Explanation]:
    """Missing or unexpected keys."""
    if set(message.groups) == {"0"}:
        return []
    which, *listed = message.groups
    names = re.findall(r'"([\w.]+)"', "".join(listed))
    prefix = next((p for p in _WRAPPERS if names and all(name.startswith(p) for name in names)), "")
    if message.kind == "keys" and prefix:
        wrapped = "file" if which == "Unexpected" else "model"
        return [
            _explained(
                f"every name in the {wrapped} begins with {prefix!r}",
                "high",
                f"all {len(names)} names in the text do",
                f"{names[0]}, ...",
                f"The {wrapped} is that of a wrapper (DataParallel, torch.compile, peft) around the network.",
                f"{{name.removeprefix({prefix!r}): value for name, value in state.items()}}, and save unwrapped models."
                if wrapped == "file" else "Load into accelerator.unwrap_model(model).",
                code="CKP208",
            )
        ]  # fmt: skip
    # A new head on a pretrained encoder logs the same, and is meant.
    strict = message.kind == "keys" or bool(re.search(r"UNet|Autoencoder|CLIPVision", message.line))
    return [
        _explained(
            "keys are missing from the weights, or there are too many",
            "medium" if strict else "low",
            "the text says it; whether it was meant it does not say",
            f"{message.line[:200]}",
            "Weights of another architecture, with another prefix, or saved in part. A loader that is not strict leaves what is missing "
            "random and only logs it.",
            "Compare the header with the model: `svdtune inspect FILE --against svd-xt`. Nothing may be missing but parts "
            "frozen elsewhere.",
            code="CKP251",
        )
    ]


def init(message: Message, numbers: Numbers) -> list[Explanation]:
    """A model class that its config does not fit."""
    kind, argument = message.groups
    if not re.search(r"UNet|VAE|Autoencoder|Model|Transformer|Encoder|Decoder|Embedder", kind):
        return []
    return [
        _explained(
            f"{kind} and its config come from different versions",
            "medium" if re.search(r"from_config|from_pretrained|instantiate", message.context) else "low",
            "a model class got another set of arguments than it takes",
            f"{kind} and the argument {argument!r}.",
            "The config names what another version of the class takes.",
            f"Install the version of the code that the config was written for, or add {argument} to it.",
            code="CKP255",
        )
    ]


def header(message: Message, numbers: Numbers) -> list[Explanation]:
    """safetensors could not read the header."""
    detail = message.groups[0].strip()
    # `invalid header length`: the file ends inside its header; other files begin with an absurd length (`header too large`).
    cut = "incomplete" in detail.lower() or "invalid header length" in detail.lower()
    return [
        _explained(
            "the weight file is cut off" if cut else "the weight file does not begin as safetensors do",
            "high",
            "safetensors' own check of header and length",
            f"header: {detail}.",
            "The header promises more bytes than the file has: a download or copy stopped early." if cut
            else "The first 8 bytes are the length of a JSON header. An HTML page, a pickle or a pointer file has something else there.",
            "Delete it and download it again; `svdtune inspect FILE` then says that it is whole.",
            code="CKP252",
        )
    ]  # fmt: skip


def pickle_key(message: Message, numbers: Numbers) -> list[Explanation]:
    """The first byte of a file that was opened as a pickle and is none."""
    first = message.groups[0]
    pointer = first == "v"
    what = {"v": "a git-lfs pointer begins with 'version https://git-lfs...'", "<": "an HTML page begins with '<'"}.get(
        first
    )
    return [
        _explained(
            "the weight file is a git-lfs pointer, a few lines of text" if pointer else "the weight file is no pickle",
            "medium" if what else "low",
            what or "a pickle begins with another byte; which kind of file this is it does not tell",
            f"its first byte is {first!r}.",
            "The repository was cloned without git-lfs, so the large files were never fetched." if pointer
            else "A damaged download, a page saved as weights, or safetensors under the name of a pickle.",
            "git lfs install && git lfs pull in that folder, or download with `hf download`." if pointer
            else "`svdtune inspect FILE` says what it is; download it again.",
            code="CKP254" if pointer else "CKP252",
        )
    ]  # fmt: skip


def missing_file(message: Message, numbers: Numbers) -> list[Explanation]:
    """diffusers or transformers found no file of that name."""
    name, folder = (group.rstrip(".,") for group in message.groups[:2])
    if "/" in name:  # the hub's wording has the repository first
        name, folder = folder, name
    if not re.search(r"(?:config|index)\.json$|model[\w.-]*\.(?:bin|safetensors|h5)$", name):
        return []
    config, encoder = name.endswith(".json"), name == "pytorch_model.bin"
    fix = "Copy the config.json of each part (unet, vae, image_encoder) beside its weights." if config else (
        "Give the folder of the part: from_pretrained(FOLDER, subfolder='image_encoder')." if encoder else
        "If the folder has only *.fp16.safetensors, load it with variant='fp16' (model.variant=fp16); otherwise download the missing file."
    )  # fmt: skip
    return [
        _explained(
            f"{name} is not in {folder}",
            "medium",
            "the text says it; the reason is the usual one",
            f"{name} looked for in {folder}.",
            "The message names the last spelling that was tried: a .bin that nobody wants when the folder has only a variant's files, the "
            "root of a repository when the part is in a subfolder.",
            fix,
            code="CKP253",
        )
    ]


def hub(message: Message, numbers: Numbers) -> list[Explanation]:
    """The hub could not be asked, or was asked for the wrong thing."""
    what = message.groups[0].strip("'\"`.")
    if message.kind == "hub":
        return [
            _explained(
                f"{what} is not on this machine, and the hub did not give it",
                "medium",
                "offline, no token, or a licence not accepted: the text does not say which",
                f"{what}.",
                "SVD's repositories are gated: they need an account, the accepted licence and a token.",
                "Accept the licence on the model's page, log in (`hf auth login`), download it once, or give a local folder as "
                "model.pretrained.",
                code="CKP256",
            )
        ]
    variant = what in ("fp16", "bf16", "fp32", "ema", "non_ema")
    return [
        _explained(
            f"the repository has no branch, tag or commit {what}",
            "high" if variant else "medium",
            "that is the name of a variant of the files" if variant else "the text says it",
            f"revision {what}.",
            "A revision is a state of the repository, a variant an ending of its files; early repositories had a branch named fp16.",
            f"variant='{what}' instead of revision (model.variant={what})." if variant else "Correct model.revision.",
            code="CKP256",
        )
    ]


CAUSES = {
    "load_cannot": load, "load_size": load, "load_versus": load, "keys": keys, "keys_log": keys, "init": init, "header": header,
    "missing_file": missing_file, "pickle_key": pickle_key, "revision": hub, "hub": hub,
}  # fmt: skip
