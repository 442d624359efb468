"""Sizes that differ: halving chains of latents, frame counts, rows, and what cannot be told."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from svdtune.guards.explain.explanation import ENCODERS, Confidence, Explanation, believed, counted
from svdtune.guards.explain.messages import Message
from svdtune.guards.explain.numbers import Numbers

TABLES = (16, 24, 32)
"""Lengths of the positional tables of motion modules that are in use."""
_BIG_TABLE = 1000
_PATCHES = 14
"""Fewest patches a side of a vision tower that is in use (196 and more in all)."""
_FRAMES = 256
"""More than any clip in use has."""


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
        if message.groups[0] == "2" and (message.site == "svd" or message.ran("latent")):
            return [_condition(f"{want} against {got} in front of the channel axis", want, got)]
        if message.groups[0] != "1" or (len(message.groups) > 3 and message.groups[2] in ("0", "1")):
            # Skips are joined on the channel axis, and height and width come after it.
            return [generic(f"cat of tensors with {want} and {got} along an axis that must agree", message)]
    elif message.groups[1]:
        want, got = message.numbers(0, 1)
    else:
        return [
            _rounded(f"expected size {message.groups[0]}", "the second size is missing from the text", message, numbers)
        ]
    if want == got + 1 and got % 2 and got > 1 and (sizes := failing_sizes(got, len(numbers.channels))):
        return [_skip(want, got, sizes, message, numbers)]
    if abs(want - got) == 1 and min(want, got) > 1:
        return [
            _rounded(
                f"{want} and {got}", "sizes that differ by 1 mostly come from halving an odd size", message, numbers
            )
        ]
    if {want, got} <= ENCODERS.keys():
        return [_towers(want, got)]
    return [generic(f"cat of tensors with {want} and {got} along an axis that must agree", message)]


def cat_rank(message: Message, numbers: Numbers) -> list[Explanation]:
    """Causes of `Tensors must have same number of dimensions`."""
    a, b = message.numbers(0, 1)
    if {a, b} != {4, 5} or not (message.site == "svd" or message.ran("latent|cond")):
        return [generic(f"cat of tensors with {a} and {b} axes", message)]
    return [
        Explanation(
            code="SHP415",
            title="latents of a clip meet those of one picture: the conditioning latents have no frame axis",
            confidence="medium",
            reason="5 axes are a clip's, 4 those of its first frame",
            evidence=f"{a} and {b} axes.",
            why="The conditioning latents are those of the first frame, (batch, channels, height, width), until they are repeated for "
            "every frame.",
            fix="image_latents.unsqueeze(1).repeat(1, num_frames, 1, 1, 1), then cat on dim=2.",
        )
    ]


def _condition(text: str, want: int, got: int) -> Explanation:
    one = 1 in (want, got)
    return Explanation(
        code="SHP413",
        title=f"noisy latents of {counted(want, 'frame')} meet conditioning latents of {got}"
        if want <= _FRAMES >= got
        else "noisy and conditioning latents differ in size",
        confidence="medium",
        reason="dim 2 is the channel axis of (batch, frames, channels, height, width); batch, height or width could differ as well",
        evidence=f"cat on dim 2, {text}.",
        why="The conditioning latents stand beside the noisy ones in every frame.",
        fix="Repeat the first frame's latents: image_latents.unsqueeze(1).repeat(1, num_frames, 1, 1, 1)."
        if one
        else "Make both from the same clip, with the same number of frames and the same size.",
    )


def _skip(want: int, got: int, sizes: Sequence[int], message: Message, numbers: Numbers) -> Explanation:
    levels = len(numbers.channels)
    pixels = [size * numbers.factor for size in sizes]
    own = [
        f"data.{key} {value}"
        for key, value in (("height", numbers.height), ("width", numbers.width))
        if value in pixels
    ]
    deep = [size for size in sizes if halvings(size, levels)[-2] == got] or list(sizes)
    listed = ", ".join(str(size * numbers.factor) for size in deep)
    more = ", ".join(str(size * numbers.factor) for size in sizes if size not in deep)
    confidence: Confidence = "medium" if got > 8 else "low"
    reason = f"2 x ceil(odd/2) = odd + 1 is what a skip connection meets; that it is a UNet of {levels} levels on latents is assumed"
    if message.site == "other":
        confidence, reason = "low", f"{reason}, and the code that ran is not SVD's"
    elif own:
        confidence, reason = "high", f"{own[0]} gives exactly these sizes"
    return Explanation(
        code="SHP411",
        title=f"height or width is not a multiple of {numbers.multiple}, and the UNet's skip connections do not fit"
        if message.site != "other"
        else "perhaps a height or width that does not halve evenly: a skip connection does not fit",
        confidence=confidence,
        reason=reason,
        evidence=f"{got} is odd: halved it rounds up to {(got + 1) // 2}, doubled again it is {want}. With {levels} levels and "
        f"{numbers.factor} pixels per latent ({numbers.whose}) that is height or width {listed} pixels"
        f"{f' (or {more})' if more else ''}; {sizes[-1] * numbers.factor} pixels: latents "
        f"{' -> '.join(map(str, halvings(sizes[-1], levels)))}.",
        why="Every down block halves and rounds up, every up block doubles. diffusers from 0.32 hands the true size up; older "
        "ones, SGM and "
        "copied blocks do not. Two videos of different size give the same message.",
        fix=f"Use sizes that are multiples of {numbers.multiple} (nearest: {_nearest(pixels[-1], numbers.multiple)}), or diffusers >= 0.32 "
        "without copied blocks; give all conditioning videos the same size."
        if message.site != "other"
        else "Use sizes that halve evenly at every level, or hand the skip's size to the upsampling.",
    )  # fmt: skip


def _nearest(pixels: int, step: int) -> str:
    return f"{pixels // step * step} or {(pixels // step + 1) * step}"


def _rounded(what: str, reason: str, message: Message, numbers: Numbers) -> Explanation:
    foreign = message.site == "other"
    return Explanation(
        code="SHP411",
        title="perhaps two feature maps differ by a rounding of height or width",
        confidence="low",
        reason=reason,
        evidence=f"{what}.",
        why="A stride-2 layer rounds odd sizes; after doubling they are one off. Patches of 2 x 2 do the same.",
        fix="Use sizes that halve evenly at every level, the same for every input."
        if foreign
        else f"Use heights and widths that are multiples of {numbers.multiple}, and the same size for every video and condition.",
    )


def _towers(want: int, got: int) -> Explanation:
    return Explanation(
        code="SHP403",
        title=f"perhaps embeddings of two encoders, {want} and {got} wide, are joined",
        confidence="low",
        reason="both are widths of published encoders",
        evidence=f"cat expects {want}, got {got}. " + " ".join(f"{width}: {ENCODERS[width]}." for width in (want, got)),
        why="An image or text encoder of another size than the one this model was trained with is loaded.",
        fix="Load the encoder that belongs to the model; its projection_dim is in its config.json.",
    )


def broadcast(message: Message, numbers: Numbers) -> list[Explanation]:
    """Causes of `The size of tensor a must match the size of tensor b`, eager or fake wording."""
    a, b, axis, ndim = _pair(message)
    large, small = max(a, b), min(a, b)
    text = f"sizes {a} and {b}" + (f" on axis {axis}" if axis is not None else "")
    if axis and (axes := _appended(message)):
        return [_one_per_clip(text, axis, axes)]
    if re.search(r"/torch/optim/", message.context):
        return [_optimizer(text)]
    if large - small == 1 and (axis is None or axis >= 2) and small > 8:
        return [
            _rounded(text, "they differ by 1; the text does not say that the axis is height or width", message, numbers)
        ]
    if large == 2 * small and axis == 0:
        return [_rows(text, large, small)]
    if all(n >= _PATCHES**2 and _square(n) for n in (a, b)):
        return [_patches(text, a, b)]
    if (small in TABLES and large <= 4 * small) or (small >= _BIG_TABLE and small % _BIG_TABLE == 0):
        return [_table(text, large, small)]
    if axis == 2 and large % small == 0 and small > 1 and large <= _FRAMES:
        return [_frames(text, large, small)]
    if (
        message.site != "other"
        and all(_pixels(n, numbers) for n in (a, b))
        and (axis or 2) >= 2
        and ndim in (None, 4, 5)
    ):
        return [_pictures(text, large, small, numbers)]
    return [generic(f"an elementwise operation on {text}", message)]


def _appended(message: Message) -> int:
    """How many axes of size 1 the failing line puts behind a vector: `sigma[:, None, None]`, `.view(-1, 1, 1)`; 0 for none."""
    code = message.frames[-1].code if message.frames else ""
    tails = re.findall(r"\[:((?:, ?None)+)\]|(?:view|reshape)\((?:-1|\w+)((?:, ?1)+)\)", code)
    return max((len("".join(tail).split(",")) - 1 for tail in tails), default=0)


def _one_per_clip(text: str, axis: int, appended: int) -> Explanation:
    rank = axis + 1 + appended
    return Explanation(
        "SHP414", "one number for each clip meets another axis than the clips'", "medium", "the line gives the vector its axes, and "
        "broadcasting counts them from the end",
        f"{text}; with {appended} axes behind it the vector's own lies on axis {axis} of a tensor of {rank}.",
        "Where both sizes happen to be equal it would run, and give every clip the numbers of others: latents of clips have a frame axis "
        "that those of pictures do not have.",
        f"Put {rank - 1} axes of size 1 behind it, not {appended}: sigma[:{', None' * (rank - 1)}].",
    )  # fmt: skip


def _pair(message: Message) -> tuple[int, int, int | None, int | None]:
    """Both sizes, their axis, and how many axes there are; None where the text does not say."""
    if message.kind == "broadcast":
        a, b = message.numbers(0, 1)
        return a, b, int(message.groups[2]) if message.groups[2] else None, None
    length, back = message.numbers(0, 1)
    came, wanted = message.shape(2)[::-1], message.shape(3)[::-1]
    # The fake wording names the axis from the end, with the last one as -1.
    pairs = enumerate(zip(came, wanted, strict=False))
    differ = next((i for i, (x, y) in pairs if x != y and 1 not in (x, y)), back - 1)
    if differ >= len(wanted):
        return length, length, None, len(wanted)
    return wanted[differ], length, len(wanted) - 1 - differ, len(wanted)


def _pixels(size: int, numbers: Numbers) -> bool:
    return size * numbers.factor >= 256 and size % 8 == 0


def _square(count: int) -> int:
    """Side of a grid of patches, with or without a class token; 0 for no grid."""
    return next((math.isqrt(n) for n in (count, count - 1) if math.isqrt(n) ** 2 == n), 0)


def _optimizer(text: str) -> Explanation:
    return Explanation(
        code="DST804",
        title="the optimizer's state has another shape than the parameters",
        confidence="high",
        reason="it failed inside torch.optim",
        evidence=f"{text}.",
        why="The state was loaded from a run that trained other parameters (another adapt.method, rank or targets), or parameters were "
        "replaced after the optimizer was made.",
        fix="Resume with the same adapt section, or start a new run from the exported weights.",
    )


def _rows(text: str, large: int, small: int) -> Explanation:
    return Explanation(
        code="SHP414",
        title=f"{large} rows meet {small}: perhaps one tensor is doubled for classifier-free guidance and the other is not",
        confidence="low",
        reason=f"{large} = 2 x {small} on the batch axis; a batch or frame count of another video gives the same",
        evidence=f"{text}.",
        why="With guidance every input goes in twice, unconditional and conditional. A control signal or mask that is not "
        "repeated, or that "
        "counts other frames, has half the rows.",
        fix="Repeat the condition as the latents are repeated (batch, frames and guidance), and print both shapes before the call.",
    )


def _table(text: str, frames: int, table: int) -> Explanation:
    return Explanation(
        code="SHP413",
        title=f"perhaps {frames} frames or tokens for a positional table of {table}",
        confidence="low",
        reason=f"{table} is the length of a positional table in use" if table in TABLES else f"{table} may be a positional table",
        evidence=f"{text}.",
        why="Motion modules of AnimateDiff and alike learn a table of positions (16, 24 or 32 frames; others 1000s of tokens). "
        "SVD has none: "
        "its frame positions are sinusoidal and have no end, so this is not SVD's own layer.",
        fix=f"Use at most {table} frames, or context windows of {table}.",
    )  # fmt: skip


def _frames(text: str, large: int, small: int) -> Explanation:
    return Explanation(
        code="SHP413",
        title=f"perhaps a clip of {large} frames meets one of {small}",
        confidence="low",
        reason="the axis is that of frames in (batch, channels, frames, height, width), and one is a multiple of the other",
        evidence=f"{text}.",
        why="Control frames, tiles of the decoder or a temporal stride give another number of frames than the latents have.",
        fix="Give the condition as many frames as the clip, and temporal tiles at least as long as the clip.",
    )


def _patches(text: str, a: int, b: int) -> Explanation:
    sides = " and ".join(f"{n} = {_square(n)} x {_square(n)}{' + 1' * (_square(n) ** 2 != n)}" for n in (a, b))
    return Explanation(
        code="SHP416",
        title="perhaps patches of two different vision towers",
        confidence="low",
        reason="both are squares, as patch grids are",
        evidence=f"{text}: {sides} patches.",
        why="The image encoder that is loaded has another picture or patch size than the one the positions were made for.",
        fix="Load the vision tower that belongs to the model, with its own preprocessor_config.json.",
    )


def _pictures(text: str, large: int, small: int, numbers: Numbers) -> Explanation:
    return Explanation(
        code="SHP411",
        title="perhaps two pictures of different size meet",
        confidence="low",
        reason="only if these are latents: the text does not say so",
        evidence=f"{text}: as latents {large * numbers.factor} and {small * numbers.factor} pixels ({numbers.factor} pixels per latent, "
        f"{numbers.whose}).",
        why="An own first image, mask or control video was not resized to the clip's size.",
        fix="Resize every picture that goes in to the clip's height and width.",
    )


def view(message: Message, numbers: Numbers) -> list[Explanation]:
    """Causes of `shape '[...]' is invalid for input of size`."""
    shape, size = message.shape(0), int(message.groups[1])
    text = f"{size} numbers do not fill {list(shape)}"
    # SVD's temporal block reshapes the context to (batch, frames, tokens, width).
    fits = len(shape) == 4 and shape[2] == -1 and (shape[3] == numbers.context or message.ran("time_context"))
    if fits and message.site != "other" and size % (shape[1] * shape[3]) == 0:
        return [_context_rows(text, shape, size // (shape[1] * shape[3]), message, numbers)]
    if len(shape) == 5 and min(shape) > 0 and size % math.prod(shape[2:]) == 0 and message.ran("num_frames"):
        return [_frame_rows(text, shape, size // math.prod(shape[2:]))]
    if len(shape) >= 7 and shape[2] == 2:
        return [_temporal_patches(text, shape)]
    return [generic(text, message)]


def _context_rows(text: str, shape: Sequence[int], rows: int, message: Message, numbers: Numbers) -> Explanation:
    return Explanation(
        code="SHP414",
        title=f"encoder_hidden_states has {counted(rows, 'row')}, the sample {shape[0]}",
        confidence=believed(message, numbers, named="attn2" in message.words or message.ran("time_context")),
        reason="the view is that of SVD's temporal attention, (batch, frames, tokens, width)"
        + (f", of {numbers.whose}" if shape[3] == numbers.context else ", and the stack names it"),
        evidence=f"{text}: {rows * shape[1] * shape[3]} = {rows} x {shape[1]} frames x {shape[3]}, expected a multiple of {shape[0]} x "
        f"{shape[1]} x {shape[3]}.",
        why="The UNet repeats each clip's image token for every frame, so there must be one row for each clip.",
        fix=f"Give encoder_hidden_states of shape ({shape[0]}, 1, {shape[3]}).",
    )


def _frame_rows(text: str, shape: Sequence[int], rows: int) -> Explanation:
    return Explanation(
        code="SHP413",
        title=f"{counted(rows, 'picture')} for {shape[0]} x {shape[1]} frames",
        confidence="high",
        reason="the failing line cuts the pictures into (batch, num_frames, channels, height, width)",
        evidence=f"{text}: there are {rows} pictures of {shape[2]} x {shape[3]} x {shape[4]}.",
        why="Temporal layers get all frames of all clips on one axis, and the number of frames beside them; decoding in chunks changes it "
        "for the last chunk.",
        fix="Give num_frames as many as one clip (or one chunk) has: pictures = batch x num_frames.",
    )


def _temporal_patches(text: str, shape: Sequence[int]) -> Explanation:
    lost = " (0 groups)" if 0 in shape else ""
    return Explanation(
        code="SHP413",
        title="the number of frames does not divide by the temporal patch",
        confidence="medium",
        reason=f"the view splits frames and picture into patches, and frames // patch lost a frame{lost}",
        evidence=f"{text}: {list(shape)} has {shape[1]} groups of {shape[2]} frames.",
        why="frames // patch rounds down, so a number of frames that is not legal loses one.",
        fix=f"Use a number of latent frames that is a multiple of {shape[2]}.",
    )


def expand(message: Message, numbers: Numbers) -> list[Explanation]:
    """Causes of `The expanded size of the tensor must match the existing size`."""
    if message.kind == "expand_rank":
        have, want = message.shape(0), message.shape(1)
        if len(have) == 2 and len(want) == 1 and have[0] == want[0]:
            return [_timestep(f"{list(have)} to {list(want)}", have, want[0])]
        return [generic(f"{list(have)} cannot be expanded to {list(want)}", message)]
    want, have, axis = message.numbers(0, 1, 2)
    target, tensor = message.shape(3), message.shape(4) if message.groups[4] else ()
    # SVD's time context is (batch, tokens, 1, width): rows that are no multiple of batch land on axis 2.
    if len(target) == 4 and target[2] == 1 and axis == 2 and have > 1 and message.site != "other":
        return [_time_context(target, have, message, numbers)]
    if len(target) == 1 and (not tensor or len(tensor) == 1):
        return [_timestep(f"{have} for {want}", tensor or (have,), want)]
    return [generic(f"{have} cannot be expanded to {want} on axis {axis}", message)]


def _time_context(target: Sequence[int], have: int, message: Message, numbers: Numbers) -> Explanation:
    exact = target[3] == numbers.context
    named = message.site == "svd"
    form = "the target is that of SVD's temporal attention: (batch, positions, 1, width)"
    return Explanation(
        code="SHP414",
        title=f"encoder_hidden_states has {have} times as many rows as there are clips",
        confidence=believed(message, numbers, named=named) if exact or (named and not numbers.own) else "low",
        reason=f"{form}, of {numbers.whose}"
        if exact
        else f"{form}, but {target[3]} is not the width of {numbers.whose}",
        evidence=f"target {list(target)}, axis 2 has {have}: {target[0] * have} rows for {counted(target[0], 'clip')}, {have} x "
        f"{target[0]}.",
        why="The UNet repeats the image token for every frame itself. Embeddings already repeated per frame, or doubled for "
        "classifier-free "
        "guidance beside a sample that is not, have too many rows.",
        fix=f"Give encoder_hidden_states of shape ({target[0]}, 1, {target[3]}).",
    )


def _timestep(text: str, have: Sequence[int], rows: int) -> Explanation:
    return Explanation(
        code="SHP414",
        title=f"timestep has shape {tuple(have)}, one value for each of {rows} rows is expected",
        confidence="low",
        reason="the UNet expands only its timestep to one axis; other code may do the same",
        evidence=f"{text}.",
        why="timesteps are expanded to one number for each clip: a scalar, (1,) and (batch,) fit, (batch, 1) does not.",
        fix=f"Give timesteps of shape ({rows},).",
    )


def _no_tokens(text: str) -> Explanation:
    return Explanation(
        "SHP415", "encoder_hidden_states has no token axis", "high", "the stack is inside an image UNet's cross-attention", text,
        "The attention takes (batch, tokens, width): a text encoder gives a vector for each of its tokens, and its pooled one is none of "
        "them.",
        "Give last_hidden_state of the text encoder, not its pooled output.",
    )  # fmt: skip


def unpack(message: Message, numbers: Numbers) -> list[Explanation]:
    """Causes of `not enough values to unpack`: an axis too many or too few, where a shape is unpacked."""
    few, want = message.groups[0] == "not enough", int(message.groups[1])
    got = int(message.groups[2]) if message.groups[2] else None
    text = f"a shape of {got if got is not None else 'more'} axes is taken apart into {want}."
    inside = "attn2" in message.words
    if few and want == 3 and got == 2 and (inside or message.site != "other"):
        if message.ran(r"unet_2d_condition|unet_2d_blocks"):
            return [_no_tokens(text)]
        token = f".unsqueeze(1): (batch, 1, {numbers.context})." if numbers.own else ".unsqueeze(1): (batch, 1, width)."
        return [
            Explanation(
                code="SHP415",
                title="encoder_hidden_states has no token axis" if inside
                else "a tensor lacks an axis: perhaps the image embedding its token axis",
                confidence="high" if inside else "low",
                reason="the stack is inside the cross-attention" if inside
                else "two axes where three are read is what an image embedding without .unsqueeze(1) gives; other unpacking reads the same",
                evidence=text,
                why="The attention takes (batch, tokens, width); SVD's image embedding is (batch, width) until it gets its one token.",
                fix=f"encoder_hidden_states{token}" if inside
                else f"If the stack is inside attn2: encoder_hidden_states{token}",
            )
        ]  # fmt: skip
    pictures = message.ran(r"image_encoder|modeling_clip|pixel_values")
    if not few and want == 4 and (pictures or message.site == "bare"):
        return [
            Explanation(
                code="SHP415",
                title="perhaps a video of 5 axes went where pictures of 4 are read",
                confidence="medium" if pictures else "low",
                reason="the stack names the image encoder" if pictures
                else "four axes is how pictures are read; any other unpacking reads the same",
                evidence=text,
                why="CLIP and the VAE read (batch, channels, height, width).",
                fix="Give CLIP the first frame alone, and flatten batch and frames for the VAE.",
            )
        ]  # fmt: skip
    return []


def clip_size(message: Message, numbers: Numbers) -> list[Explanation]:
    """`Input image size (a*b) doesn't match model (c*d)`."""
    a, b, c, d = message.numbers(0, 1, 2, 3)
    return [
        Explanation(
            code="SHP416",
            title=f"the vision tower got a picture of {a} x {b}, it takes {c} x {d}",
            confidence="high",
            reason="the text says it",
            evidence=f"{a} x {b} against {c} x {d}.",
            why="A vision tower such as CLIP has one fixed picture size. A torch tensor given to a pipeline is not resized, only PIL "
            "pictures are.",
            fix=f"Resize the first frame to {c} x {d} (antialiased, as the pipeline does) before the image encoder.",
        )
    ]


def frame_limit(message: Message, numbers: Numbers) -> list[Explanation]:
    """`... has upper limit of N frames, but received M`."""
    limit, got = message.numbers(0, 1)
    return [_table(f"limit {limit}, received {got}", got, limit)] if got > limit else []


def divisible(message: Message, numbers: Numbers) -> list[Explanation]:
    """The pipeline's own check of height and width."""
    by, *sizes = message.numbers(0, 1, 2)
    wrong = [size for size in sizes if size % by]
    nearest = ", ".join(f"{size}: {_nearest(size, by)}" for size in wrong)
    return [
        Explanation(
            code="CFG102",
            title=f"{' and '.join(map(str, wrong))} {'is' if len(wrong) == 1 else 'are'} no multiple of {by}",
            confidence="high",
            reason="the text says it",
            evidence=f"height and width {sizes[0]} and {sizes[1]}.",
            why=f"The VAE makes one latent of {by} x {by} pixels.",
            fix=f"Take the nearest sizes: {nearest}.",
        )
    ]


def generic(what: str, message: Message) -> Explanation:
    """What is certain when nothing more is."""
    where = f" in self.{message.modules[-1]}" if message.modules else ""
    return Explanation(
        code="SHP410",
        title="two sizes that must agree do not",
        confidence="low",
        reason="the sizes fit no pattern that is known here",
        evidence=f"{what}{where}.",
        why="Two tensors met whose axes do not fit"
        + ("; the last line of your own code in the traceback names them." if message.frames else "."),
        fix="Print both shapes before that line; `svdtune trace` follows them through a module.",
    )


CAUSES = {
    "cat": cat, "cat_bare": cat, "cat_rank": cat_rank, "broadcast": broadcast, "broadcast_fake": broadcast, "expand": expand,
    "expand_rank": expand, "view": view, "unpack": unpack, "clip_size": clip_size, "frame_limit": frame_limit, "divisible": divisible,
}  # fmt: skip
