"""Several processes are one run: equal weights and gradients, other clips and other noise, the same set of parameters and versions.

Each rank says what it holds in numbers (`facts_of_rank`), all are gathered, and `compare` makes findings of the differences.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations
from typing import Any, Literal

import accelerate
import diffusers
import numpy as np
import peft
import torch
import transformers
import yaml
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn.functional import pad

import svdtune
from svdtune.checkpoint.tensors import is_shard
from svdtune.config.load import resolved_yaml
from svdtune.contracts import Draws
from svdtune.diffusion.draws import TENSORS
from svdtune.guards.findings import Finding
from svdtune.trainer.build import Session
from svdtune.trainer.state import flat
from svdtune.trainer.watch import Seen

_ROW = 2**16
"""Words that are summed at once: the table of weights stays at a MiB, and reaches tensors of 16 GiB."""
_NORM = "the norm of all gradients"
_NAMED = 3
"""Names that a finding lists."""
_DECISIVE = ("torch", "diffusers", "svdtune")
"""Packages of which another version computes another training."""
_OF_THE_HOST = ("data.root", "data.workers", "run.threads")
"""Options that machines may have each their own of."""


@dataclass(frozen=True)
class RankFacts:
    """What one rank holds and is about to do, small enough to be sent to all others; what is left empty is not compared."""

    rank: int
    host: str
    trained: Mapping[str, str] = field(default_factory=dict)
    """Dtype and shape by parameter."""
    parameters: Mapping[str, int] = field(default_factory=dict)
    """Fingerprint of each parameter and buffer of all networks, the network's name before the first dot; without shards, of which
    each rank has its own."""
    gradients: Mapping[str, int] = field(default_factory=dict)
    """Fingerprint of each trained parameter's gradient, where it has one."""
    samples: tuple[int, ...] = ()
    """Global sample numbers of this rank's step."""
    names: tuple[str, ...] = ()
    """Files of these samples."""
    noise: tuple[str, ...] = ()
    """For each sample words that are equal where its noise is: see `noise_of`."""
    sigma: tuple[float, ...] = ()
    clips: int = 0
    """Files to train on: as many samples are one epoch, in which no file comes twice."""
    versions: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    """The resolved configuration by `section.key`."""


def fingerprint(tensor: Tensor) -> Tensor:
    """int64 () of the bits: equal for equal bits, else different but for a chance below 2**-30. No synchronisation.

    Every 32-bit word times a random odd 64-bit number of its position, summed modulo 2**64.
    """
    columns, rows = _weights(tensor.device)
    words = _words(tensor)
    if len(words) <= _ROW:
        return (words * columns[: len(words)]).sum()
    table = pad(words, (0, -len(words) % _ROW)).view(-1, _ROW)
    return ((table * columns).sum(1) * rows[: len(table)]).sum()


def fingerprints(tensors: Sequence[Tensor]) -> Tensor:
    """int64 (n,), on the tensors' device."""
    return torch.stack([fingerprint(tensor) for tensor in tensors])


def noise_of(draws: Draws) -> list[str]:
    """For each clip of `draws` one word per kind of noise, `noise=<fingerprint> ...`."""
    words = [[f"{name}={value:x}" for value in fingerprints(list(getattr(draws, name))).tolist()] for name in TENSORS]
    return [" ".join(clip) for clip in zip(*words, strict=True)]


def facts_of_rank(
    session: Session, samples: Sequence[int], names: Sequence[str], noise: Sequence[str], sigma: Sequence[float]
) -> RankFacts:
    """Called when the gradients of a step are there and no update is made yet; the lists have one entry per clip of the step."""
    gradients = {name: p.grad for name, p in _trained(session).items() if p.grad is not None and not is_shard(p)}
    return RankFacts(
        rank=session.accelerator.process_index,
        host=platform.node(),
        trained=_described(session),
        parameters=_checksums(_held(session)),
        gradients=_checksums(gradients),
        samples=tuple(samples),
        names=tuple(names),
        noise=tuple(noise),
        sigma=tuple(sigma),
        clips=len(session.catalog.train),
        versions=versions(session.accelerator.device),
        options=flat(yaml.safe_load(resolved_yaml(session.config))),
    )


def versions(device: torch.device) -> dict[str, str]:
    """Of what computes here: packages, CUDA and the device."""
    packages = (torch, diffusers, transformers, accelerate, peft, svdtune)
    found = {package.__name__: str(package.__version__) for package in packages}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {**found, "CUDA": torch.version.cuda or "none", "device": name}


def check_ranks(facts: RankFacts) -> list[Finding]:
    """What differs between ranks and must not, or is shared and must not be. Called on every rank; all get the same list."""
    return compare(gather_object([facts]))


def parameters_agree(session: Session, step: int) -> list[Finding]:
    """DST813 where trained parameters differ after `step`. Called on every rank: eight bytes each, and one synchronisation."""
    if session.accelerator.num_processes == 1 or session.sharding:
        return []
    trained = _trained(session)
    prints = fingerprints(list(trained.values()))
    _, weights = _weights(prints.device)
    everywhere: Any = session.accelerator.gather((prints * weights[: len(prints)]).sum())
    if len(set(everywhere.tolist())) == 1:
        return []
    rank, host = session.accelerator.process_index, platform.node()
    facts = RankFacts(rank, host, _described(session), dict(zip(trained, prints.tolist(), strict=True)))
    return compare(gather_object([facts]), step)


def step_agrees(session: Session, seen: Seen) -> list[Finding]:
    """DST810 to DST813 after a step of training: weights, gradient norm, clips and noise. Called on every rank."""
    if session.accelerator.num_processes == 1:
        return []
    facts = RankFacts(
        session.accelerator.process_index,
        platform.node(),
        trained={_NORM: "float64 ()"},
        gradients={_NORM: int(fingerprint(torch.tensor([seen.grad_norm], dtype=torch.float64)))},
        samples=tuple(seen.samples.tolist()),
        names=seen.names,
        noise=tuple(words_of(seen.noise)),
        clips=len(session.catalog.train),
    )
    return [*parameters_agree(session, seen.step), *compare(gather_object([facts]), seen.step)]


def words_of(noise: Tensor) -> list[str]:
    """One word for each clip, from the first numbers of its noise (clips, n)."""
    return ["noise=" + "/".join(f"{number:.8g}" for number in row) for row in noise.tolist()]


def compare(facts: Sequence[RankFacts], step: int = 0) -> list[Finding]:
    """Findings on the facts of all ranks; `step` where training has begun. Causes come before what follows from them."""
    return [
        *_versions(facts),
        *_options(facts),
        *_trained_sets(facts),
        *_clips(facts),
        *_noise(facts),
        *_parameters(facts, step),
        *_gradients(facts),
    ]


# What a rank holds


@cache
def _weights(device: torch.device) -> tuple[Tensor, Tensor]:
    """Odd random int64 (_ROW,) twice, for the words of a row and for the rows; the same in every process and version."""
    numbers = torch.from_numpy(np.random.Philox(0).random_raw(2 * _ROW).view(np.int64) | 1).to(device)
    # Two tables: with one, word i of row j would weigh what word j of row i weighs.
    return numbers[:_ROW], numbers[_ROW:]


def _words(tensor: Tensor) -> Tensor:
    """The bits as int32 (n,), filled up with zero bytes."""
    size = tensor.numel() * tensor.element_size()
    data = tensor.detach().reshape(-1).view(torch.uint8)
    if size % 4 or data.storage_offset() % 4:
        data = pad(data, (0, -size % 4))
    return data.view(torch.int32)


def _checksums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    return dict(zip(tensors, fingerprints(list(tensors.values())).tolist(), strict=True)) if tensors else {}


def _trained(session: Session) -> dict[str, Tensor]:
    return {f"unet.{name}": parameter for name, parameter in session.trained.items()}


def _described(session: Session) -> dict[str, str]:
    return {name: f"{str(p.dtype).removeprefix('torch.')} {tuple(p.shape)}" for name, p in _trained(session).items()}


def _held(session: Session) -> dict[str, Tensor]:
    # With cached clips the CLIP tower takes no part, and is on the CPU or has no weights.
    names = ("unet", "vae") if session.config.data.latents else ("unet", "vae", "image_encoder")
    networks: dict[str, Any] = {name: getattr(session.model, name) for name in names}
    return {
        f"{network}.{name}": tensor
        for network, module in networks.items()
        for tensors in (module.named_parameters(), module.named_buffers())
        for name, tensor in tensors
        if not is_shard(tensor)
    }


# What the facts of all ranks say


def _versions(facts: Sequence[RankFacts]) -> Iterator[Finding]:
    for name, got in _different(facts, lambda fact: fact.versions):
        severity: Literal["error", "warning"] = "error" if name in _DECISIVE else "warning"
        yield Finding(
            "DST815", severity, name, got, "the same on all ranks",
            "Another device rounds differently and may be slower, and all wait for the slowest." if name == "device" else
            "Other versions compute other numbers for the same clip, and bugs that one of them has go into the average unseen.",
            "Train on devices of one kind." if name == "device" else
            "Give all machines the same environment: pip install -c constraints.txt svdtune.",
        )  # fmt: skip


def _options(facts: Sequence[RankFacts]) -> Iterator[Finding]:
    for name, got in _different(facts, lambda fact: fact.options):
        severity: Literal["error", "warning"] = "warning" if name in _OF_THE_HOST else "error"
        yield Finding(
            "DST815", severity, name, got, "the same on all ranks",
            "Each rank reads its own copy of the configuration; ranks that train by other options are not one run.",
            "Start all ranks with the same file and the same overrides.",
        )  # fmt: skip


def _different(facts: Sequence[RankFacts], of: Callable[[RankFacts], Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Keys whose value is not the same on all ranks, and who has which."""
    for key in dict.fromkeys(key for fact in facts for key in of(fact)):
        holders: dict[str, list[RankFacts]] = {}
        for fact in facts:
            holders.setdefault(str(of(fact).get(key, "nothing")), []).append(fact)
        if len(holders) > 1:
            yield key, "; ".join(f"{value} on {_said(who, facts)}" for value, who in holders.items())


def _trained_sets(facts: Sequence[RankFacts]) -> list[Finding]:
    sets = {fact.rank: {f"{name} {text}" for name, text in fact.trained.items()} for fact in facts}
    shared = set.intersection(*sets.values())
    extra = [(fact, sorted(sets[fact.rank] - shared)) for fact in facts if sets[fact.rank] != shared]
    if not extra:
        return []
    told = "; ".join(f"{_said([fact], facts)} also has {_listed(names)}" for fact, names in extra)
    return [
        Finding(
            "DST814", "error", extra[0][1][0].split(" ")[0], f"of {len(shared)} parameters that all ranks train; {told}",
            "the same trained parameters, shapes and dtypes on all ranks",
            "DDP averages gradients by position: a rank with another set waits for ever, or averages different parameters.",
            "Freeze and adapt by the configuration alone, never by what the rank is.",
        )
    ]  # fmt: skip


def _clips(facts: Sequence[RankFacts]) -> list[Finding]:
    """DST811, once: the same sample numbers on two ranks, or under other numbers of one epoch nothing but the same files."""
    for one, other in combinations(facts, 2):
        shared = sorted(set(one.samples) & set(other.samples))
        if shared:
            names = dict(zip(one.samples, one.names, strict=True))
            got = f"{_said([one, other], facts)} both have {_listed([f'sample {n} ({names[n]})' for n in shared])}"
            return [_same_clips(names[shared[0]], got)]
        epochs = {sample // one.clips for sample in one.samples + other.samples} if one.clips else set()
        if one.names and len(epochs) == 1 and set(one.names) == set(other.names):
            got = f"{_said([one, other], facts)} both read {_listed(sorted(set(one.names)))}"
            return [_same_clips(one.names[0], got)]
    return []


def _same_clips(clip: str, got: str) -> Finding:
    return Finding(
        "DST811", "error", clip, got, "other clips on each rank",
        "More devices then do the same work again: the batch is smaller than it seems, and a part of the data is never seen.",
        "Give the loader this process's rank and the number of processes (accelerator.process_index and num_processes), and leave "
        "out clips that cannot be decoded (rejected.jsonl): others take their place.",
    )  # fmt: skip


def _noise(facts: Sequence[RankFacts]) -> list[Finding]:
    """DST812, once: noise or all sigmas of two ranks are the same, though their samples are not (that would be DST811)."""
    for one, other in combinations(facts, 2):
        if set(one.samples) & set(other.samples):
            continue
        mine, theirs = _samples_by_word(one), _samples_by_word(other)
        for word in (word for word in mine if word in theirs):
            name = word.partition("=")[0]
            first, second = (f"sample {s[word]} on {_said([f], facts)}" for s, f in ((mine, one), (theirs, other)))
            return [_same_noise(f"Draws.{name}", f"the same {name} for {first} and {second}")]
        if one.sigma and one.sigma == other.sigma:
            values = ", ".join(f"{sigma:.6g}" for sigma in one.sigma[:_NAMED])
            return [_same_noise("Draws.sigma", f"{values} in this order on {_said([one, other], facts)}")]
    return []


def _samples_by_word(fact: RankFacts) -> dict[str, int]:
    return {word: sample for sample, text in zip(fact.samples, fact.noise, strict=True) for word in text.split()}


def _same_noise(where: str, got: str) -> Finding:
    return Finding(
        "DST812", "error", where, got, "independent draws on each rank",
        "The average over ranks is to average the noise out; shared noise stays in the gradient however many devices there are.",
        "Draw from (seed, global sample number) alone, as svdtune/diffusion/draws.py does, not from a generator that all ranks seed alike.",
    )  # fmt: skip


def _parameters(facts: Sequence[RankFacts], step: int) -> Iterator[Finding]:
    """DST813: one finding for the trained, one for the frozen."""
    trained = {name for fact in facts for name in fact.trained}
    by_rank = [fact.parameters for fact in facts]
    names = _common(by_rank)
    groups = {
        "trained": ([name for name in names if name in trained],
                    "Start again from the last checkpoint: all ranks load the same file. Then look for what changes weights on one "
                    "rank alone (`if is_main_process`, a random initialisation, an update that one rank skips)."),
        "frozen": ([name for name in names if name not in trained],
                   "Compare the files of the base on the machines, and load it anew where they differ; nothing may change a frozen network "
                   "on one rank alone."),
    }  # fmt: skip
    for kind, (group, fix) in groups.items():
        unequal = _unequal(group, by_rank)
        if unequal:
            yield Finding(
                "DST813", "error", unequal[0], _told(facts, by_rank, unequal, f"{len(group)} {kind} parameters", step),
                "equal to the bit on all ranks",
                "The ranks compute gradients of different networks and average them, which fits none; only rank 0's is saved.",
                fix,
            )  # fmt: skip


def _gradients(facts: Sequence[RankFacts]) -> list[Finding]:
    by_rank = [fact.gradients for fact in facts]
    # Of what all train: another set of them is a finding of its own.
    group = _common([fact.trained for fact in facts])
    unequal = _unequal(group, by_rank)
    if not unequal:
        return []
    return [
        Finding(
            "DST810", "error", unequal[0], _told(facts, by_rank, unequal, f"{len(group)} gradients"),
            "equal to the bit on all ranks after the last micro-step",
            "The wrapped network averages gradients in its own forward and backward. Without that each rank trains a network of its "
            "own, the weights drift apart and only rank 0's are saved.",
            "Call what accelerator.prepare returned (parts.unet), not its `.module` or the unwrapped network, and run the last "
            "micro-step outside no_sync.",
        )
    ]  # fmt: skip


def _common(mappings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys that all have, in the order of the first."""
    return [key for key in mappings[0] if all(key in mapping for mapping in mappings)]


def _unequal(names: Sequence[str], by_rank: Sequence[Mapping[str, int]]) -> list[str]:
    return [name for name in names if len({values.get(name) for values in by_rank}) > 1]


def _told(
    facts: Sequence[RankFacts], by_rank: Sequence[Mapping[str, int]], unequal: Sequence[str], total: str, step: int = 0
) -> str:
    """Which of `total` differ, and on whom: the ranks that are not with the most (of equally many, not with the first)."""
    odd: set[int] = set()
    for name in unequal:
        values = [values.get(name) for values in by_rank]
        usual = max(values, key=values.count)
        odd |= {i for i, value in enumerate(values) if value != usual}
    theirs, others = [[fact for i, fact in enumerate(facts) if (i in odd) == is_odd] for is_odd in (True, False)]
    when = f"after step {step} " if step else ""
    against = _said(others, facts) if others else "another rank"
    return f"{when}{len(unequal)} of {total} not the same on {_said(theirs, facts)} as on {against}: {_listed(unequal)}"


def _said(some: Sequence[RankFacts], facts: Sequence[RankFacts]) -> str:
    """`rank 1`, `ranks 0 and 2`; with the machine where there are several."""
    hosts = len({fact.host for fact in facts}) > 1
    ranks = [f"{fact.rank} ({fact.host})" if hosts else str(fact.rank) for fact in some]
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(ranks[:-1])} and {ranks[-1]}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
