"""Records docs/mistake.svg, the picture in the README: one mistake, told by torch, by a script, and by svdtune.

    python scripts/record_mistake.py

Runs three real commands on a real SVD-XT architecture (random bf16 weights, 4 GiB of memory) whose image encoder was
replaced by CLIP ViT-L/14, and renders what the terminal shows. Nothing in the picture is typed by hand.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

from svdtune.model.facts import SHIPPED

TARGET = Path(__file__).parents[1] / "docs" / "mistake.svg"
WIDTH = 118
VIT_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "projection_dim": 768,
}
SCRIPT = """\
import json, torch
from diffusers import UNetSpatioTemporalConditionModel
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

torch.set_default_dtype(torch.bfloat16)
unet = UNetSpatioTemporalConditionModel(**{k: v for k, v in json.load(open("my-svd/unet/config.json")).items() if k[0] != "_"})
clip = CLIPVisionModelWithProjection(CLIPVisionConfig(**json.load(open("my-svd/image_encoder/config.json"))))
clips, frames = 4, 25
image_embeds = clip(torch.randn(clips, 3, 224, 224)).image_embeds
loss = unet(
    torch.randn(clips, frames, 8, 9, 16), torch.randn(clips), image_embeds[:, None], torch.randn(clips, 3)
).sample.square().mean()
"""
CONFIG = """\
model:
  pretrained: my-svd
  variant: fp16
data:
  root: clips/
train:
  batch_size: 4
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        _prepare(work)
        console = Console(record=True, width=WIDTH, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
        for note, command, last in (
            ("what torch says", 'python -c "import torch; torch.nn.Linear(1024, 320)(torch.zeros(100, 768))"', 1),
            ("what a training script says, after the weights are loaded", "python train_svd.py", 9),
            (
                "what svdtune says, in seconds, before any weight is loaded",
                "svdtune preflight my.yaml --only shapes",
                40,
            ),
        ):
            console.print(Text(f"# {note}", style="dim"))
            console.print(Text.assemble(("$ ", "bold green"), (command, "bold")))
            for line in _output(command, work)[-last:]:
                console.print(Text(line.rstrip(), style="red" if "Error" in line else ""), soft_wrap=False)
            console.print()
        TARGET.write_text(console.export_svg(title="one mistake, told three times"), encoding="utf-8")


def _prepare(work: Path) -> None:
    shutil.copytree(SHIPPED["stabilityai/stable-video-diffusion-img2vid-xt"], work / "my-svd")
    encoder = work / "my-svd" / "image_encoder" / "config.json"
    encoder.write_text(json.dumps({**json.loads(encoder.read_text()), **VIT_L}))
    (work / "train_svd.py").write_text(SCRIPT)
    (work / "my.yaml").write_text(CONFIG)


def _output(command: str, work: Path) -> list[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=work, env={**os.environ, "PATH": path, "COLUMNS": str(WIDTH)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    site = str(Path(sys.prefix) / "lib")
    return [line.replace(site, "...") for line in done.stdout.splitlines() if "CLIPImageProcessor" not in line]


if __name__ == "__main__":
    main()
