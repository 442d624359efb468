"""What docker/ says, by each format's own linter, and what the image promises."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "docker/Dockerfile"
BIN = Path(sys.executable).parent


def instructions(text: str) -> list[str]:
    """The instructions of a Dockerfile, comments gone and continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    return [line for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines() if line.strip()]


def final_stage(text: str) -> dict[str, str]:
    """The last stage's instructions by name, the last of each."""
    every = instructions(text)
    start = max(index for index, line in enumerate(every) if line.startswith("FROM "))
    return dict(line.split(maxsplit=1) for line in every[start:])


def scripts() -> list[Path]:
    """Every shell script of docker/, scripts/ and .ci/."""
    files = [
        path for folder in ("docker", "scripts", ".ci") for path in sorted((ROOT / folder).iterdir()) if path.is_file()
    ]
    return [path for path in files if path.suffix == ".sh" or path.read_bytes().startswith(b"#!/usr/bin/env bash")]


def ran(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_hadolint_has_nothing_to_say():
    linted = ran(BIN / "hadolint", DOCKERFILE)
    assert linted.returncode == 0, linted.stdout


def test_hadolint_would_say_something(tmp_path):
    """The linter is there and looks: a root user, an entry in shell form and a latest base are told."""
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM ubuntu:latest\nUSER root\nENTRYPOINT svdtune\n")
    said = ran(BIN / "hadolint", bad).stdout
    assert all(rule in said for rule in ("DL3007", "DL3002", "DL3025")), said


def test_shellcheck_has_nothing_to_say():
    found = {path.name for path in scripts()}
    assert {"smoke.sh", "build_and_smoke.sh", "lock_image", "quickstart", "test", "environment.sh", "run"} <= found
    linted = ran(BIN / "shellcheck", "-x", "--source-path=SCRIPTDIR", *scripts())
    assert linted.returncode == 0, linted.stdout


def test_compose_file_fits_the_schema_of_compose(tmp_path):
    check = [BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec"]
    checked = ran(*check, "docker/compose.yaml")
    assert checked.returncode == 0, checked.stdout
    broken = tmp_path / "compose.yaml"
    broken.write_text((ROOT / "docker/compose.yaml").read_text().replace("read_only: true", "readonly: true"))
    refused = ran(*check, broken)
    assert refused.returncode == 1
    assert "readonly" in refused.stdout


def test_compose_service_has_what_training_needs():
    """Shared memory, a GPU, room for a checkpoint at a stop, and nothing that the image does without."""
    service = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]["train"]
    assert service["shm_size"] == "8g"
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["tmpfs"] == ["/tmp"]
    assert int(service["stop_grace_period"].removesuffix("s")) >= 60
    assert service["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
    folders = {volume["target"]: volume for volume in service["volumes"] if isinstance(volume, dict)}
    assert folders["/workspace/clips"]["read_only"] is True
    assert "read_only" not in folders["/workspace/runs"]
    assert "cache:/cache" in service["volumes"]
    assert not any("=" in variable for variable in service["environment"]), "a secret's value belongs into the shell"


def test_image_runs_as_nobody_special_and_ends_in_order():
    stage = final_stage(DOCKERFILE.read_text())
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", stage["USER"])
    assert stage["STOPSIGNAL"] == "SIGTERM"
    assert json.loads(stage["ENTRYPOINT"]) == ["/usr/bin/tini", "--", "/opt/svdtune/docker/entry"]
    assert json.loads(stage["HEALTHCHECK"].split("CMD ")[1]) == ["/opt/svdtune/docker/healthcheck"]
    assert stage["WORKDIR"] == "/workspace"


def test_base_is_an_argument_pinned_by_digest():
    lines = instructions(DOCKERFILE.read_text())
    assert re.fullmatch(r"ARG CUDA_BASE=nvidia/cuda:[\w.-]+@sha256:[0-9a-f]{64}", lines[0])
    assert {line.split()[1] for line in lines if line.startswith("FROM ")} == {"${CUDA_BASE}"}


def test_every_install_is_locked_or_takes_nothing_from_outside():
    installs = re.findall(r"pip install [^&;]*", "\n".join(instructions(DOCKERFILE.read_text())))
    assert len(installs) == 3
    for install in installs:
        assert "--require-hashes" in install or "--no-index" in install


def test_dependencies_are_a_layer_before_the_source():
    lines = instructions(DOCKERFILE.read_text())
    environment, final = (index for index, line in enumerate(lines) if line.startswith("FROM "))
    source = [index for index, line in enumerate(lines) if line.startswith("COPY svdtune ")]
    assert not any("svdtune" in line for line in lines[environment:final])
    assert min(source) > next(index for index, line in enumerate(lines) if line.startswith("COPY --from=environment"))


@pytest.mark.parametrize("word", ["sshd", "openssh", "nginx", "jupyter", "apache", "HF_TOKEN", "PASSWORD", "sudo"])
def test_image_has_no_server_and_no_secret(word):
    assert word not in "\n".join(instructions(DOCKERFILE.read_text()))


def test_build_context_is_a_list_of_what_is_copied():
    """What is not named stays outside: clips, runs, keys."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    kept = {line[1:] for line in lines if line.startswith("!")}
    copied = [line.split()[1:-1] for line in instructions(DOCKERFILE.read_text()) if re.match(r"COPY (?!--from)", line)]
    sources = {source.split("/")[0] for line in copied for source in line if not source.startswith("$")}
    assert sources == kept
    assert all((ROOT / source).exists() for line in copied for source in line if not source.startswith("$"))


@pytest.mark.parametrize("name", ["docker/entry", "docker/healthcheck", "docker/smoke.sh"])
def test_what_the_image_runs_may_be_run(name):
    assert (ROOT / name).stat().st_mode & 0o111 == 0o111
