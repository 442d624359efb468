"""Error texts into structured facts, by grammar: which kind of message, which numbers, whose code was running."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

_N = r"(\d+)"
_SIZES = r"\[([\d, ]+)\]"
_SHAPE = (
    r"(?:…|\.\.\.)? ?(?:torch\.Size\(|tensor\((?:…|\.\.\.), device='meta', size=)?[\[(]([\d][\d, ]*|\.\.[\d, ]+)[\])]?"
)
_GAP = r"(?:\.\.\.|…)"
_TYPE = r"(?:struct )?([\w:.]+)"

GRAMMAR: tuple[tuple[str, str], ...] = (
    ("product", rf"mat1 and mat2 shapes cannot be multiplied \({_N}x{_N} and {_N}x{_N}\)"),
    ("product", rf"same reduction dim, but got \[(\w+), {_N}\] X \[{_N}, {_N}\]"),
    ("product", rf"^\W*\({_N}x{_N} and {_N}x{_N}\)\W*$"),
    ("conv", rf"(?:weight of size )?{_SIZES}, expected input\[([\d, .…]+)\](?: to have {_N} channels, but got {_N})?"),
    ("norm", rf"number of channels in input, but got weight of shape \[{_N}\] and input of shape {_SIZES}"),
    ("conv_rank", rf"Expected .*?(\d)D \(batched\) input to conv\dd, but got input of size: {_SIZES}"),
    ("cat", rf"Sizes of tensors must match except in dimension {_N}\. Expected size {_N} but got size {_N}"),
    ("cat", rf"Sizes of tensors must match except in dimension {_N}\. Expected {_N} in dimension (\d+) but got {_N}"),
    ("cat_bare", rf"Expected size {_N}(?: but got size {_N}|{_GAP})"),
    ("cat_rank", rf"Tensors must have same number of dimensions: got {_N} and {_N}"),
    ("broadcast", rf"tensor a \({_N}\) (?:must match )?{_GAP}? ?(?:the size of )?(?:tensor )?b \({_N}\)(?: at "
    rf"non-singleton dimension {_N})?"),
    ("broadcast_fake", rf"broadcast a dimension of length {_N} at -{_N}! .*?had torch\.Size\({_SIZES}\).*?broadcastable to {_SIZES}"),
    ("expand", rf"expanded size of the tensor \({_N}\) must match the existing size \({_N}\) at non-singleton "
    rf"dimension {_N}\.\s+Target sizes: {_SIZES}(?:\.\s+Tensor sizes: {_SIZES})?"),
    ("expand_rank", rf"expand\(\w[\w.]*\{{{_SIZES}\}}, size={_SIZES}\): the number of sizes provided"),
    ("view", rf"shape '\[([-\d, ]+)\]' is invalid for input of size {_N}"),
    ("unpack", rf"(not enough|too many) values to unpack \(expected {_N}(?:, got {_N})?\)"),
    ("load_cannot", rf"((?:[A-Za-z_]\w*\.)+\w+) expected shape {_SHAPE}\)*(?:,? but got {_SHAPE})?"),
    ("load_size", rf"((?:[A-Za-z_]\w*\.)+\w+): (?:copying a param with shape )?{_SHAPE}\)?.{{0,60}}?current model(?: is)? {_SHAPE}"),
    ("load_versus", rf"size mismatch for (\S+) {_SHAPE} vs {_SHAPE}"),
    ("keys", r"(Missing|Unexpected) key\(s\) in state_dict: *(.*)"),
    ("keys_log", rf"with {_N} missing and {_N} unexpected keys"),
    ("keys_log", r"(Some weights) of (?:the model checkpoint[^.]*?|(\w+)) were (?:not initialized|not used)"),
    ("keys_log", r"(Missing Keys): (\S+)"),
    ("init", r"(\w+)\.__init__\(\) (?:missing \d+ required|got an unexpected)[^:']*'?:? *'(\w+)'"),
    ("header", r"deserializing header: ([\w ,]+)"),
    ("unreadable", r"(Unable to load weights) from checkpoint file for '([^']*)"),
    ("lfs", r"(without having git-lfs) installed"),
    ("missing_file", r"[Nn]o file named ([^\s,]+).*? found in directory (\S+)"),
    ("missing_file", r"(\S+/\S+) does not appear to have a file named ([\w.]+\w)"),
    ("revision", r"(\S+) is not a valid git identifier"),
    ("hub", r"Cannot load model (\S+): model is not cached locally"),
    ("hub", r"(?:Cannot access gated repo for url https://[\w.]+/|Access to model )([\w.-]+/[\w.-]+)"),
    ("dtype_conv", rf"Input type \({_TYPE}\) and (?:bias|weight) type \({_TYPE}\)"),
    ("dtype_product", rf"must have the same dtype, but got {_TYPE} and {_TYPE}"),
    ("dtype_product", rf"to have the same dtype, but got: {_TYPE} != {_TYPE}"),
    ("dtype_product", r"expected (?:scalar type|mat1 and mat2 to have the same dtype, but got:) (\w+) (?:but found|!=) (\w+)"),
    ("dtype_attention", r"to have the same dtype, but got query\.dtype: ([\w:.]+) key\.dtype: ([\w:.]+)"),
    ("unscale", r"(Attempting to unscale FP16 gradients)"),
    ("nan", r"([Nn]a[Nn]s? (?:detected|was|found|encountered)[^\n]{0,60})"),
    ("nan", r"(\bloss(?: is|[:=])? *nan\b|NaN loss|returned nan values in its \d+th output)"),
    ("nan", r"(gradients from `parameters` is non-finite)"),
    ("attribute", r"(?:type object |object )?'(\w+)'(?: object)? has no attribute '(\w+)'"),
    ("attribute", r"(\w+Scheduler) has no `?(\w+)`?"),
    ("attribute_bare", rf"{_GAP} ?(?:has )?no attribute '(\w+)'"),
    ("targets", r"Target modules (\{[^}]*\}|\S+) not found in the base model"),
    ("memory", r"(CUDA out of memory|CUDA error: out of memory|can't allocate memory|OutOfMemoryError|MPS backend out of memory"
    r"|CUBLAS_STATUS_ALLOC_FAILED)"),
    ("shared_memory", r"(killed by signal: Bus error|workers are out of shared memory|creating shared memory segment)"),
    ("killed", r"(exitcode *: -9\b|\bSignal 9 \(SIGKILL\)|killed by signal: Killed)"),
    ("pickle_key", r"invalid load key, '(\\?.[^']*)'"),
    ("launch_shape", r"(CUDA error: invalid configuration argument)"),
    ("operator", r"(?:No operator found for `?(\w+)|(Conv3D) is not supported on MPS|not implemented for '(\w+)')"),
    ("device", r"Tensor on device (\S+) is not on the expected device (\S+?)!"),
    ("device", r"found at least two devices, (\S+) and (\S+?)!"),
    ("stack", rf"each tensor to be equal size, but got {_SIZES}(?: at entry \d+)? (?:and|…|\.\.\.) {_SIZES}"),
    ("stack", rf"{_SIZES} at entry \d+ and {_SIZES} at entry"),
    ("stack", rf"^\W*{_SIZES} (?:…|\.\.\.) {_SIZES}\W*$"),
    ("stack_one", rf"each tensor to be equal size, but got torch\.Size\({_SIZES}\)"),
    ("stack_one", r"(Trying to resize storage that is not resizable)"),
    ("collate_none", r"batch must contain tensors.*?found <class '(NoneType)'>"),
    ("no_samples", r"(num_samples=0)"),
    ("short_clip", r"(?:contains|has|have) fewer than `?(\d+)`? frames"),
    ("frame_index", r"Out of bound indices: \[(\d+)"),
    ("frame_index", rf"Error getting frame at: {_N} with total frames: {_N}"),
    ("decode", r"(DECORDError\b(?= *:)|DECORD_EOF_RETRY_MAX|video_reader\.cc|moov atom not found"
    r"|Invalid data found when processing input)"),
    ("decode", r"(Error reading) \S+\.\w{2,4}\.\.\."),
    ("frame_limit", rf"upper limit of {_N} frames,? but received \D*{_N}"),
    ("divisible", rf"have to be divisible by {_N} but are {_N} and {_N}"),
    ("reduction", r"(Expected to have finished reduction in the prior iteration|Parameters which did not receive grad)"),
    ("no_grad", r"element \d+ of tensors (does not require grad)"),
    ("no_parameters", r"(optimizer got an empty parameter list)"),
    ("recomputed", r"(Recomputed values for the following tensors have different metadata)"),
    ("watchdog", r"(Watchdog caught collective operation timeout|Timed out waiting \d+ms for (?:recv|send) operation)"),
    ("peer", r"(ncclRemoteError|Connection closed by (?:remote )?peer)"),
    ("optimizer", r"(parameter group that doesn't match the size of optimizer's group|Mismatch in number of shadow parameters"
    r"|different number of parameter groups)"),
    ("seed", r"(manual_seed expected a long, but got NoneType)"),
    ("scheduler", r"(prediction_type) given as (\w+)"),
    ("empty_scalar", r"(Tensor with 0 elements cannot be converted to Scalar|index 0 is out of bounds for dimension 0 with size 0)"),
    ("none_tensor", r"(\w+)\(\): argument '(\w+)'.*? must be Tensor, not NoneType"),
    ("clip_size", rf"Input image size \({_N}\*{_N}\) doesn't match model \({_N}\*{_N}\)"),
)  # fmt: skip
_COMPILED = tuple((kind, re.compile(pattern)) for kind, pattern in GRAMMAR)
_HEAD, _TAIL, _LINE = 500_000, 2_000_000, 2_000
"""Characters of a long log that are read from its start and its end, and of a line: the grammar's cost grows with a line's square."""

_BARE = 4
"""Lines of a text that is a message and nothing else."""

_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_PREFIX = re.compile(
    r"^\s*(?:\[(?:rank|default)?(?P<a>\d+)\]:? ?|(?:rank|RANK)[ :]?(?P<b>\d+)[:\]|] ?|(?P<c>\d{1,3}):(?= ) ?"
    r"|[EWI]\d{4} [\d:.]+\s+\d+ \S+\] ?|\d{4}-\d\d-\d\d[T ][\d:.,]+Z? |[>│|] ?)"
)
_FRAME = re.compile(r'^\s*File "(?P<file>[^"]+)", line \d+, in (?P<name>\S+)')
_SELF = re.compile(r"\b(?:self|attn)((?:\.[A-Za-z_]\w*(?:\[[^\]]*\])?)+)\(")
_DOTTED = re.compile(r"(?<![\w./\\])[A-Za-z_]\w*(?:\.\w+)+(?![\w(/\\])")
_BEFORE = re.compile(
    r"^\s*(?:(?:DEBUG|INFO|WARNING|ERROR|CRITICAL)[: ]+[\w.]+[: ]+)?(?:\S+\.py:\d+:? *)?(?:[\w.]*(?:Error|Exception)\b:? *)*"
)
_TORCH = re.compile(
    r"/torch/(?:nn|utils|_\w+|autograd|distributed|optim|amp|cuda|functional|overrides)\b|<(?:frozen|string)"
)
_SVD_FILE = re.compile(
    r"spatio_temporal|unet_3d_blocks|transformer_temporal|temporal_decoder|stable_video_diffusion|[^/]*svd[^/]*$|/sgm/modules/"
    r"|/svdtune/(?:trainer|diffusion|model|sample)/",
    re.IGNORECASE,
)
_SVD_NAME = re.compile(
    r"added_time_ids|motion_bucket_id|SpatioTemporal|StableVideoDiffusion|VideoUNet|num_video_frames"
)
_ERROR = re.compile(r"^\W*(?P<name>[\w.]*(?:Error|Exception|Interrupt|Timeout))\b(?P<rest>.*)")
_CHAIN = re.compile(r"During handling of the above exception|was the direct cause of the following|^Original Traceback")
_LEVEL = re.compile(r"\[E\d{4} |\b(?:ERROR|FATAL|CRITICAL|[Ee]rror|Exception|failed|FAILED|Root Cause)\b")
_QUOTED = re.compile(r"\b(?:raise|assert|def|match=|PASSED)\b")
"""Source code or a passing test that holds the words."""
_LAUNCHER = ("ChildFailedError", "CalledProcessError", "ProcessRaisedException")


@dataclass(frozen=True)
class Frame:
    """One line of a traceback's stack."""

    file: str
    function: str
    code: str
    """Its source, where the traceback shows it."""


@dataclass(frozen=True)
class Message:
    """One recognised error: its kind, the groups its grammar gave, and what surrounded it."""

    kind: str
    groups: tuple[str, ...]
    line: str
    frames: tuple[Frame, ...] = ()
    """The stack of its traceback without torch's own, outermost first."""
    beside: tuple[str, ...] = ()
    """Dotted names on the line of the message."""
    context: str = ""
    """The text of the same traceback, of the same rank."""
    ranks: tuple[str, ...] = ()
    last: bool = False
    """Whether it is the error that the text ends with."""
    raised: bool = True
    """Whether the text around it is that of an error; a log or a changelog may hold the same words."""

    def numbers(self, *positions: int) -> list[int]:
        """The groups at these positions as whole numbers; 0 for a symbol such as s0."""
        return [int(self.groups[position]) if self.groups[position].isdigit() else 0 for position in positions]

    def shape(self, position: int) -> tuple[int, ...]:
        """The group at this position as a shape."""
        return tuple(int(size) for size in re.findall(r"-?\d+", self.groups[position]))

    @property
    def modules(self) -> list[str]:
        """Names called as `self.name(...)` in the stack, outermost first, and dotted names beside the message."""
        called = [match[1].strip(".") for frame in self.frames for match in _SELF.finditer(frame.code)]
        return [*called, *self.beside]

    @property
    def words(self) -> set[str]:
        """The single names in `modules`."""
        return {word for path in self.modules for word in re.findall(r"\w+", path)}

    @property
    def site(self) -> Literal["bare", "svd", "other"]:
        """Whose code ran: none is shown, Stable Video Diffusion's, or somebody else's."""
        if not self.frames:
            return "svd" if _SVD_NAME.search(self.line) else "bare"
        named = (_SVD_FILE.search(frame.file) or _SVD_NAME.search(frame.code) for frame in self.frames)
        return "svd" if any(named) else "other"

    def ran(self, pattern: str) -> bool:
        """Whether a file, function or source line of the stack matches."""
        return any(
            re.search(pattern, text, re.IGNORECASE) for f in self.frames for text in (f.file, f.function, f.code)
        )


def parse(text: str) -> list[Message]:
    """Every error in `text` that has a known grammar, once each, in order; ranks that say the same are merged."""
    found: dict[tuple[str, tuple[str, ...]], Message] = {}
    bare = sum(bool(line.strip()) for line in text.splitlines()) <= _BARE
    for rank, lines in _by_rank(text).items():
        ends = _end(lines)
        start = 0
        for segment in _segments(lines):
            for number, message in _messages(segment, bare):
                key = (message.kind, message.groups)
                known = found.get(key, message)
                best = known if len(known.frames) >= len(message.frames) else message
                ranks = dict.fromkeys([*known.ranks, *([rank] if rank else [])])
                last = known.last or start + number >= ends
                found[key] = replace(best, ranks=tuple(ranks), last=last, raised=known.raised or message.raised)
            start += len(segment)
    return list(found.values())


def last_errors(text: str) -> list[str]:
    """Lines that end a traceback (`SomeError: what`), in order, without those of launchers that only pass one on."""
    lines = [line for group in _by_rank(text).values() for _, line in _errors(group)]
    return list(dict.fromkeys(lines[::-1]))[::-1]


def _end(lines: Sequence[str]) -> int:
    """The line of the error that the lines end with, or of the first of a chain that ends them."""
    numbers = [number for number, _ in _errors(lines)] or [0]
    end = numbers.pop()
    while numbers and any(_CHAIN.search(line) for line in lines[numbers[-1] + 1 : end]):
        end = numbers.pop()
    return end


def _errors(lines: Sequence[str]) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(lines):
        if (match := _ERROR.match(line)) and not match["name"].endswith(_LAUNCHER):
            yield number, line.strip()


def shapes_in(text: str) -> list[str]:
    """Every shape-like piece of the text, in order."""
    return list(dict.fromkeys(re.findall(r"\[\d+(?:, ?-?\d+)+\]|\(\d+(?:, ?\d+)+\)|\b\d+x\d+(?:x\d+)*\b", text)))


def shortened(text: str) -> str:
    """The start and the end of a long log; errors stand at one of them."""
    return text if len(text) <= _HEAD + _TAIL else f"{text[:_HEAD]}\n{text[-_TAIL:]}"


def _by_rank(text: str) -> dict[str, list[str]]:
    """Lines of each rank, launcher prefixes and colours taken off; progress bars end in a carriage return."""
    ranks: dict[str, list[str]] = {}
    for whole in re.split(r"\r?\n|\r", _ANSI.sub("", shortened(text))):
        line, rank = whole[:_LINE], ""
        while match := _PREFIX.match(line):
            rank = next((group for group in match.groups() if group), rank)
            line = line[match.end() :]
        ranks.setdefault(rank, []).append(line)
    return ranks


def _segments(lines: list[str]) -> Iterator[list[str]]:
    """One traceback each."""
    segment: list[str] = []
    for line in lines:
        if "Traceback (most recent call last)" in line and segment:
            yield segment
            segment = []
        segment.append(line)
    yield segment


def _messages(segment: list[str], bare: bool) -> Iterator[tuple[int, Message]]:
    """The messages of one traceback with the numbers of their lines; `bare`: the whole text is a message."""
    frames, code = _stack(segment)
    context = "\n".join(segment)
    raised = bare or bool(frames) or any(_ERROR.match(line) for line in segment)
    for number, line in enumerate(segment):
        if number in code:
            continue
        # A launcher or a terminal may have broken one message over two lines.
        joined = f"{line} {segment[number + 1].strip()}" if _continues(segment, number) else line
        seen: list[tuple[int, int]] = []
        for kind, pattern in _COMPILED:
            for match in pattern.finditer(joined):
                if match.start() > len(line) or any(start < match.end() and match.start() < end for start, end in seen):
                    continue
                seen.append(match.span())
                groups = tuple(group or "" for group in match.groups())
                beside = _names(joined, match.group())
                before = line[: match.start()]
                told = (raised or bool(_LEVEL.search(before))) and not _QUOTED.search(before)
                yield number, Message(kind, groups, line.strip(), frames, beside, context, raised=told)


def _names(line: str, message: str) -> tuple[str, ...]:
    rest = _BEFORE.sub("", line).replace(message, " ")
    names = (name for name in _DOTTED.findall(rest) if not name.startswith(("torch.", "http", "www.")))
    return tuple(name for name in names if not name.endswith((".py", ".mp4", "Error", "Exception")))


def _continues(segment: list[str], number: int) -> bool:
    return number + 1 < len(segment) and bool(
        re.search(r"(?:size of|the|but got|multiplied|expected|and|shape|,)$", segment[number].rstrip())
    )


def _stack(segment: Sequence[str]) -> tuple[tuple[Frame, ...], set[int]]:
    """The frames that are not torch's, and the line numbers of source code: a raise statement there is not the message."""
    frames, code = [], set()
    for number, line in enumerate(segment):
        if not (match := _FRAME.match(line)):
            continue
        following = segment[number + 1] if number + 1 < len(segment) else ""
        shown = following.startswith("  ") and not _FRAME.match(following)
        source = following.strip() if shown else ""
        if shown:
            code.add(number + 1)
        file = match["file"].replace("\\", "/")
        if not _TORCH.search(file):
            frames.append(Frame(file, match["name"], source))
    return tuple(frames), code
