"""Channel counts by meaning: noisy latents, conditioning latents, masks, pictures."""

from __future__ import annotations

from collections.abc import Iterator

from svdtune.guards.explain.explanation import Explanation, believed, counted
from svdtune.guards.explain.messages import Message
from svdtune.guards.explain.numbers import Numbers

_KERNEL = (3, 3)


def meaning(channels: int, numbers: Numbers) -> str | None:
    """What a UNet with so many input channels is fed, counted in latents; None where no use is known."""
    z = numbers.latent_channels
    known = {
        3: "the pixels of an RGB picture, not latents",
        z: f"the noisy latents alone ({z}): a text-to-image or text-to-video UNet",
        2 * z: f"noisy and conditioning latents ({z} + {z}): SVD",
        2 * z + 1: f"noisy latents, conditioning latents and a mask ({z} + {z} + 1): inpainting, or SVD trained with a mask",
        3 * z: f"noisy latents and two conditions ({z} + {z} + {z}): a derivative with a second condition",
        3 * z + 1: f"noisy latents, two conditions and a mask ({z} + {z} + {z} + 1): a custom class",
    }  # fmt: skip
    return known.get(channels)


def conv(message: Message, numbers: Numbers) -> list[Explanation]:
    """Causes of `expected input[...] to have C channels, but got ...`."""
    weight, given = message.shape(0), message.shape(1)
    takes = weight[1]
    got = int(message.groups[3]) if message.groups[3] else given[1] if len(given) > 1 else 0
    if not got or got == takes:
        return [_plain(weight, given, takes, got)]
    words = message.words
    if words & {"decoder", "post_quant_conv"} and "conv_in" in words and weight[2:] == _KERNEL:
        return [_decoder(message, weight, given, takes, got, numbers)]
    if takes == 3 and got in (1, 4) and weight[2:] == _KERNEL:
        return [_picture(given, got)]
    # Only the first convolution of SVD's UNet is fed latents: it is named, or its filters are the first level's.
    named = message.site == "svd" and "conv_in" in words and not words & {"encoder", "vae", "controlnet"}
    fits = message.site != "other" and weight[0] == numbers.channels[0] and not words - {"conv_in", "unet", "model"}
    found = list(_unet_input(message, weight, given, takes, got, numbers, named)) if named or fits else []
    return found if weight[2:] == _KERNEL and found else [_plain(weight, given, takes, got)]


def _unet_input(
    message: Message, weight: tuple[int, ...], given: tuple[int, ...], takes: int, got: int, numbers: Numbers, named: bool
) -> Iterator[Explanation]:  # fmt: skip
    confidence = believed(message, numbers, named=named)
    fits = f"{weight[0]} filters are the first level of {numbers.whose}" if weight[0] == numbers.channels[0] else ""
    reason = ", and ".join(filter(None, ["the stack names conv_in" if named else "", fits]))
    text = f"weight {list(weight)}: conv_in takes {takes}; input {list(given)} has {got}."
    flat = len(given) == 4 and given[0] == 1 and got % takes == 0 and got > takes and takes == numbers.in_channels
    if flat:
        yield Explanation(
            code="SHP415",
            title="the sample has 4 axes: its frame axis is missing",
            confidence=confidence,
            reason=reason,
            evidence=f"{text} {got} = {got // takes} x {takes}: the first two axes ({got // takes}, {takes}) were flattened as if they "
            "were (batch, frames).",
            why="The UNet flattens batch and frames. Of a 4-D sample it flattens batch and channels, and the convolution sees one picture.",
            fix=f"Give sample of shape (batch, frames, {takes}, {given[2]}, {given[3]}); for one frame .unsqueeze(1).",
        )
    taken, fed = meaning(takes, numbers), meaning(got, numbers)
    rows = given[0] if given else 0
    swapped = takes == numbers.in_channels and len(given) == 4 and rows > 1 and rows % takes == 0 and fed != taken
    if swapped:
        sure = confidence != "low" and got != numbers.latent_channels
        yield Explanation(
            code="SHP405",
            title="frames and channels of the sample are swapped",
            confidence="medium" if sure else "low",
            reason=f"the rows, {rows}, are a multiple of {takes} channels, and {got} would be the frames",
            evidence=f"{text} (batch, {takes}, {got}, ...) flattened to ({rows}, {got}, ...).",
            why="SVD's UNet reads (batch, frames, channels, height, width); other video models have channels before frames. With as many "
            "frames as channels nothing raises.",
            fix="sample.permute(0, 2, 1, 3, 4).",
        )
    if taken and fed and not (swapped and got == 3):  # three frames, rather than a picture's colours
        forgotten = takes == numbers.in_channels and got == numbers.latent_channels
        yield Explanation(
            code="SHP404",
            title="the conditioning latents are not beside the noisy ones" if forgotten
            else f"the UNet takes {takes} channels, its input has {got}",
            confidence="medium" if flat or (swapped and confidence == "high") else confidence,
            reason=reason,
            evidence=f"{text} {takes}: {taken}. {got}: {fed}.",
            why="SVD puts conditioning latents beside the noisy ones on the channel axis; each derivative adds its own conditions there.",
            fix="torch.cat([noisy_latents, conditioning_latents], dim=2) before the UNet." if forgotten
            else "Encode the pictures with the VAE first." if got == 3
            else f"Take the checkpoint that is made for this input: {fed}. Padding or slicing channels would run and mean nothing.",
        )  # fmt: skip


def _decoder(
    message: Message, weight: tuple[int, ...], given: tuple[int, ...], takes: int, got: int, numbers: Numbers
) -> Explanation:
    double = got == 2 * takes
    return Explanation(
        code="SHP412",
        title=f"the VAE's decoder takes {takes} latent channels, got {got}",
        confidence="high" if double and message.site == "svd" else "medium",
        reason="the stack names the decoder's conv_in",
        evidence=f"weight {list(weight)}, input {list(given)}"
        + (f": {got} = 2 x {takes}, as the UNet's input and the encoder's moments have." if double else "."),
        why="The decoder reads the latents of one video: neither noisy and conditioning latents side by side, nor mean and log-variance.",
        fix="Decode the UNet's answer or latent_dist.mode(), divided by scaling_factor." if double
        else "Take VAE and latents of one model.",
    )  # fmt: skip


def _picture(given: tuple[int, ...], got: int) -> Explanation:
    alpha = got == 4
    what = "an RGBA picture (alpha channel), or latents given where pixels are read" if alpha else "a grey picture"
    return Explanation(
        code="SHP412",
        title=f"{counted(got, 'channel')} where an RGB picture is read: {what}",
        confidence="medium",
        reason="a 3 x 3 convolution of 3 channels reads pictures, in the VAE's encoder and elsewhere",
        evidence=f"input {list(given)}.",
        why="The VAE's encoder and CLIP read RGB.",
        fix="picture.convert('RGB') before it becomes a tensor" + ("." if alpha else ", or repeat the one channel three times."),
    )  # fmt: skip


def _plain(weight: tuple[int, ...], given: tuple[int, ...], takes: int, got: int) -> Explanation:
    ratio = ""
    if got > takes and got % takes == 0:
        ratio = f" It got {got // takes} times as many: something may be joined on the channel axis that this layer was not made for."
    elif 0 < got < takes and takes % got == 0:
        ratio = f" It got 1/{takes // got}: {counted(takes // got - 1, 'further input')} of that size may be missing on the channel axis."
    return Explanation(
        code="SHP412",
        title=f"a convolution takes {takes} channels" + (f", got {got}" if got else ""),
        confidence="low",
        reason="the counts are certain; nothing says that the layer is SVD's input",
        evidence=f"weight {list(weight)}, input {list(given)}.{ratio}",
        why="A checkpoint of another variant (text-to-video against image-to-video, another VAE) or a swapped axis.",
        fix="Compare in_channels of the loaded config.json with what the code joins on the channel axis.",
    )


def norm(message: Message, numbers: Numbers) -> list[Explanation]:
    """GroupNorm told the wrong number of channels."""
    wants, given = int(message.groups[0]), message.shape(1)
    joined = (
        f": {given[1]} = {given[1] // wants} x {wants}, as after a skip connection" if given[1] % wants == 0 else ""
    )
    return [
        Explanation(
            code="SHP412",
            title=f"a normalisation layer has {wants} channels, its input {given[1]}",
            confidence="medium",
            reason="the text says it",
            evidence=f"weight ({wants},), input {list(given)}{joined}.",
            why="A layer runs at another place than it was made for, such as a motion module before instead of after the cat "
            "with the skip.",
            fix="Take the module's version that fits this network.",
        )
    ]  # fmt: skip


def conv_rank(message: Message, numbers: Numbers) -> list[Explanation]:
    """A convolution got a tensor with another number of axes."""
    wants, given = int(message.groups[0]), message.shape(1)
    video = len(given) == 5 and wants == 4
    return [
        Explanation(
            code="SHP415",
            title=f"a convolution takes {wants} axes, got {len(given)}",
            confidence="medium" if video else "low",
            reason="the text says it",
            evidence=f"input {list(given)}.",
            why="VAE and CLIP read pictures (batch, channels, height, width); a clip has a frame axis too." if video
            else "An axis is missing or too many.",
            fix="Flatten batch and frames before the VAE: (batch * frames, channels, height, width)." if video
            else "Print the shape before the call.",
        )
    ]  # fmt: skip


CAUSES = {"conv": conv, "norm": norm, "conv_rank": conv_rank}
