"""Channel counts by meaning: noisy latents, conditioning latents, masks, pictures."""

from __future__ import annotations

import re

from svdtune.guards.explain.explanation import Explanation
from svdtune.guards.explain.messages import Message
from svdtune.guards.explain.numbers import Numbers


def meaning(channels: int, numbers: Numbers) -> str | None:
    """What a UNet with so many input channels is fed, counted in latents; None where no use is known."""
    z = numbers.latent_channels
    known = {
        z: f"the noisy latents alone ({z}): a text-to-image or text-to-video UNet",
        2 * z: f"noisy and conditioning latents ({z} + {z}): SVD",
        2 * z
        + 1: f"noisy latents, conditioning latents and a mask ({z} + {z} + 1): inpainting, or SVD trained with a mask",
        3 * z: f"noisy latents and two conditions ({z} + {z} + {z}): a derivative with a second condition",
        3 * z + 1: f"noisy latents, two conditions and a mask ({z} + {z} + {z} + 1): a custom class",
    }
    return known.get(channels)


def conv(message: Message, numbers: Numbers) -> list[Explanation]:
    """Causes of `expected input[...] to have C channels, but got ...`."""
    weight = message.shape(0)
    given = message.shape(1)
    takes = weight[1]
    got = int(message.groups[3]) if message.groups[3] else given[1] if len(given) > 1 else 0
    named = [word for path in message.modules for word in re.findall(r"\w+", path)]
    if (
        not got
        or got == takes
        or (named and not set(named) & {"conv_in", "unet", "vae", "encoder", "model", "module", "net"})
    ):
        return [_plain(f"weight {list(weight)}, input {list(given)}", takes, got)]
    if takes == 3 and got in (1, 4) and len(weight) == 4 and weight[2:] == (3, 3):
        return [_picture(given, got)]
    first = weight[0] == numbers.channels[0] and weight[2:] == (3, 3)
    if not first and not ("conv_in" in named and weight[2:] == (3, 3)):
        return [_plain(f"weight {list(weight)}, input {list(given)}", takes, got)]
    return _unet_input(weight, given, takes, got, numbers, named) or [
        _plain(f"weight {list(weight)}, input {list(given)}", takes, got)
    ]


def _unet_input(
    weight: tuple[int, ...], given: tuple[int, ...], takes: int, got: int, numbers: Numbers, named: list[str]
) -> list[Explanation]:
    sure = "conv_in" in named or numbers.own
    reason = f"{weight[0]} is the first level of {numbers.whose}" + (
        ", and the traceback names conv_in" if "conv_in" in named else ""
    )
    text = f"weight {list(weight)}: conv_in takes {takes}; input {list(given)} has {got}."
    found = []
    if len(given) == 4 and given[0] == 1 and got % takes == 0 and got > takes and takes == numbers.in_channels:
        clips = got // takes
        found.append(
            Explanation(
                "SHP415",
                "the sample has 4 axes: its frame axis is missing",
                "high" if sure else "medium",
                reason,
                f"{text} {got} = {clips} x {takes}: the first two axes ({clips}, {takes}) were flattened as if they "
                f"were (batch, frames).",
                "The UNet flattens batch and frames. Of a 4-D sample it flattens batch and channels, and the "
                "convolution sees one picture.",
                f"Give sample of shape (batch, frames, {takes}, {given[2]}, {given[3]}); for one frame .unsqueeze(1).",
            )
        )
    if (
        takes == numbers.in_channels
        and given
        and given[0] % takes == 0
        and got != takes
        and meaning(got, numbers) != meaning(takes, numbers)
        and len(given) == 4
        and given[0] > 1
    ):
        found.append(
            Explanation(
                "SHP405",
                "frames and channels of the sample are swapped",
                "medium" if sure and got != numbers.latent_channels else "low",
                f"the rows, {given[0]}, are a multiple of {takes} channels, and {got} would be the frames",
                f"{text} (batch, {takes}, {got}, ...) flattened to ({given[0]}, {got}, ...).",
                "SVD's UNet reads (batch, frames, channels, height, width); other video models have channels before "
                "frames. With as many frames "
                "as channels nothing raises.",
                "sample.permute(0, 2, 1, 3, 4).",
            )
        )
    taken, fed = meaning(takes, numbers), meaning(got, numbers)
    if taken and fed:
        forgotten = takes == numbers.in_channels and got == numbers.latent_channels
        found.append(
            Explanation(
                "SHP404",
                "the conditioning latents are not beside the noisy ones"
                if forgotten
                else f"the UNet takes {takes} channels, its input has {got}",
                "high" if sure and not found else "medium",
                reason,
                f"{text} {takes}: {taken}. {got}: {fed}.",
                "SVD puts conditioning latents beside the noisy ones on the channel axis; each derivative adds its own conditions there.",
                "torch.cat([noisy_latents, conditioning_latents], dim=2) before the UNet."
                if forgotten
                else f"Take the checkpoint that is made for this input: {fed}. Padding or slicing channels would run and mean nothing.",
            )
        )
    return found


def _picture(given: tuple[int, ...], got: int) -> Explanation:
    if got == 4:
        what, fix = (
            "an RGBA picture (alpha channel), or latents given where pixels are read",
            "picture.convert('RGB') before it becomes a tensor.",
        )
    else:
        what, fix = "a grey picture", "picture.convert('RGB'), or repeat the one channel three times."
    return Explanation(
        "SHP412",
        f"{got} channels where an RGB picture is read: {what}",
        "medium",
        "a 3 x 3 convolution of 3 channels reads pictures, in the VAE's encoder and elsewhere",
        f"input {list(given)}.",
        "The VAE's encoder and CLIP read RGB.",
        fix,
    )


def _plain(text: str, takes: int, got: int) -> Explanation:
    ratio = ""
    if got and takes and max(got, takes) % min(got, takes) == 0 and got != takes:
        times = max(got, takes) // min(got, takes)
        ratio = (
            f" It got {times} times as many: something was joined on the channel axis that this checkpoint was not made for."
            if got > takes
            else f" It got 1/{times}: {times - 1} further input{'s' * (times > 2)} of that size may be missing on the channel axis."
        )
    return Explanation(
        "SHP412",
        f"a convolution takes {takes} channels" + (f", got {got}" if got else ""),
        "low",
        "the counts are certain, the layer is not one of SVD's input",
        f"{text}.{ratio}",
        "A checkpoint of another variant (text-to-video against image-to-video, another VAE) or a swapped axis.",
        "Compare in_channels of the loaded config.json with what the code joins on the channel axis.",
    )


def norm(message: Message, numbers: Numbers) -> list[Explanation]:
    """GroupNorm told the wrong number of channels."""
    wants, given = int(message.groups[0]), message.shape(1)
    return [
        Explanation(
            "SHP412",
            f"a normalisation layer has {wants} channels, its input {given[1]}",
            "medium",
            "the text says it",
            f"weight ({wants},), input {list(given)}"
            + (
                f": {given[1]} = {given[1] // wants} x {wants}, as after a skip connection"
                if given[1] % wants == 0
                else ""
            ),
            "A layer runs at another place than it was made for: a motion module injected before or after the cat with the skip.",
            "Take the module's version that fits this UNet.",
        )
    ]


def conv_rank(message: Message, numbers: Numbers) -> list[Explanation]:
    """A convolution got a tensor with another number of axes."""
    wants, given = int(message.groups[0]), message.shape(1)
    video = len(given) == 5 and wants == 4
    return [
        Explanation(
            "SHP415",
            f"a convolution takes {wants} axes, got {len(given)}",
            "medium" if video else "low",
            "the text says it",
            f"input {list(given)}.",
            "VAE and CLIP read pictures (batch, channels, height, width); a clip has a frame axis too."
            if video
            else "An axis is missing or too many.",
            "Flatten batch and frames before the VAE: (batch * frames, channels, height, width)."
            if video
            else "Print the shape before the call.",
        )
    ]
