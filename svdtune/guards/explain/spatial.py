"""Sizes that differ: halving chains of latents, frame counts, rows, and what cannot be told."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from svdtune.guards.explain.explanation import Confidence, Explanation
from svdtune.guards.explain.messages import Message
from svdtune.guards.explain.numbers import Numbers

TABLES = (16, 24, 32)
"""Lengths of the positional tables of motion modules that are in use."""
_BIG_TABLE = 1000
_PATCHES = 14
"""Fewest patches a side of a vision tower that is in use (196 and more in all)."""


def halvings(size: int, levels: int) -> list[int]:
    """Sizes at each level of a UNet whose convolutions of stride 2 round up: 68, 34, 17, 9."""
    return [math.ceil(size / 2**level) for level in range(levels)]


def failing_sizes(skip: int, levels: int) -> list[int]:
    """Latent sizes whose first failing skip, from the deepest level up, has size `skip`."""
    found = []
    for size in range(skip, skip * 2 ** (levels - 1) + 1):
        odd = [level for level, here in enumerate(halvings(size, levels)[:-1]) if here % 2]
        if odd and halvings(size, levels)[odd[-1]] == skip:
            found.append(size)
    return found


def cat(message: Message, numbers: Numbers) -> list[Explanation]:
    """Causes of `Sizes of tensors must match except in dimension`."""
    if message.kind == "cat":
        # The fake wording also says on which axis they differ.
        want, got = message.numbers(1, -1)
        if message.groups[0] != "1" or (len(message.groups) > 3 and message.groups[2] in ("0", "1")):
            # Skips are joined on the channel axis, and height and width come after it.
            return [generic(f"cat of tensors with {want} and {got} along an axis that must agree", message)]
    elif message.groups[1]:
        want, got = message.numbers(0, 1)
    else:
        return [
            _rounded(f"expected size {message.groups[0]}", "low", "the second size is missing from the text", numbers)
        ]
    if want == got + 1 and got % 2 and got > 1 and (sizes := failing_sizes(got, len(numbers.channels))):
        return [_skip(want, got, sizes, numbers)]
    if abs(want - got) == 1 and min(want, got) > 1:
        return [
            _rounded(f"{want} and {got}", "low", "sizes that differ by 1 mostly come from halving an odd size", numbers)
        ]
    if min(want, got) >= 512 and max(want, got) in (768, 1024, 1280) and min(want, got) in (512, 768, 1024):
        return [_towers(want, got)]
    return [generic(f"cat of tensors with {want} and {got} along an axis that must agree", message)]


def _skip(want: int, got: int, sizes: Sequence[int], numbers: Numbers) -> Explanation:
    pixels = [size * numbers.factor for size in sizes]
    own = [
        f"data.{key} {value}"
        for key, value in (("height", numbers.height), ("width", numbers.width))
        if value in pixels
    ]
    chain = " -> ".join(map(str, halvings(sizes[-1], len(numbers.channels))))
    deep = [size for size in sizes if halvings(size, len(numbers.channels))[-2] == got] or list(sizes)
    listed = ", ".join(str(size * numbers.factor) for size in deep)
    more = ", ".join(str(size * numbers.factor) for size in sizes if size not in deep)
    confidence: Confidence = "high" if own else "medium" if got > 8 else "low"
    reason = (
        f"{own[0]} gives exactly these sizes"
        if own
        else "2 x ceil(odd/2) = odd + 1 is what a skip connection meets; which axis, and that it is a UNet of 4 levels, is assumed"
        if len(numbers.channels) == 4
        else "2 x ceil(odd/2) = odd + 1 is what a skip connection meets"
    )
    return Explanation(
        "SHP411",
        f"height or width is not a multiple of {numbers.multiple}, and the UNet's skip connections do not fit",
        confidence,
        reason,
        f"{got} is odd: halved it rounds up to {(got + 1) // 2}, doubled again it is {want}. With {len(numbers.channels)} levels and "
        f"{numbers.factor} pixels per latent ({numbers.whose}) that is height or width {listed} pixels"
        f"{f' (or {more})' if more else ''}; {sizes[-1] * numbers.factor} pixels: latents {chain}.",
        "Every down block halves and rounds up, every up block doubles. diffusers from 0.32 hands the true size up; older ones, SGM and "
        "copied blocks do not. Two videos of different size give the same message.",
        f"Use sizes that are multiples of {numbers.multiple} (nearest: {_nearest(pixels[-1], numbers.multiple)}), or "
        f"diffusers >= 0.32 without copied blocks; "
        "give all conditioning videos the same size.",
    )


def _nearest(pixels: int, step: int) -> str:
    return f"{pixels // step * step} or {(pixels // step + 1) * step}"


def _rounded(what: str, confidence: Confidence, reason: str, numbers: Numbers) -> Explanation:
    return Explanation(
        "SHP411",
        "perhaps two feature maps differ by a rounding of height or width",
        confidence,
        reason,
        what,
        "A stride-2 layer rounds odd sizes; after doubling they are one off. Patches of 2 x 2 do the same.",
        f"Use heights and widths that are multiples of {numbers.multiple}, and the same size for every video and condition.",
    )


def _towers(want: int, got: int) -> Explanation:
    return Explanation(
        "SHP403",
        f"perhaps embeddings of two encoders, {want} and {got} wide, are joined",
        "low",
        "both are widths of published CLIP towers",
        f"cat expects {want}, got {got}: 512 is CLIP ViT-B/32, 768 ViT-L/14, 1024 ViT-H/14, 1280 the hidden width of ViT-H.",
        "An image or text encoder of another size than the one this model was trained with is loaded.",
        "Load the encoder that belongs to the model; its projection_dim is in its config.json.",
    )


def broadcast(message: Message, numbers: Numbers) -> list[Explanation]:
    """Causes of `The size of tensor a must match the size of tensor b`, eager or fake wording."""
    a, b, axis, ndim = _pair(message)
    text = f"sizes {a} and {b}" + (f" on axis {axis}" if axis is not None else "")
    large, small = max(a, b), min(a, b)
    found = []
    if large - small == 1 and (axis is None or axis >= 2) and small > 8:
        found.append(
            _rounded(text, "low", "they differ by 1; the text does not say that the axis is height or width", numbers)
        )
    elif large == 2 * small and axis == 0:
        found.append(_rows(text, large, small))
    elif _towers_of_patches(a, b):
        found.append(_patches(text, a, b))
    elif (small in TABLES and large <= 4 * small) or (small >= _BIG_TABLE and small % _BIG_TABLE == 0):
        found.append(_table(text, large, small))
    elif axis == 2 and (large == 2 * small or large % small == 0) and small > 1:
        found.append(_frames(text, large, small))
    elif _pixels(large, numbers) and _pixels(small, numbers) and (axis is None or axis >= 2) and ndim in (None, 4, 5):
        found.append(_pictures(text, large, small, numbers))
    return found or [generic(f"an elementwise operation on {text}", message)]


def _pair(message: Message) -> tuple[int, int, int | None, int | None]:
    if message.kind == "broadcast":
        a, b = message.numbers(0, 1)
        return a, b, int(message.groups[2]) if message.groups[2] else None, None
    length, back = message.numbers(0, 1)
    wanted = message.shape(3)
    axis = len(wanted) - back if back <= len(wanted) else None
    # The fake wording names the axis from the end, with the last one as -1.
    other = next(
        (
            i
            for i, (x, y) in enumerate(zip(message.shape(2)[::-1], wanted[::-1], strict=False))
            if x != y and 1 not in (x, y)
        ),
        None,
    )
    place = len(wanted) - 1 - other if other is not None else axis
    return (wanted[place] if place is not None else length), length, place, len(wanted)


def _pixels(size: int, numbers: Numbers) -> bool:
    return size * numbers.factor >= 256 and size % 8 == 0


def _towers_of_patches(a: int, b: int) -> bool:
    return all(min(abs(math.isqrt(n - k) ** 2 - (n - k)) for k in (0, 1)) == 0 and n >= _PATCHES**2 for n in (a, b))


def _rows(text: str, large: int, small: int) -> Explanation:
    return Explanation(
        "SHP414",
        f"{large} rows meet {small}: perhaps one tensor is doubled for classifier-free guidance and the other is not",
        "low",
        f"{large} = 2 x {small} on the batch axis; a batch or frame count of another video gives the same",
        text,
        "With guidance every input goes in twice, unconditional and conditional. A control signal or mask that is not repeated, or that "
        "counts other frames, has half the rows.",
        "Repeat the condition as the latents are repeated (batch, frames and guidance), and print both shapes before the call.",
    )


def _table(text: str, frames: int, table: int) -> Explanation:
    return Explanation(
        "SHP413",
        f"perhaps {frames} frames or tokens for a positional table of {table}",
        "low",
        f"{table} is the length of a positional table in use and {frames} is more"
        if table in (24, 32)
        else f"{table} may be a positional table",
        text,
        "Motion modules of AnimateDiff and alike learn a table of positions (16, 24 or 32 frames; others 1000s of "
        "tokens). SVD has none: its "
        "frame positions are sinusoidal and have no end, so this is not SVD's own layer.",
        f"Use at most {table} frames, or context windows of {table}.",
    )


def _frames(text: str, large: int, small: int) -> Explanation:
    return Explanation(
        "SHP413",
        f"perhaps a clip of {large} frames meets one of {small}",
        "low",
        "the axis is that of frames in (batch, channels, frames, height, width), and one is a multiple of the other",
        text,
        "Control frames, tiles of the decoder or a temporal stride give another number of frames than the latents have.",
        "Give the condition as many frames as the clip, and temporal tiles at least as long as the clip.",
    )


def _patches(text: str, a: int, b: int) -> Explanation:
    sides = " and ".join(f"{n} = {math.isqrt(n)}²{' + 1' * (math.isqrt(n) ** 2 != n)}" for n in (a, b))
    return Explanation(
        "SHP416",
        "perhaps patches of two different vision towers",
        "low",
        "both are squares, as patch grids are",
        f"{text}: {sides}; 224/14 = 16 and 384/14 = 27 patches a side.",
        "The image encoder that is loaded has another picture or patch size than the one the positions were made for.",
        "Load the vision tower that belongs to the model, with its own preprocessor_config.json.",
    )


def _pictures(text: str, large: int, small: int, numbers: Numbers) -> Explanation:
    return Explanation(
        "SHP411",
        "perhaps two pictures of different size meet",
        "low",
        "only if these are latents: the text does not say so",
        f"{text}: as latents {large * numbers.factor} and {small * numbers.factor} pixels ({numbers.factor} pixels "
        f"per latent, {numbers.whose}).",
        "An own first image, mask or control video was not resized to the clip's size.",
        "Resize every picture that goes in to the clip's height and width.",
    )


def view(message: Message, numbers: Numbers) -> list[Explanation]:
    """Causes of `shape '[...]' is invalid for input of size`."""
    shape, size = message.shape(0), int(message.groups[1])
    text = f"{size} numbers do not fill {list(shape)}"
    # SVD's temporal block reshapes the context to (batch, frames, tokens, width).
    if len(shape) == 4 and shape[2] == -1 and shape[3] == numbers.context and size % (shape[1] * shape[3]) == 0:
        rows = size // (shape[1] * shape[3])
        return [
            Explanation(
                "SHP414",
                f"encoder_hidden_states has {rows} row{'s' * (rows != 1)}, the sample {shape[0]}",
                "high" if numbers.own else "medium",
                f"the view is that of SVD's temporal attention: (batch, frames, tokens, {shape[3]})"
                + ("" if numbers.own else f", of {numbers.whose}"),
                f"{text}: {size} = {rows} x {shape[1]} frames x {shape[3]}, expected a multiple of {shape[0]} x {shape[1]} x {shape[3]}.",
                "The UNet repeats each clip's image token for every frame, so there must be one row for each clip.",
                f"Give encoder_hidden_states of shape ({shape[0]}, 1, {shape[3]}).",
            )
        ]
    if len(shape) >= 7 and shape[2] == 2:
        rest = math.prod(side for side in shape if side > 0) or math.prod(side for side in shape[2:] if side > 0)
        return [
            Explanation(
                "SHP413",
                "the number of frames does not divide by the temporal patch",
                "medium",
                "the view splits frames and picture into patches, and frames // patch lost a frame"
                + (" (0 groups)" if 0 in shape else ""),
                f"{text}: {list(shape)} has {shape[1]} groups of {shape[2]} frames, {rest} "
                f"numbers{' a group' * (0 in shape)}, for {size}.",
                "frames // patch rounds down, so a number of frames that is not legal loses one.",
                f"Use a number of latent frames that is a multiple of {shape[2]}.",
            )
        ]
    return [generic(text, message)]


def expand(message: Message, numbers: Numbers) -> list[Explanation]:
    """Causes of `The expanded size of the tensor must match the existing size`."""
    if message.kind == "expand_rank":
        have, want = message.shape(0), message.shape(1)
        if len(have) == 2 and len(want) == 1 and have[0] == want[0]:
            return [_timestep(f"{list(have)} to {list(want)}", have, want[0])]
        return [generic(f"{list(have)} cannot be expanded to {list(want)}", message)]
    want, have, axis = message.numbers(0, 1, 2)
    target, tensor = message.shape(3), message.shape(4) if message.groups[4] else ()
    if len(target) == 4 and target[2] == 1 and axis == 2 and have > 1:
        # SVD's time context is (batch, tokens, 1, width): rows that are no multiple of batch land on axis 2.
        exact = target[3] == numbers.context
        rows = target[0] * have
        return [
            Explanation(
                "SHP414",
                f"encoder_hidden_states has {have} times as many rows as there are clips",
                "high" if exact and numbers.own else "medium" if exact else "low",
                f"the target is that of SVD's temporal attention: (batch, positions, 1, {target[3]})"
                if exact
                else f"the target has SVD's form, but width {target[3]} is not that of {numbers.whose}",
                f"target {list(target)}, axis {axis} has {have}: {rows} rows for {target[0]} "
                f"clip{'s' * (target[0] != 1)}, {have} x {target[0]}.",
                "The UNet repeats the image token for every frame itself. Embeddings already repeated per frame, or "
                "doubled for classifier-free "
                "guidance beside a sample that is not, have too many rows.",
                f"Give encoder_hidden_states of shape ({target[0]}, 1, {target[3]}).",
            )
        ]
    if len(target) == 1 and (not tensor or len(tensor) == 1):
        return [_timestep(f"{have} for {want}", tensor or (have,), want)]
    return [generic(f"{have} cannot be expanded to {want} on axis {axis}", message)]


def _timestep(text: str, have: Sequence[int], rows: int) -> Explanation:
    return Explanation(
        "SHP414",
        f"timestep has shape {tuple(have)}, one value for each of {rows} rows is expected",
        "low",
        "the UNet expands only its timestep to one axis; other code may do the same",
        text,
        "timesteps are expanded to one number for each clip: a scalar, (1,) and (batch,) fit, (batch, 1) does not.",
        f"Give timesteps of shape ({rows},).",
    )


def unpack(message: Message, numbers: Numbers) -> list[Explanation]:
    """Causes of `not enough values to unpack`: an axis too many or too few, where a shape is unpacked."""
    few, want = message.groups[0] == "not enough", int(message.groups[1])
    got = int(message.groups[2]) if message.groups[2] else None
    words = set(re.findall(r"\w+", " ".join(message.modules)))
    text = f"a shape of {got if got is not None else 'more'} axes is taken apart into {want}"
    if (
        few
        and want == 3
        and got == 2
        and (words & {"attn2", "processor"} or "encoder_hidden_states.shape" in message.context)
    ):
        return [
            Explanation(
                "SHP415",
                "encoder_hidden_states has no token axis",
                "high",
                "the traceback is inside the cross-attention",
                text,
                "The attention takes (batch, tokens, width); SVD's image embedding is (batch, width) until it gets its one token.",
                f"encoder_hidden_states.unsqueeze(1): (batch, 1, {numbers.context}).",
            )
        ]
    if few and want == 3 and got == 2:
        return [
            Explanation(
                "SHP415",
                "a tensor lacks an axis: perhaps the image embedding its token axis",
                "low",
                "two axes where three are read is what an image embedding without .unsqueeze(1) gives; any other "
                "unpacking reads the same",
                text,
                "SVD's attention reads (batch, tokens, width).",
                "Where the traceback is inside attn2: encoder_hidden_states.unsqueeze(1).",
            )
        ]
    if (
        not few
        and want == 4
        and ("pixel_values" in message.context or "image_encoder" in message.context or got is None)
    ):
        sure = "pixel_values" in message.context or "image_encoder" in message.context
        return [
            Explanation(
                "SHP415",
                "perhaps a video of 5 axes went where pictures of 4 are read",
                "medium" if sure else "low",
                "the traceback names the image encoder"
                if sure
                else "four axes is how pictures are read; any other unpacking reads the same",
                text,
                "CLIP and the VAE read (batch, channels, height, width).",
                "Give CLIP the first frame alone, and flatten batch and frames for the VAE.",
            )
        ]
    return []


def clip_size(message: Message, numbers: Numbers) -> list[Explanation]:
    """`Input image size (a*b) doesn't match model (c*d)`."""
    a, b, c, d = message.numbers(0, 1, 2, 3)
    return [
        Explanation(
            "SHP416",
            f"CLIP got a picture of {a} x {b}, it takes {c} x {d}",
            "high",
            "the text says it",
            f"{a} x {b} against {c} x {d}.",
            "The image encoder has one fixed picture size. A torch tensor given to the pipeline is not resized, only PIL pictures are.",
            f"Resize the first frame to {c} x {d} (antialiased, as the pipeline does) before the image encoder.",
        )
    ]


def frame_limit(message: Message, numbers: Numbers) -> list[Explanation]:
    """`... has upper limit of N frames, but received M`."""
    limit, got = message.numbers(0, 1)
    return [_table(f"limit {limit}, received {got}", got, limit)] if got > limit else []


def generic(what: str, message: Message) -> Explanation:
    """What is certain when nothing more is."""
    where = f" in self.{message.modules[-1]}" if message.modules else ""
    return Explanation(
        "SHP410",
        "two sizes that must agree do not",
        "low",
        "the sizes fit no pattern of SVD that is known here",
        f"{what}{where}.",
        "Two tensors met whose axes do not fit; the line of your own code above names them.",
        "Print both shapes before that line; `svdtune trace` follows them through a module.",
    )
