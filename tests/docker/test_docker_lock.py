"""The lock of the image: all of the project's dependencies, versions of constraints.txt, a hash for each file."""

import re
import runpy
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
IMAGE = {"python_version": "3.12", "sys_platform": "linux", "platform_machine": "x86_64", "extra": ""}
for_cpu = runpy.run_path(str(ROOT / "docker/cpu_lock.py"))["for_cpu"]


def locked(text: str) -> dict[str, tuple[str, list[str]]]:
    """Version and hashes of each package."""
    found = {}
    for entry in re.split(r"\n(?=\S)", re.sub(r"(?m)^#.*\n", "", text)):
        pin, *hashes = entry.split()
        name, version = pin.split("==")
        found[canonicalize_name(name)] = version, [word for word in hashes if word != "\\"]
    return found


def lock(name: str) -> dict[str, tuple[str, list[str]]]:
    return locked((ROOT / "docker" / name).read_text())


def constraints() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pins = [Requirement(line) for line in lines]
    return {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def in_image(texts: list[str]) -> list[Requirement]:
    """Those of the requirements that count on the image's Python and system."""
    asked = [Requirement(text) for text in texts]
    return [one for one in asked if one.marker is None or one.marker.evaluate(IMAGE)]


@pytest.mark.parametrize("name", ["requirements.lock", "xformers.lock"])
def test_every_package_has_hashes(name):
    for package, (_, hashes) in lock(name).items():
        assert hashes, package
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", word) for word in hashes), package


def test_lock_has_every_dependency():
    versions = lock("requirements.lock")
    for requirement in in_image([*project()["dependencies"], *project()["optional-dependencies"]["tensorboard"]]):
        version, _ = versions[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), requirement


def test_xformers_lock_has_what_the_extra_asks_for():
    versions = lock("xformers.lock")
    for requirement in in_image(project()["optional-dependencies"]["xformers"]):
        assert requirement.specifier.contains(versions[requirement.name][0])


def test_versions_are_the_tested_ones():
    """Whatever the lock has beyond constraints.txt is what torch's CUDA build brings."""
    pins = constraints()
    beyond = set()
    for package, (version, _) in lock("requirements.lock").items():
        if package in pins:
            assert version == pins[package], f"{package}: run scripts/lock_image"
        else:
            beyond.add(package)
    others = {package for package in beyond if not package.startswith(("nvidia-", "cuda-"))}
    assert others == {"triton", "setuptools"}


def test_cpu_lock_changes_torch_alone():
    text = (ROOT / "docker/requirements.lock").read_text()
    cpu, gpu = locked(for_cpu(text, "2.13.0+cpu", "0" * 64)), locked(text)
    assert cpu.pop("torch") == ("2.13.0+cpu", [f"--hash=sha256:{'0' * 64}"])
    gone = {package for package in gpu if package not in cpu}
    assert {"torch", "triton", "nvidia-cublas", "cuda-toolkit"} <= gone
    assert all(re.match(r"torch$|triton$|nvidia-|cuda-", package) for package in gone)
    assert all(gpu[package] == cpu[package] for package in cpu)
