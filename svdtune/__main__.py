"""The door for `python -m svdtune` and for `accelerate launch svdtune`, which runs the folder: `python svdtune ...`."""

import sys
from pathlib import Path

if not __package__:
    # Run as a folder, sys.path starts with the package itself: its parent belongs there.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from svdtune.cli import main

if __name__ == "__main__":
    main()
