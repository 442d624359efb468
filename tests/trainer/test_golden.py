"""Losses of a short run of the tiny base, kept in tests/golden/tiny_cpu.txt: a change of the numerics shows here first.

Kernels round differently between CPUs and Adam's first steps amplify it, so digits agree to 5e-4; write the file anew, on purpose, with
    SVDTUNE_WRITE_GOLDEN=1 scripts/test tests/trainer/test_golden.py
"""

import os
from pathlib import Path

import pytest

from tests.trainer.conftest import losses

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny_cpu.txt"
STEPS = 6
SIZE = ["data.height=64", "data.width=96"]


def read():
    rows = [line.split() for line in GOLDEN.read_text().splitlines() if not line.startswith("#")]
    return {(method, int(step)): float(loss) for method, step, loss in rows}


def test_losses_are_those_of_the_golden_file(train):
    got = {}
    for method in ("full", "lora"):
        run = train(
            method, f"adapt.method={method}", f"train.steps={STEPS}", "train.batch_size=2", "train.lr=1e-4", *SIZE
        )
        got |= {(method, step): loss for step, loss in losses(run).items()}
    if os.environ.get("SVDTUNE_WRITE_GOLDEN"):
        rows = [f"{method} {step} {loss:.9f}" for (method, step), loss in got.items()]
        GOLDEN.write_text("\n".join(["# method step loss", *rows]) + "\n")
    expected = read()
    assert got.keys() == expected.keys()
    for key, loss in got.items():
        assert loss == pytest.approx(expected[key], rel=5e-4), key
