"""What is wrong with the SkyPilot task of the document."""

from __future__ import annotations

from typing import Any

import cloud_docker
import yaml
from cloud_doc import IMAGE, TOOLS, blocks, commands, trainings
from jsonschema import Draft202012Validator

_SCHEMAS = TOOLS["skypilot"]
_LAUNCH = ["sky", "jobs", "launch", "--name", "svdtune", "--secret", "HF_TOKEN", "svdtune.sky.yaml"]


def problems(doc: str) -> list[str]:
    """By SkyPilot's own schemas, which it applies one by one, then by what a training needs."""
    (text,) = blocks(doc, "SkyPilot", "yaml")
    task = yaml.safe_load(text)
    told = _unlike("task", task) + _unlike("resources", task.get("resources"))
    for mount in task.get("file_mounts", {}).values():
        told += _unlike("storage", mount)
    if told:
        return told
    (words,) = commands("\n".join(blocks(doc, "SkyPilot", "bash")))
    if words != _LAUNCH:
        told.append(f"expected {' '.join(_LAUNCH)}")
    return told + _recovery_problems(task["resources"]) + _run_problems(task)


def _unlike(schema: str, value: Any) -> list[str]:
    return [f"{schema}: {error.message}" for error in Draft202012Validator(_SCHEMAS[schema]).iter_errors(value)]


def _recovery_problems(resources: dict[str, Any]) -> list[str]:
    recovery = resources.get("job_recovery", {})
    checks = {
        "no spot machine": resources.get("use_spot") is True,
        "a stop (143) is not recovered, or a refusal is": recovery.get("recover_on_exit_codes") == [143],
        "no second try for code 1": recovery.get("max_restarts_on_errors", 0) >= 1,
        "image_id replaces the entrypoint and needs root inside": "image_id" not in resources,
    }
    return [problem for problem, sound in checks.items() if not sound]


def _run_problems(task: dict[str, Any]) -> list[str]:
    try:
        (run,) = cloud_docker.runs(task["run"])
    except ValueError as error:
        return [str(error)]
    (training,) = trainings(task["run"])
    mounts = {path: mount.get("mode", "MOUNT") for path, mount in task["file_mounts"].items()}
    sources = {volume.split(":")[1]: volume.split(":")[0] for volume in run.flags.get("volume", [])}
    checks = {
        "the clips are not copied to the machine": mounts.get(sources.get(training.option("data.root"), "")) == "COPY",
        "the run folder is no bucket that can be appended to": mounts.get(sources.get(training.option("run.dir"), ""))
        == "MOUNT_CACHED",
        "HF_TOKEN is no required secret": task.get("secrets") == {"HF_TOKEN": None},
        "the clips are not those of the laptop": task["file_mounts"]["/clips"].get("source") == "./clips",
        "the run folder's bucket has no name": bool(task["file_mounts"]["/runs"].get("name")),
        "the last checkpoint of a lost machine may be old": training.option("checkpoint.interval") == "100",
    }
    return [problem for problem, sound in checks.items() if not sound] + cloud_docker.line_problems(run, IMAGE)
