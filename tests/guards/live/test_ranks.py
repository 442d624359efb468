"""What differs between ranks and must not, and what they share and must not: facts made up here, and two processes put wrong."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from svdtune.guards.findings import Finding
from svdtune.guards.live import ranks
from svdtune.guards.live.ranks import RankFacts, compare, fingerprint
from tests.trainer.conftest import REPO, SHORT, start

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float64, torch.int64]


def values(dtype: torch.dtype, n: int) -> torch.Tensor:
    """All different where the dtype has as many, and none zero."""
    return (torch.arange(n) % 120 + 1).to(dtype)


def prints(*tensors: torch.Tensor) -> list[int]:
    return ranks.fingerprints(tensors).tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 301])
def test_any_changed_bit_changes_the_fingerprint(dtype, n):
    tensor = values(dtype, n)
    size = tensor.element_size()
    changed = []
    for byte in range(n * size):
        other = tensor.clone()
        other.view(torch.uint8)[byte] ^= 1 << (byte % 8)
        changed.append(other)
    assert len(set(prints(tensor, *changed))) == 1 + len(changed)
    assert prints(tensor.clone()) == prints(tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swapped_elements_change_the_fingerprint(dtype):
    tensor = values(dtype, 24)
    swaps = []
    for i in range(24):
        for j in range(i):
            other = tensor.clone()
            other[[i, j]] = tensor[[j, i]]
            swaps.append(other)
    assert len(set(prints(tensor, *swaps))) == 1 + len(swaps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_signs_count_also_where_two_of_them_could_cancel(dtype):
    tensor = values(dtype, 16)
    zeros = torch.zeros(16, dtype=dtype)
    flipped = [tensor, zeros, -tensor, -zeros]
    for i in range(16):
        for j in range(i):
            for base in (tensor, zeros):
                other = base.clone()
                other[[i, j]] *= -1
                flipped.append(other)
            signs = tensor.clone()
            signs[i], signs[j] = 5, -5
            moved = tensor.clone()
            moved[i], moved[j] = -5, 5
            flipped += [signs, moved]
    assert len({*prints(*flipped)}) == len({bytes(t.view(torch.uint8).tolist()) for t in flipped})


def test_a_nan_is_equal_to_the_same_nan_and_to_no_other():
    nan = torch.tensor([1.0, float("nan"), 2.0])
    other = nan.clone()
    other.view(torch.int32)[1] ^= 1
    assert bool(other[1].isnan())
    first, same, different = prints(nan, nan.clone(), other)
    assert first == same != different


def test_large_tensors_are_summed_by_rows_and_position_still_counts():
    n = 2 * ranks._ROW + 5
    tensor = torch.arange(n, dtype=torch.int32)
    last, across, transposed = tensor.clone(), tensor.clone(), tensor.clone()
    last[-1] += 1
    across[[7, ranks._ROW + 7]] = tensor[[ranks._ROW + 7, 7]]
    # Word 1 of row 0 and word 0 of row 1: would weigh the same if rows and columns shared their weights.
    transposed[[1, ranks._ROW]] = tensor[[ranks._ROW, 1]]
    assert len(set(prints(tensor, last, across, transposed))) == 4


def test_views_count_as_what_they_show():
    base = torch.arange(40, dtype=torch.float16)
    odd, turned = base[1:9], base.view(5, 8).t()
    assert prints(odd, turned) == prints(odd.clone(), turned.contiguous())
    assert prints(turned) != prints(base.view(5, 8))
    assert prints(base[3])[0] == prints(base[3:4])[0]
    assert fingerprint(base[:0]).dtype == torch.int64


def test_a_fingerprint_is_the_same_in_every_process_and_version():
    assert prints(torch.arange(5, dtype=torch.int32)) == [7225497811740526338]


FIRST = RankFacts(
    rank=0,
    host="ant",
    trained={"unet.a": "float32 (2,)", "unet.b": "float32 (3,)", "unet.c": "float32 (3,)", "unet.d": "float32 (3,)"},
    parameters={"unet.a": 1, "unet.b": 2, "unet.c": 3, "unet.d": 4, "vae.x": 5, "vae.y": 6},
    gradients={"unet.a": 7, "unet.b": 8, "unet.c": 9, "unet.d": 10},
    samples=(0, 2),
    names=("one.mp4", "two.mp4"),
    noise=("noise=a1 pixel_noise=b1", "noise=a2 pixel_noise=b2"),
    sigma=(0.5, 2.0),
    clips=8,
    versions={"torch": "2.13.0", "peft": "0.17", "device": "H100"},
    options={"train.lr": 1e-4, "data.workers": 4},
)
SECOND = replace(
    FIRST, rank=1, samples=(1, 3), names=("three.mp4", "four.mp4"), sigma=(0.7, 3.0),
    noise=("noise=a3 pixel_noise=b3", "noise=a4 pixel_noise=b4"),
)  # fmt: skip
THIRD = replace(
    SECOND, rank=2, samples=(4, 5), names=("five.mp4", "six.mp4"), sigma=(0.9, 4.0), noise=("noise=a5", "noise=a6")
)


def only(findings: list[Finding]) -> Finding:
    (finding,) = findings
    assert finding.where
    assert finding.expected
    assert finding.why.endswith(".")
    assert finding.fix.endswith(".")
    return finding


def test_ranks_that_are_one_run_give_no_finding():
    assert compare([FIRST]) == compare([FIRST, SECOND]) == compare([FIRST, SECOND, THIRD]) == []


def test_gradients_that_differ_are_named():
    other = replace(SECOND, gradients={**FIRST.gradients, "unet.b": 0})
    found = only(compare([FIRST, other]))
    assert (found.code, found.severity, found.where) == ("DST810", "error", "unet.b")
    assert found.got == "1 of 4 gradients not the same on rank 1 as on rank 0: unet.b"
    assert ".module" in found.fix
    every = replace(SECOND, gradients=dict.fromkeys(FIRST.gradients, 0))
    assert only(compare([FIRST, every])).got.endswith("unet.a, unet.b, unet.c and 1 more")


def test_a_gradient_that_one_rank_lacks_differs():
    fewer = replace(SECOND, gradients={"unet.a": 7, "unet.b": 8, "unet.c": 9})
    assert only(compare([FIRST, fewer])).got == "1 of 4 gradients not the same on rank 1 as on rank 0: unet.d"


def test_the_odd_ranks_are_those_outside_the_majority():
    wrong = replace(FIRST, parameters={**FIRST.parameters, "unet.a": 0})
    assert "on rank 0 as on ranks 1 and 2:" in only(compare([wrong, SECOND, THIRD])).got
    apart = [replace(fact, gradients=dict.fromkeys(fact.gradients, fact.rank)) for fact in (FIRST, SECOND, THIRD)]
    assert "on ranks 1 and 2 as on rank 0:" in only(compare(apart)).got
    two = replace(THIRD, parameters={**FIRST.parameters, "unet.b": 0})
    three = replace(SECOND, parameters={**FIRST.parameters, "unet.c": 0})
    assert "on ranks 0, 1 and 2 as on another rank: unet.a, unet.b, unet.c" in only(compare([wrong, three, two])).got


def test_parameters_that_differ_are_named_trained_and_frozen_apart():
    wrong = replace(SECOND, host="bee", parameters={**FIRST.parameters, "unet.c": 0, "vae.y": 0})
    trained, frozen = compare([FIRST, wrong])
    assert {trained.code, frozen.code} == {"DST813"}
    assert trained.got == "1 of 4 trained parameters not the same on rank 1 (bee) as on rank 0 (ant): unet.c"
    assert frozen.got == "1 of 2 frozen parameters not the same on rank 1 (bee) as on rank 0 (ant): vae.y"
    assert (trained.where, frozen.where) == ("unet.c", "vae.y")
    assert "checkpoint" in trained.fix
    assert "base" in frozen.fix


def test_in_training_the_step_is_said():
    wrong = replace(SECOND, parameters={**FIRST.parameters, "unet.a": 0})
    assert only(compare([FIRST, wrong], 300)).got.startswith("after step 300 1 of 4 trained parameters")


def test_shared_samples_are_named_and_their_noise_is_no_second_finding():
    found = only(compare([FIRST, replace(FIRST, rank=1)]))
    assert (found.code, found.severity, found.where) == ("DST811", "error", "one.mp4")
    assert found.got == "ranks 0 and 1 both have sample 0 (one.mp4), sample 2 (two.mp4)"
    part = replace(SECOND, samples=(1, 2))
    assert only(compare([FIRST, part])).got == "ranks 0 and 1 both have sample 2 (two.mp4)"


def test_the_same_files_under_other_numbers_are_the_same_clips():
    found = only(compare([FIRST, replace(SECOND, names=FIRST.names[::-1])]))
    assert (found.code, found.got) == ("DST811", "ranks 0 and 1 both read one.mp4, two.mp4")


def test_a_file_that_comes_again_in_the_next_epoch_or_for_one_that_failed_is_sound():
    assert compare([FIRST, replace(SECOND, names=FIRST.names, samples=(8, 9))]) == []
    assert compare([FIRST, replace(SECOND, names=("three.mp4", "two.mp4"))]) == []


def test_shared_noise_is_named():
    found = only(compare([FIRST, THIRD, replace(SECOND, noise=("noise=a3 pixel_noise=b2", "noise=a4"))]))
    assert (found.code, found.severity, found.where) == ("DST812", "error", "Draws.pixel_noise")
    assert found.got == "the same pixel_noise for sample 2 on rank 0 and sample 1 on rank 1"


def test_the_same_sigmas_are_shared_draws_and_one_alike_is_chance():
    found = only(compare([FIRST, replace(SECOND, sigma=FIRST.sigma)]))
    assert (found.code, found.where, found.got) == ("DST812", "Draws.sigma", "0.5, 2 in this order on ranks 0 and 1")
    assert compare([FIRST, replace(SECOND, sigma=(0.5, 3.0))]) == []


def test_another_trained_set_is_told_by_what_is_more():
    fewer = {name: text for name, text in FIRST.trained.items() if name != "unet.c"}
    found = only(compare([FIRST, replace(SECOND, trained=fewer)]))
    assert (found.code, found.severity, found.where) == ("DST814", "error", "unet.c")
    assert found.got == "of 3 parameters that all ranks train; rank 0 also has unet.c float32 (3,)"
    half = replace(SECOND, trained={**FIRST.trained, "unet.a": "float16 (2,)"})
    told = only(compare([FIRST, half])).got
    assert "rank 0 also has unet.a float32 (2,)" in told
    assert "rank 1 also has unet.a float16 (2,)" in told


@pytest.mark.parametrize(
    ("name", "severity"), [("torch", "error"), ("peft", "warning"), ("device", "warning")], ids=lambda value: value
)
def test_other_versions_are_named(name, severity):
    found = only(compare([FIRST, SECOND, replace(THIRD, versions={**FIRST.versions, name: "other"})]))
    assert (found.code, found.severity, found.where) == ("DST815", severity, name)
    assert found.got == f"{FIRST.versions[name]} on ranks 0 and 1; other on rank 2"


def test_other_options_are_named_and_those_of_a_machine_are_warnings():
    found = only(compare([FIRST, replace(SECOND, options={**FIRST.options, "train.lr": 1e-3})]))
    assert (found.code, found.severity, found.where) == ("DST815", "error", "train.lr")
    assert found.got == "0.0001 on rank 0; 0.001 on rank 1"
    assert only(compare([FIRST, replace(SECOND, options={**FIRST.options, "data.workers": 0})])).severity == "warning"
    assert only(compare([FIRST, replace(SECOND, options={"train.lr": 1e-4})])).got == "4 on rank 0; nothing on rank 1"


def test_one_process_has_nobody_to_differ_from():
    alone: Any = SimpleNamespace(accelerator=SimpleNamespace(num_processes=1))
    assert ranks.parameters_agree(alone, 100) == []


@pytest.fixture(scope="module")
def found(clips, tmp_path_factory) -> list[dict[str, list[dict]]]:
    """For each of two processes the findings of every case of rank_script.py."""
    out = tmp_path_factory.mktemp("ranks")
    script = [sys.executable, *TORCHRUN, str(Path(__file__).with_name("rank_script.py")), str(out)]
    config = [str(REPO / "configs/tiny.yaml"), f"data.root={clips}", *SHORT, "train.steps=1", "train.accumulation=2",
              "train.batch_size=1"]  # fmt: skip
    process = start([*script, *config])
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err[-3000:]
    return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


EXPECTED = {
    "sound": "", "bypassed": "DST810", "same clips": "DST811", "same noise": "DST812", "same tensor": "DST812",
    "other set": "DST814", "other version": "DST815", "agree": "",
    "step": "", "clips of a step": "DST811", "noise of a step": "DST812", "norm of a step": "DST810",
    "trained at the start": "DST813", "trained in training": "DST813",
    "frozen at the start": "DST813", "frozen in training": "",
    "buffer at the start": "DST813", "buffer in training": "", "sound again": "",
}  # fmt: skip


@pytest.mark.parametrize(("case", "code"), EXPECTED.items())
def test_two_processes_put_wrong_are_refused_on_both(found, case, code):
    first, second = (each[case] for each in found)
    assert [finding["code"] for finding in first] == [code] * bool(code)
    assert first == second
    assert all(finding["severity"] == "error" for finding in first)


def test_every_case_of_the_two_processes_is_expected(found):
    assert found[0].keys() == found[1].keys() == EXPECTED.keys()


def test_what_two_processes_say_names_the_thing(found):
    told = {case: findings[0]["got"] for case, findings in found[0].items() if findings}
    assert "gradients not the same on rank 1 as on rank 0: unet." in told["bypassed"]
    assert "ranks 0 and 1 both have sample 0 (" in told["same clips"]
    assert told["same noise"] == "the same noise for sample 0 on rank 0 and sample 1 on rank 1"
    assert told["same tensor"] == "the same pixel_noise for sample 0 on rank 0 and sample 1 on rank 1"
    assert "rank 0 also has unet." in told["other set"]
    assert told["other version"] == "0.35.0 on rank 0; 0.0.1 on rank 1"
    assert told["trained at the start"].startswith("1 of ")
    assert told["trained in training"].startswith("after step 200 1 of ")
    assert "frozen parameters not the same on rank 1 as on rank 0: vae." in told["frozen at the start"]
    assert "frozen parameters not the same on rank 1 as on rank 0: image_encoder." in told["buffer at the start"]
