"""What stands beside the weights of a result: notes for svdtune, and a model card with its pictures for people. No torch."""

from __future__ import annotations

import shutil
from pathlib import Path

from svdtune.checkpoint.card import Kind, model_card
from svdtune.checkpoint.manifest import read_manifest
from svdtune.checkpoint.notes import make_notes, write_notes
from svdtune.checkpoint.training import card_images, training_of_run


def write_beside(folder: Path, *, checkpoint: Path, source: Path, kind: Kind, name: str) -> None:
    """Write svdtune.json, README.md and its pictures into `folder`, which will be called `name`.

    `checkpoint` is a folder of a run; `source` is where the base lies. Raises CheckpointError when the manifest is not whole.
    """
    run, manifest = checkpoint.parents[1], read_manifest(checkpoint)
    write_notes(folder, make_notes(manifest, source))
    images = card_images(run)
    for image in images:
        shutil.copyfile(image, folder / image.name)
    training = training_of_run(run, checkpoint, source=source)
    text = model_card(training, kind=kind, images=[image.name for image in images], folder=name)
    (folder / "README.md").write_text(text, encoding="utf-8")
