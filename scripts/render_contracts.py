"""Writes docs/contracts.md from contracts/svd.py: python scripts/render_contracts.py"""

from pathlib import Path

from svdtune.contracts import Draws, Encoded, LatentBatch, Prediction, StepResult, UNetInput, VideoBatch, specs

TARGET = Path(__file__).parents[1] / "docs" / "contracts.md"
HEAD = """# Every tensor that crosses a seam

Generated from `svdtune/contracts/svd.py` by `python scripts/render_contracts.py`; a test compares.
The runtime check in `train_step`, preflight's fake records and this page read the same lines.

b batch · t frames · c rgb · h w pixels · f VAE downsampling · z latent channels · d CLIP width · m micro-conditions.
c, f, z, d and m are read from the model's own `config.json`; for SVD and SVD-XT they are 3, 8, 4, 1024 and 3.
"""


def render() -> str:
    """The page: one table per record, one row per field."""
    sections = [HEAD]
    for record in (VideoBatch, LatentBatch, Draws, Encoded, UNetInput, Prediction, StepResult):
        rows = [
            f"## {record.__name__}",
            (record.__doc__ or "").splitlines()[0],
            "",
            "| field | axes | dtype | meaning |",
            "|---|---|---|---|",
        ]
        for name, spec in specs(record).items():
            columns = f" ({', '.join(spec.columns)})" if spec.columns else ""
            rows.append(
                f"| `{name}` | `{spec.axes or 'scalar'}` | {spec.dtype} | {spec.meaning.replace('|', chr(92) + '|')}{columns} |"
            )
        sections.append("\n".join(rows) + "\n")
    return "\n".join(sections)


if __name__ == "__main__":
    TARGET.write_text(render())
