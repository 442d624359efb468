"""What is wrong with the Runpod requests of the document."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from cloud_doc import IMAGE, TOOLS, blocks, commands, hidden_by, shellcheck, trainings
from jsonschema import Draft202012Validator

_SECRET = re.compile(r"\{\{ RUNPOD_SECRET_\w+ \}\}")
_TRAINER = """#!/bin/bash
trap 'sleep 0.2; echo saved >>"$LOG"; exit 143' TERM
echo started >>"$LOG"
[ -z "$ENDS" ] || exit 0
while :; do sleep 0.05; done
"""
_RUNPODCTL = '#!/bin/bash\necho "runpodctl $*" >>"$LOG"\n'


def problems(doc: str) -> list[str]:
    """By Runpod's own schemas, then by what a training needs."""
    (text,) = blocks(doc, "Runpod", "json")
    pod = json.loads(text)
    requests = list(commands("\n".join(blocks(doc, "Runpod", "bash"))))
    told = _unlike("pod", pod) + _request_problems(requests, pod)
    return told or _pod_problems(pod) + _start_problems(pod["dockerStartCmd"])


def _unlike(schema: str, value: Any) -> list[str]:
    return [f"{schema}: {error.message}" for error in Draft202012Validator(TOOLS["runpod"][schema]).iter_errors(value)]


def _request_problems(requests: list[list[str]], pod: dict[str, Any]) -> list[str]:
    volume, upload, start = requests
    made = json.loads(volume[-1])
    centre = made.get("dataCenterId", "")
    checks = {
        "volume: not sent to /networkvolumes": "https://rest.runpod.io/v1/networkvolumes" in volume,
        "pod: not sent to /pods": "https://rest.runpod.io/v1/pods" in start and start[-2:] == ["--json", "@pod.json"],
        "no key in a request": all("Authorization: Bearer $RUNPOD_API_KEY" in words for words in (volume, start)),
        "volume and pod are in different places": pod.get("dataCenterIds") == [centre],
        "the upload goes to another place": upload[-1] == f"https://s3api-{centre.lower()}.runpod.io/"
        and centre in upload,
        "the upload goes to another volume": upload[4] == f"s3://{pod.get('networkVolumeId')}/clips",
    }
    return _unlike("volume", made) + [problem for problem, sound in checks.items() if not sound]


def _pod_problems(pod: dict[str, Any]) -> list[str]:
    (training,) = trainings(" ".join(pod["dockerStartCmd"]))
    volume, env = pod.get("volumeMountPath", "/workspace"), pod["env"]
    lasting = [training.option("data.root"), training.option("run.dir"), env.get("HF_HOME", "")]
    checks = {
        "the image is not the pushed one": pod["imageName"] == IMAGE,
        f"the volume hides {hidden_by(volume)}": not hidden_by(volume),
        "clips, runs or cache are not on the volume": all(path.startswith(f"{volume}/") for path in lasting),
        "data.root is not where the upload goes": training.option("data.root") == f"{volume}/clips",
        "HF_TOKEN is no secret of Runpod": bool(_SECRET.fullmatch(env.get("HF_TOKEN", ""))),
        "the entrypoint is replaced": not pod.get("dockerEntrypoint"),
        "the last checkpoint of a lost pod may be old": training.option("checkpoint.interval") == "100",
    }
    return [problem for problem, sound in checks.items() if not sound]


def _start_problems(start: list[str]) -> list[str]:
    if start[:2] != ["bash", "-c"] or len(start) != 3:
        return ["the start command is no script for bash"]
    told = shellcheck(start[2], "SC2086")  # a pod id has no spaces
    for ends, expected in ((True, ["started"]), (False, ["started", "saved"])):
        log = _start(start[2], ends=ends)
        if log != [*expected, "runpodctl stop pod pod1"]:
            told.append(f"a training that {'ends' if ends else 'is stopped'} leaves {log}")
    return told


def _start(script: str, *, ends: bool) -> list[str]:
    """What stand-ins for svdtune and runpodctl saw; SIGTERM comes where the training does not end by itself."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        for name, text in (("svdtune", _TRAINER), ("runpodctl", _RUNPODCTL)):
            Path(folder, name).write_text(text)
            Path(folder, name).chmod(0o755)
        env = {"PATH": f"{folder}:{os.environ['PATH']}", "LOG": str(log), "ENDS": "1" * ends, "RUNPOD_POD_ID": "pod1"}
        process = subprocess.Popen(["bash", "-c", script], env=env, start_new_session=True)
        try:
            while not ends and not log.exists() and process.poll() is None:
                time.sleep(0.02)
            if not ends:
                process.send_signal(signal.SIGTERM)
            process.wait(120)
        finally:
            _end(process)
        return log.read_text().splitlines() if log.exists() else []


def _end(process: subprocess.Popen[bytes]) -> None:
    """A broken script leaves its training behind."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
