"""Error texts into structured facts, by grammar: which kind of message, which numbers, which modules were running."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_PREFIX = re.compile(
    r"^\s*(?:\[(?:rank|default)?(?P<a>\d+)\]:?|(?:rank|RANK)[ :]?(?P<b>\d+)[:\]|]|(?P<c>\d{1,3}):(?=\s))\s?"
    r"|^[EWI]\d{4} [\d:.]+\s+\d+ \S+\] ?"
)
_FRAME = re.compile(r'^\s*File "(?P<file>[^"]+)", line \d+, in (?P<name>\S+)')
_SELF = re.compile(r"\b(?:self|attn)((?:\.[A-Za-z_]\w*(?:\[[^\]]*\])?)+)\(")
_PATH = re.compile(r"\b[A-Za-z_]\w*(?:\.\w+){1,}")

_N = r"(\d+)"
_SHAPE = (
    r"(?:…|\.\.\.)? ?(?:torch\.Size\(|tensor\((?:…|\.\.\.), device='meta', size=)?[\[(]([\d][\d, ]*|\.\.[\d, ]+)[\])]?"
)
_GAP = r"(?:\.\.\.|…)"

GRAMMAR: tuple[tuple[str, str], ...] = (
    ("product", rf"mat1 and mat2 shapes cannot be multiplied \({_N}x{_N} and {_N}x{_N}\)"),
    ("product", rf"same reduction dim, but got \[{_N}, {_N}\] X \[{_N}, {_N}\]"),
    ("product", rf"^\W*\({_N}x{_N} and {_N}x{_N}\)\W*$"),
    ("conv", rf"(?:weight of size )?\[([\d, ]+)\], expected input\[([\d, .…]+)\](?: to have {_N} channels, but got {_N})?"),
    ("norm", rf"number of channels in input, but got weight of shape \[{_N}\] and input of shape \[([\d, ]+)\]"),
    ("conv_rank", r"Expected .*?(\d)D \(batched\) input to conv\dd, but got input of size: \[([\d, ]+)\]"),
    ("cat", rf"Sizes of tensors must match except in dimension {_N}\. Expected size {_N} but got size {_N}"),
    ("cat", rf"Sizes of tensors must match except in dimension {_N}\. Expected {_N} in dimension (\d+) but got {_N}"),
    ("cat_bare", rf"Expected size {_N}(?: but got size {_N}|{_GAP})"),
    ("broadcast", rf"tensor a \({_N}\) (?:must match )?{_GAP}? ?(?:the size of )?(?:tensor )?b \({_N}\)(?: at "
    rf"non-singleton dimension {_N})?"),
    ("broadcast_fake", rf"broadcast a dimension of length {_N} at -{_N}! .*?had torch\.Size\(\[([\d, "
    rf"]+)\]\).*?broadcastable to \[([\d, ]+)\]"),
    ("expand", rf"expanded size of the tensor \({_N}\) must match the existing size \({_N}\) at non-singleton "
    rf"dimension {_N}\.\s+Target sizes: \[([\d, ]+)\](?:\.\s+Tensor sizes: \[([\d, ]+)\])?"),
    ("expand_rank", r"expand\(\w[\w.]*\{\[([\d, ]+)\]\}, size=\[([\d, ]+)\]\): the number of sizes provided"),
    ("view", rf"shape '\[([-\d, ]+)\]' is invalid for input of size {_N}"),
    ("unpack", rf"(not enough|too many) values to unpack \(expected {_N}(?:, got {_N})?\)"),
    ("load_cannot", rf"([A-Za-z_]\w*(?:\.\w+)+) expected shape {_SHAPE}\)*(?:,? but got {_SHAPE})?"),
    ("load_size", rf"([A-Za-z_][\w.]*): (?:copying a param with shape )?{_SHAPE}\)?.{{0,60}}?current model(?: is)? {_SHAPE}"),
    ("load_versus", rf"size mismatch for (\S+) {_SHAPE} vs {_SHAPE}"),
    ("keys", r"(Missing|Unexpected) key\(s\) in state_dict: *(\S*)"),
    ("keys_log", rf"with {_N} missing and {_N} unexpected keys"),
    ("keys_log", r"(Some weights) of (\w+) were (?:not initialized|not used)"),
    ("keys_log", r"(Missing Keys): (\S+)"),
    ("init", r"(\w+)\.__init__\(\) (?:missing \d+ required|got an unexpected)[^:']*'?:? *'(\w+)'"),
    ("header", r"deserializing header: ([\w ,]+)"),
    ("unreadable", r"(Unable to load weights) from checkpoint file for '([^']*)"),
    ("lfs", r"(without having git-lfs) installed"),
    ("missing_file", r"[Nn]o file named ([^\s,]+).*? found in directory (\S+)"),
    ("revision", r"(\S+) is not a valid git identifier"),
    ("hub", r"Cannot load model (\S+): model is not cached locally"),
    ("dtype_conv", r"Input type \((?:struct )?([\w:.]+)\) and (?:bias|weight) type \((?:struct )?([\w:.]+)\)"),
    ("dtype_product", r"must have the same dtype, but got ([\w:.]+) and ([\w:.]+)"),
    ("dtype_attention", r"to have the same dtype, but got query\.dtype: ([\w:.]+) key\.dtype: ([\w:.]+)"),
    ("unscale", r"(Attempting to unscale FP16 gradients)"),
    ("nan", r"([Nn]a[Nn]s? (?:detected|was|found|encountered)[^\n]{0,60})"),
    ("attribute", r"(?:type object |object )?'(\w+)'(?: object)? has no attribute '(\w+)'"),
    ("attribute", r"(\w+Scheduler) has no `?(\w+)`?"),
    ("attribute_bare", rf"{_GAP} ?(?:has )?no attribute '(\w+)'"),
    ("memory", r"(CUDA out of memory|CUDA error: out of memory|can't allocate memory|OutOfMemoryError|MPS backend out of memory)"),
    ("launch_shape", r"(CUDA error: invalid configuration argument)"),
    ("operator", r"(?:No operator found for `?(\w+)|(Conv3D) is not supported on MPS|not implemented for '(\w+)')"),
    ("device", r"Tensor on device (\S+) is not on the expected device (\S+?)!"),
    ("device", r"found at least two devices, (\S+) and (\S+?)!"),
    ("stack", r"each tensor to be equal size, but got \[([\d, ]+)\](?: at entry \d+)? (?:and|…|\.\.\.) \[([\d, ]+)\]"),
    ("stack", r"\[([\d, ]+)\] at entry \d+ and \[([\d, ]+)\] at entry"),
    ("stack", r"^\W*\[([\d, ]+)\] (?:…|\.\.\.) \[([\d, ]+)\]\W*$"),
    ("stack", r"(each tensor to be equal size), but got torch\.Size\(\[([\d, ]+)\]\)"),
    ("short_clip", r"(?:contains|has|have) fewer than `?(\d+)`? frames"),
    ("decode", r"(DECORDError|DECORD_EOF_RETRY_MAX|video_reader\.cc|moov atom not found|Invalid data found when processing input)"),
    ("frame_limit", rf"upper limit of {_N} frames,? but received \D*{_N}"),
    ("reduction", r"(Expected to have finished reduction in the prior iteration|Parameters which did not receive grad)"),
    ("no_grad", r"element \d+ of tensors (does not require grad)"),
    ("watchdog", r"(Watchdog caught collective operation timeout)"),
    ("optimizer", r"(parameter group that doesn't match the size of optimizer's group|Mismatch in number of shadow parameters)"),
    ("seed", r"(manual_seed expected a long, but got NoneType)"),
    ("scheduler", r"(prediction_type) given as (\w+)"),
    ("empty_scalar", r"(Tensor with 0 elements cannot be converted to Scalar)"),
    ("none_tensor", r"(\w+)\(\): argument '(\w+)'.*? must be Tensor, not NoneType"),
    ("clip_size", rf"Input image size \({_N}\*{_N}\) doesn't match model \({_N}\*{_N}\)"),
)  # fmt: skip
_TEXT, _LINE = 2_000_000, 2_000
"""Characters of a log from its end, and of a line, that are read: the grammar's cost grows with the square of a line."""
_COMPILED = tuple((kind, re.compile(pattern)) for kind, pattern in GRAMMAR)


@dataclass(frozen=True)
class Message:
    """One recognised error: its kind, the groups its grammar gave, and what surrounded it."""

    kind: str
    groups: tuple[str, ...]
    line: str
    modules: tuple[str, ...] = ()
    """Names called as `self.name(...)` outside torch, outermost first, and dotted names beside the message."""
    context: str = ""
    """The text of the same traceback, of the same rank."""
    ranks: tuple[str, ...] = field(default=())

    def numbers(self, *positions: int) -> list[int]:
        """The groups at these positions as whole numbers."""
        return [int(self.groups[position]) for position in positions]

    def shape(self, position: int) -> tuple[int, ...]:
        """The group at this position as a shape."""
        return tuple(int(size) for size in re.findall(r"-?\d+", self.groups[position]))


def parse(text: str) -> list[Message]:
    """Every error in `text` that has a known grammar, once each, in order; ranks that say the same are merged."""
    found: dict[tuple[str, tuple[str, ...]], Message] = {}
    for rank, lines in _by_rank(text).items():
        for segment in _segments(lines):
            for message in _messages(segment):
                key = (message.kind, message.groups)
                known = found.get(key)
                if known is None:
                    found[key] = _with(message, (*((rank,) if rank else ()),))
                else:
                    best = known if len(known.modules) >= len(message.modules) else message
                    found[key] = _with(best, tuple(dict.fromkeys([*known.ranks, *((rank,) if rank else ())])))
    return list(found.values())


def last_errors(text: str) -> list[str]:
    """Lines that end a traceback (`SomeError: what`), for saying what was understood of an unknown one."""
    lines = [line for group in _by_rank(text).values() for line in group]
    return list(
        dict.fromkeys(line.strip() for line in lines if re.match(r"^\s*[\w.]*(?:Error|Exception|Interrupt)\b", line))
    )


def shapes_in(text: str) -> list[str]:
    """Every shape-like piece of the text, in order."""
    return list(dict.fromkeys(re.findall(r"\[\d+(?:, ?-?\d+)+\]|\(\d+(?:, ?\d+)+\)|\b\d+x\d+(?:x\d+)*\b", text)))


def _with(message: Message, ranks: tuple[str, ...]) -> Message:
    return Message(message.kind, message.groups, message.line, message.modules, message.context, ranks)


def _by_rank(text: str) -> dict[str, list[str]]:
    """Lines of each rank, launcher prefixes and colours taken off; progress bars end in a carriage return."""
    ranks: dict[str, list[str]] = {}
    for whole in re.split(r"[\n\r]", _ANSI.sub("", text[-_TEXT:])):
        raw = whole[:_LINE]
        match = _PREFIX.match(raw)
        rank = next((group for group in match.groups() if group), "") if match else ""
        ranks.setdefault(rank, []).append(raw[match.end() :] if match else raw)
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


def _messages(segment: list[str]) -> Iterator[Message]:
    modules = tuple(_modules(segment))
    context = "\n".join(segment)
    code = _code_lines(segment)
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
                beside = _PATH.findall(joined.replace(match.group(), " "))
                yield Message(kind, groups, line.strip(), (*modules, *beside), context)


def _continues(segment: list[str], number: int) -> bool:
    return number + 1 < len(segment) and bool(
        re.search(r"(?:size of|the|but got|multiplied|expected|and|shape)$", segment[number].rstrip())
    )


def _code_lines(segment: list[str]) -> set[int]:
    """Line numbers of source code inside a traceback: a raise statement there is not the message."""
    return {number + 1 for number, line in enumerate(segment) if _FRAME.match(line)}


def _modules(segment: list[str]) -> Iterator[str]:
    for number, line in enumerate(segment[:-1]):
        frame = _FRAME.match(line)
        if frame and "/torch/" not in frame["file"].replace("\\", "/"):
            for match in _SELF.finditer(segment[number + 1]):
                yield match[1].strip(".")
