"""Prove the run before it starts: read the clips' and the model's headers, then run the real `train_step` on shapes alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from svdtune.config.schema import Config
from svdtune.errors import SvdtuneError
from svdtune.guards.findings import Finding, Report, Stage


def run_preflight(config: Config) -> Report:
    """Every stage, all findings collected; a stage that cannot start because of an earlier one is marked skipped."""
    stages: list[Stage] = []
    findings: list[Finding] = []
    for name, check in (("data", check_data), ("model", check_model), ("shapes", check_shapes)):
        started = time.perf_counter()
        blocked = name == "shapes" and any(f.code.startswith("CKP") and f.severity == "error" for f in findings)
        found = [] if blocked else check(config)
        failed = any(finding.severity == "error" for finding in found)
        status = "skipped" if blocked else "failed" if failed else "ok"
        stages.append(Stage(name, round(time.perf_counter() - started, 3), status))
        findings += found
    ignored = [finding for finding in findings if finding.code in config.preflight.ignore]
    kept = [finding for finding in findings if finding.code not in config.preflight.ignore]
    return Report(stages, kept, ignored, _axes(config))


def check_data(config: Config) -> list[Finding]:
    """DAT301: no usable clips. DAT302: clips that would be left out."""
    from svdtune.data.catalog import scan

    def look() -> list[Finding]:
        rejected = scan(config.data).rejected
        why = "data.on_bad_clip=skip leaves such files out of training."
        return [Finding("DAT302", "warning", str(bad.path), bad.reason, why=why) for bad in rejected]

    return _as_finding("DAT301", config.data.root, look) + check_images(config)


def check_images(config: Config) -> list[Finding]:
    """DAT303: a file of validation.images cannot be opened."""
    from svdtune.sample.video import read_image

    def look(image: str) -> list[Finding]:
        read_image(image, height=config.data.height, width=config.data.width, resize=config.data.resize)
        return []

    tried = (_as_finding("DAT303", "validation.images", partial(look, image)) for image in config.validation.images)
    return [finding for found in tried for finding in found]


def check_model(config: Config) -> list[Finding]:
    """CKP201: model folder or weights cannot be used. CKP202: another number of frames than the base was trained with.

    CKP203: the weights are still to be downloaded.
    """
    from svdtune.model.facts import SHIPPED, model_facts
    from svdtune.model.load import is_local, known_configs, require_weights

    def look() -> list[Finding]:
        configs = known_configs(config.model)
        facts = model_facts(configs)
        require_weights(config.model)
        if config.model.pretrained in SHIPPED and not is_local(config.model):
            return [Finding("CKP203", "warning", "model.pretrained", "the weights are not on this machine yet",
                            why="Training begins with their download (gigabytes), and they are not checked here.")]  # fmt: skip
        if facts.num_frames == config.data.num_frames:
            return []
        return [
            Finding(
                "CKP202", "warning", "data.num_frames", str(config.data.num_frames), f"{facts.num_frames}, as the base",
                "The UNet runs with any number of frames, but its temporal layers have seen only this one.",
                f"data.num_frames={facts.num_frames}", (f"data.num_frames={facts.num_frames}",),
            )
        ]  # fmt: skip

    return _as_finding("CKP201", config.model.pretrained, look)


def check_shapes(config: Config) -> list[Finding]:
    """SHP401: `train_step`, forward or backward, fails at the sizes of the configuration."""
    from svdtune.guards.shapes import fake_step

    def look() -> list[Finding]:
        fake_step(config)
        return []

    return _as_finding("SHP401", "train_step", look)


def _as_finding(code: str, where: str, look: Callable[[], list[Finding]]) -> list[Finding]:
    try:
        return look()
    except SvdtuneError as error:
        return [Finding(code, "error", where, str(error))]
    except (RuntimeError, ValueError, TypeError) as error:
        if code != "SHP401":
            raise
        return [Finding(code, "error", where, f"{type(error).__name__}: {error}")]


def _axes(config: Config) -> dict[str, int]:
    from svdtune.model.facts import model_facts
    from svdtune.model.load import known_configs

    try:
        facts = model_facts(known_configs(config.model))
    except SvdtuneError:
        return {}
    data = config.data
    return facts.axes(b=config.train.batch_size, t=data.num_frames, h=data.height, w=data.width)
