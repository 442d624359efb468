"""Weights that do not fit, and files that are not weights."""

from __future__ import annotations

import re

from svdtune.guards.explain.channels import meaning
from svdtune.guards.explain.explanation import Explanation
from svdtune.guards.explain.messages import Message
from svdtune.guards.explain.numbers import Numbers

_NEVER = (
    "Do not follow the advice `ignore_mismatched_sizes=True` (with low_cpu_mem_usage=False): it leaves this layer with random weights, "
    "the error goes and the model is broken."
)
_CHECK = " `svdtune inspect FILE` says what the file is and whether it is whole; compare diffusers' version with the one the model asks for."


def load(message: Message, numbers: Numbers) -> list[Explanation]:
    """A weight whose shape in the file is not the one in the model."""
    name, model, file = _shapes(message)
    text = f"{name}: the model has {model or 'another shape'}" + (
        f", the file {file}" if file else ", the text does not give the file's"
    )
    if name.endswith("conv_in.weight") and len(model or file) in (3, 4, 5):
        return [_conv_in(name, model, file, text, numbers)]
    if name.startswith(("encoder.", "decoder.")) and model[:1] == (64,) != (numbers.channels[0],):
        return [
            Explanation(
                "CKP250",
                "the autoencoder was built from class defaults, not from the folder's config.json",
                "medium",
                "64 is the class default of block_out_channels; the file has another width",
                f"{text}.",
                "Without a config.json beside the weights diffusers and wrappers build the class with its defaults.",
                f"Put vae/config.json of the release beside its weights. {_NEVER}{_CHECK}",
            )
        ]
    if ("attn2" in name or "to_k" in name or "to_v" in name) and len(model) == len(file) == 2 and model[0] == file[0]:
        return [_context(text, model[1], file[1])]
    return [
        Explanation(
            "CKP250",
            f"{name} has another shape in the file than in the model",
            "medium",
            "the text says it; which of the two is meant it does not say",
            f"{text}.",
            "Class, config.json and weights are not of one model: another architecture, another version, or a config "
            "that was inferred wrongly.",
            f"Take the config.json and the class of the release the file comes from. {_NEVER}{_CHECK}",
        )
    ]


def _shapes(message: Message) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    name = message.groups[0].strip(".…")
    first, second = message.shape(1), message.shape(2) if message.groups[2] else ()
    return (name, first, second) if message.kind == "load_cannot" else (name, second, first)


def _conv_in(name: str, model: tuple[int, ...], file: tuple[int, ...], text: str, numbers: Numbers) -> Explanation:
    takes, has = _channels(model), _channels(file)
    means = [f"{count}: {what}" for count in (takes, has) if count and (what := meaning(count, numbers))]
    # Only the number of filters says that this is the UNet that is known here; other networks have a conv_in too.
    filters = {shape[0] for shape in (model, file) if len(shape) > 3}
    known = filters <= {numbers.channels[0]}
    if not known:
        means = []
    image_class = known and takes == numbers.latent_channels and has == 2 * numbers.latent_channels
    title = (
        "an SVD checkpoint is opened as an image model"
        if image_class
        else f"the model is built with {takes or 'other'} input channels, the file has {has or 'others'}"
    )
    both = len(means) == 2
    right = (
        "Open it with the right class, UNetSpatioTemporalConditionModel (StableVideoDiffusionPipeline), and its own config.json with "
        f"in_channels {has}."
        if image_class
        else f"Build the model from the file's own config.json (in_channels {has or 'of the file'}), with the class it was made for."
    )
    return Explanation(
        "CKP250",
        title,
        "high" if both else "medium",
        "both channel counts have one known use"
        if both
        else "only one of the two counts is in the text, or has a known use",
        f"{text}. {'. '.join(means)}{'.' * bool(means)}",
        "The number of input channels says what a UNet is fed; class or config.json are another model's than the weights.",
        f"{right} {_NEVER}{_CHECK}",
    )


def _channels(shape: tuple[int, ...]) -> int | None:
    # The first axis may be left out (`[.., 9, 3, 3]`): the input channels stand before the kernel.
    if len(shape) == 3:
        return shape[0]
    return shape[1] if len(shape) > 3 else None


def _context(text: str, model: int, file: int) -> Explanation:
    known = {
        768: "Stable Diffusion 1.x (768)",
        1024: "Stable Diffusion 2.x or SVD (1024)",
        1280: "SDXL's refiner (1280)",
        2048: "SDXL (2048)",
    }
    names = [known[width] for width in (model, file) if width in known]
    return Explanation(
        "CKP250",
        f"the cross-attention is {model} wide in the model and {file} in the file: another base model",
        "high" if len(names) == 2 else "medium",
        "the in-width of attn2.to_k is cross_attention_dim",
        f"{text}. Known: {', '.join(names) or 'neither width'}.",
        "cross_attention_dim is the width of the text or image encoder, so models of different bases do not mix.",
        f"Take base model and weights of one family. {_NEVER}{_CHECK}",
    )


def keys(message: Message, numbers: Numbers) -> list[Explanation]:
    """Missing or unexpected keys."""
    if message.groups[:2] and message.groups[0].isdigit() and message.groups[0] == message.groups[1] == "0":
        return []
    # A new head on a pretrained encoder logs the same, and is meant.
    strict = message.kind == "keys" or bool(re.search(r"UNet|Autoencoder|CLIPVision", message.line))
    return [
        Explanation(
            "CKP251",
            "keys are missing from the weights, or are there too many",
            "medium" if strict else "low",
            "the text says it; whether it was meant it does not say",
            f"{message.line[:200]}",
            "Weights of another architecture, with another prefix, or saved in part. A loader that is not strict "
            "leaves what is missing random "
            "and only logs it.",
            f"Compare the header with the model: `svdtune inspect FILE --against svd-xt`. Nothing may be missing but "
            f"parts frozen elsewhere. {_NEVER}",
        )
    ]


def init(message: Message, numbers: Numbers) -> list[Explanation]:
    """A model class that its config does not fit."""
    kind, argument = message.groups
    from_config = bool(re.search(r"from_config|from_pretrained|instantiate", message.context))
    if not any(
        part in kind
        for part in ("UNet", "VAE", "Autoencoder", "Model", "Transformer", "Encoder", "Decoder", "Embedder")
    ):
        return []
    return [
        Explanation(
            "CKP255",
            f"{kind} and its config come from different versions",
            "medium" if from_config else "low",
            "a model class got another set of arguments than it takes",
            f"{kind} and the argument {argument!r}.",
            "The config names what another version of the class takes.",
            f"Install the version of the code that the config was written for, or add {argument} to it.",
        )
    ]


def header(message: Message, numbers: Numbers) -> list[Explanation]:
    """safetensors could not read the header, or diffusers gave up without a reason."""
    if message.kind == "unreadable":
        return [
            Explanation(
                "CKP252",
                "the weight file is damaged, empty, or not weights",
                "medium",
                "diffusers gives no reason; these are the only ones it has",
                message.line[:200],
                "A truncated download, an HTML page saved as weights, or an empty file.",
                "`svdtune inspect FILE` says which; download it again.",
            )
        ]
    detail = message.groups[0].strip()
    cut = "incomplete" in detail.lower()
    return [
        Explanation(
            "CKP252",
            "the weight file is cut off" if cut else "the weight file does not begin as safetensors do",
            "high",
            "safetensors' own check of header and length",
            f"header: {detail}.",
            "The header promises more bytes than the file has: a download or copy stopped early."
            if cut
            else "The first 8 bytes are the length of a JSON header. An HTML page, a pickle or a pointer file has something else there.",
            "Delete it and download it again; `svdtune inspect FILE` then says that it is whole.",
        )
    ]


def lfs(message: Message, numbers: Numbers) -> list[Explanation]:
    """A git-lfs pointer where weights should be."""
    return [
        Explanation(
            "CKP254",
            "the weight file is a git-lfs pointer, a few lines of text",
            "high",
            "diffusers recognises them",
            message.line[:160],
            "The repository was cloned without git-lfs, so the large files were never fetched.",
            "git lfs install && git lfs pull in that folder, or download with huggingface-cli.",
        )
    ]


def missing_file(message: Message, numbers: Numbers) -> list[Explanation]:
    """diffusers or transformers found no file of that name."""
    name, folder = message.groups[0], message.groups[1].rstrip(".,")
    config = name == "config.json"
    encoder = name == "pytorch_model.bin"
    fix = (
        "Copy the config.json of each part (unet, vae, image_encoder) beside its weights."
        if config
        else "Give the folder of the part: from_pretrained(FOLDER, subfolder='image_encoder')."
        if encoder
        else "If the folder has only *.fp16.safetensors, load it with variant='fp16' (model.variant=fp16); otherwise "
        "download the missing file."
    )
    return [
        Explanation(
            "CKP253",
            f"{name} is not in {folder}",
            "medium",
            "the text says it; the reason is the usual one",
            f"{name} looked for in {folder}.",
            "The message names the last spelling that was tried: a .bin that nobody wants when the folder has only a "
            "variant's files, the root "
            "of a repository when the part is in a subfolder.",
            fix,
        )
    ]


def hub(message: Message, numbers: Numbers) -> list[Explanation]:
    """The hub could not be asked, or was asked for the wrong thing."""
    what = message.groups[0]
    if message.kind == "revision":
        variant = what.strip("'\"`") in ("fp16", "bf16", "fp32", "ema", "non_ema")
        return [
            Explanation(
                "CKP256",
                f"the repository has no branch, tag or commit {what}",
                "high" if variant else "medium",
                "that is the name of a variant of the files" if variant else "the text says it",
                f"revision {what}.",
                "A revision is a state of the repository, a variant an ending of its files; early repositories had a branch named fp16.",
                f"variant='{what}' instead of revision (model.variant={what})."
                if variant
                else "Correct model.revision.",
            )
        ]
    return [
        Explanation(
            "CKP256",
            f"{what} is not on this machine and the hub did not answer",
            "medium",
            "offline, no token, or a licence not accepted: the text does not say which",
            f"{what}.",
            "SVD's repositories are gated: they need an account, the accepted licence and a token.",
            "Accept the licence on the model's page, log in (`hf auth login`), download it once, or give a local "
            "folder as model.pretrained.",
        )
    ]
