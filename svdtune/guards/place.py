"""Where in svdtune's own code something was raised. Needs no torch."""

from __future__ import annotations

import traceback
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
_GUARDS = Path(__file__).parent


def frame_of(error: BaseException) -> traceback.FrameSummary | None:
    """The last frame in the code that training runs; None when none of it was running."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [
        f for f in frames if Path(f.filename).is_relative_to(_PACKAGE) and not Path(f.filename).is_relative_to(_GUARDS)
    ]
    return own[-1] if own else None


def place_of(error: BaseException) -> str:
    """`conditioning.py:69 posterior`, or nothing."""
    frame = frame_of(error)
    return f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" if frame else ""
