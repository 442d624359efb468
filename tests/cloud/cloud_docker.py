"""What is wrong with the `docker run` lines of the document, and with the image that they name."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import yaml
from cloud_doc import IMAGE, ROOT, TOOLS, blocks, commands, hidden_by, trainings

_FLAGS = TOOLS["docker run"]
_SECRET = re.compile(r"\w*(TOKEN|KEY|SECRET|PASSWORD)\w*=")
_GIBIBYTES = {"g": 1, "G": 1, "m": 1 / 1024, "M": 1 / 1024}
ENTRY_WORDS = ("train", "svdtune", "accelerate", "bash")


@dataclass
class Run:
    """A `docker run` line by docker's own grammar."""

    flags: dict[str, list[str]] = field(default_factory=dict)
    image: str = ""
    command: list[str] = field(default_factory=list)

    def one(self, flag: str) -> str:
        return self.flags.get(flag, [""])[-1]

    def volumes(self) -> dict[str, bool]:
        """Targets of the volumes, and whether they can be written."""
        parts = [volume.split(":") for volume in self.flags.get("volume", [])]
        return {part[1]: part[2:] != ["ro"] for part in parts if len(part) > 1}


def parse(words: list[str]) -> Run:
    """What follows `docker run`. Raises ValueError for a flag that docker does not know."""
    run, rest = Run(), list(words)
    while rest and rest[0].startswith("-"):
        name, equals, value = rest.pop(0).lstrip("-").partition("=")
        name = _FLAGS["short"].get(name, name)
        if name not in _FLAGS["switches"] + _FLAGS["values"]:
            raise ValueError(f"docker run has no --{name}")
        takes = name in _FLAGS["values"] and not equals
        run.flags.setdefault(name, []).append(rest.pop(0) if takes and rest else value)
    run.image, run.command = rest[0] if rest else "", rest[1:]
    return run


def runs(text: str) -> list[Run]:
    """All `docker run` lines of a script."""
    return [parse(words[2:]) for words in commands(text) if words[:2] == ["docker", "run"]]


def line_problems(run: Run, image: str) -> list[str]:
    """What a training needs of a `docker run` line and does not find."""
    problems = [f"image {run.image}, not {image}"] if run.image != image else []
    if run.command[:1] not in [[word] for word in ENTRY_WORDS]:
        problems.append(f"the image's entry does not take {run.command[:1]}")
    if "entrypoint" in run.flags or "privileged" in run.flags:
        problems.append("replaces the entrypoint or is privileged")
    problems += [f"--{flag} is missing" for flag in ("rm", "gpus", "user", "read-only") if flag not in run.flags]
    size = run.one("shm-size")
    if not size or float(size[:-1]) * _GIBIBYTES.get(size[-1], 0) < 8:
        problems.append("--shm-size is below 8g")
    if int(run.one("stop-timeout") or 10) < 60:
        problems.append("--stop-timeout is below 60 seconds")
    problems += [f"--env gives the value of {env}" for env in run.flags.get("env", []) if _SECRET.match(env)]
    if "HF_TOKEN" not in run.flags.get("env", []):
        problems.append("HF_TOKEN does not reach the container")
    return problems + _place_problems(run)


def _place_problems(run: Run) -> list[str]:
    """Are the folders of the training on volumes that last, and can they be written?"""
    volumes, (training, *_) = run.volumes(), trainings(" ".join(run.command)) or [None]
    if training is None:
        return ["starts no training"]
    problems = [] if "/tmp" in run.flags.get("tmpfs", []) else ["--read-only needs --tmpfs /tmp"]
    if volumes.get(training.option("data.root"), True):
        problems.append("data.root is not a read-only volume")
    for what, path in (("run.dir", training.option("run.dir")), ("HF_HOME", "/cache")):
        if not volumes.get(path, False):
            problems.append(f"{what} is not a volume that can be written")
    return problems + [f"a volume hides {folder}" for path in volumes for folder in hidden_by(path)]


def problems(doc: str) -> list[str]:
    """The sections `The image`, `docker run` and `compose`."""
    text = "\n".join(blocks(doc, "docker run", "bash"))
    try:
        found = runs(text)
    except ValueError as error:
        return [str(error)]
    told = [problem for run in found for problem in line_problems(run, "svdtune")]
    told += [] if len(found) == 1 else ["expected one docker run line"]
    made = [words for words in commands(text) if words[0] == "mkdir"]
    if made != [["mkdir", "-p", "runs", "cache"]]:
        told.append("docker would make the missing folders as root")
    return told + _image_problems(doc) + _compose_problems(doc)


def _image_problems(doc: str) -> list[str]:
    build, *rest = commands("\n".join(blocks(doc, "The image", "bash")))
    expected = [["docker", "tag", "svdtune", IMAGE], ["docker", "push", IMAGE]]
    told = [] if rest == expected else ["the pushed image is not the one that was built"]
    if build[:3] + build[4:] != ["docker", "build", "-f", "-t", "svdtune", "."] or build[3] != "docker/Dockerfile":
        told.append("docker build does not make svdtune from docker/Dockerfile")
    return told


def _compose_problems(doc: str) -> list[str]:
    """The command fits docker/compose.yaml, where everything else stands."""
    *_, words = commands("\n".join(blocks(doc, "compose", "bash")))
    path = ROOT / "docker/compose.yaml"
    file, services = path.read_text(), yaml.safe_load(path.read_text())["services"]
    before = words[: words.index("docker")]
    variables = [word.partition("=")[0] for word in before if "=" in word]
    told = [f"docker/compose.yaml reads no {name}" for name in variables if f"${{{name}:-" not in file]
    expected = ["docker", "compose", "-f", "docker/compose.yaml", "run", "--rm"]
    service = services.get(words[words.index("--rm") + 1], {}) if "--rm" in words else {}
    if words[len(before) :][: len(expected)] != expected or not service:
        return [*told, f"compose: expected {' '.join(expected)} and one of {list(services)}"]
    (training,) = trainings(" ".join(words))
    targets = [volume["target"] for volume in service["volumes"] if isinstance(volume, dict)]
    if not any(target.endswith(f"/{training.option('data.root').rstrip('/')}") for target in targets):
        told.append(f"data.root is none of {targets}")
    return told
