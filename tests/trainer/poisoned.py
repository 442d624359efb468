"""`svdtune`, with a loss on the second process that is not finite from the second step on."""

import math
import os
from dataclasses import replace

from svdtune.cli import main
from svdtune.trainer import loop

accumulate, calls = loop.accumulate, []


def poisoned(*args, **options):
    accumulated = accumulate(*args, **options)
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) > 1:
        return replace(accumulated, losses=accumulated.losses * math.nan)
    return accumulated


if __name__ == "__main__":
    loop.accumulate = poisoned
    main()
