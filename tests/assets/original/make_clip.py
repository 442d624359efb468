"""Makes clip.safetensors, clip_io.safetensors and clip_config.json with the original tower: open_clip 3.3.0's VisionTransformer.

Run once (torch 2.13.0, CPU) with the unpacked wheel as argument: `pip download --no-deps open_clip_torch==3.3.0`, unzip it to DIR,
then `python tests/assets/original/make_clip.py DIR`. Its `__init__`, which needs torchvision, is passed over.
"""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
PREFIX = "conditioner.embedders.0.open_clip.model.visual."
SIZE, PATCH, WIDTH, HEADS, LAYERS, OUT = 28, 14, 48, 3, 2, 24


def tower(package: Path) -> torch.nn.Module:
    """As `_build_vision_tower` builds ViT-H-14: learnt positions, nn.GELU, LayerNorm, the class token is pooled."""
    stubs = {name: ModuleType(name) for name in ("open_clip", "torchvision", "torchvision.ops", "torchvision.ops.misc")}
    stubs["open_clip"].__path__ = [str(package / "open_clip")]
    stubs["torchvision.ops.misc"].FrozenBatchNorm2d = object
    sys.modules.update(stubs)
    module = importlib.import_module("open_clip.transformer")
    return module.VisionTransformer(SIZE, PATCH, WIDTH, LAYERS, HEADS, mlp_ratio=4.0, output_dim=OUT).eval()


def main() -> None:
    torch.manual_seed(0)
    network = tower(Path(sys.argv[1]))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
            elif ".ln_" in name or name.startswith("ln_"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
        pixels = torch.randn(2, 3, SIZE, SIZE)
        embeds = network(pixels)
    weights = {PREFIX + name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    save_file(weights, HERE / "clip.safetensors")
    save_file({"pixel_values": pixels, "image_embeds": embeds}, HERE / "clip_io.safetensors")
    config = {
        "architectures": ["CLIPVisionModelWithProjection"], "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_channels": 3, "patch_size": PATCH, "image_size": SIZE,
        "projection_dim": OUT, "hidden_act": "gelu", "layer_norm_eps": 1e-5,
    }  # fmt: skip
    (HERE / "clip_config.json").write_text(json.dumps(config, indent=1) + "\n")


if __name__ == "__main__":
    main()
