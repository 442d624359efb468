"""svdtune: fine-tune Stable Video Diffusion from a YAML, and prove the run before it starts."""

__version__ = "0.1.0"
