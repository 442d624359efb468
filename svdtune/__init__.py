"""svdtune: fine-tune Stable Video Diffusion from a YAML, and prove the run before it starts."""

__version__ = "0.1.0"


def __getattr__(name: str):
    """`svdtune.trace`, without loading torch before it is asked for."""
    if name == "trace":
        from importlib import import_module

        return import_module("svdtune.guards.trace").trace
    raise AttributeError(f"module 'svdtune' has no attribute {name!r}")
