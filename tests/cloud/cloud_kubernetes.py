"""What is wrong with the manifests of the document."""

from __future__ import annotations

from typing import Any

import kubernetes_validate
import yaml
from cloud_doc import IMAGE, blocks, commands, trainings

_VERSION = "1.31"
"""The first release in which podFailurePolicy is stable."""


def problems(doc: str) -> list[str]:
    """By Kubernetes' own schema, then by what a training needs."""
    manifests = [part for text in blocks(doc, "Kubernetes", "yaml") for part in yaml.safe_load_all(text)]
    told = []
    for manifest in manifests:
        try:
            kubernetes_validate.validate(manifest, _VERSION, strict=True)
        except kubernetes_validate.ValidationError as error:
            told.append(f"{manifest['kind']}: {error.message}")
    if told:
        return told
    claim, upload, job = manifests
    pod = job["spec"]["template"]["spec"]
    return [
        *_job_problems(job["spec"], pod),
        *_container_problems(pod["containers"][0]),
        *_mount_problems(pod, claim["metadata"]["name"]),
        *_upload_problems(upload, pod),
        *_command_problems("\n".join(blocks(doc, "Kubernetes", "bash")), pod["containers"][0]),
    ]


def _job_problems(spec: dict[str, Any], pod: dict[str, Any]) -> list[str]:
    name = pod["containers"][0]["name"]
    told = [] if spec.get("backoffLimit", 6) >= 1 else ["backoffLimit leaves no second try for code 1"]
    for code, expected in ((2, "FailJob"), (3, "FailJob"), (4, "FailJob"), (143, "Ignore"), (1, "Count")):
        if (action := _action(spec["podFailurePolicy"]["rules"], name, code)) != expected:
            told.append(f"exit code {code}: {action}, expected {expected}")
    conditions = [
        (rule["action"], on["type"])
        for rule in spec["podFailurePolicy"]["rules"]
        for on in rule.get("onPodConditions", [])
    ]
    if conditions != [("Ignore", "DisruptionTarget")]:
        told.append("an evicted pod counts as a failure")
    if pod.get("restartPolicy") != "Never":
        told.append("podFailurePolicy needs restartPolicy Never")
    if pod.get("terminationGracePeriodSeconds", 30) < 60:
        told.append("terminationGracePeriodSeconds is below 60")
    return told


def _action(rules: list[dict[str, Any]], container: str, code: int) -> str:
    """What the Job controller does: the first rule that fits, else the default."""
    for rule in rules:
        on = rule.get("onExitCodes")
        if (
            on
            and on.get("containerName", container) == container
            and (code in on["values"]) == (on["operator"] == "In")
        ):
            return rule["action"]
    return "Count"


def _container_problems(container: dict[str, Any]) -> list[str]:
    limits, env = container["resources"]["limits"], {entry["name"]: entry for entry in container["env"]}
    security = container.get("securityContext", {})
    checks = {
        "the image is not the pushed one": container["image"] == IMAGE,
        "a command replaces the entrypoint": "command" not in container,
        "the image's entry takes `train` first": container.get("args", [""])[0] == "train",
        "no GPU": int(limits.get("nvidia.com/gpu", 0)) >= 1,
        "the root is writable": security.get("readOnlyRootFilesystem") is True,
        "privilege escalation is allowed": security.get("allowPrivilegeEscalation") is False,
        "capabilities are kept": security.get("capabilities") == {"drop": ["ALL"]},
        "HF_TOKEN is not from a secret": "secretKeyRef" in env.get("HF_TOKEN", {}).get("valueFrom", {}),
    }
    return [problem for problem, sound in checks.items() if not sound]


def _mount_problems(pod: dict[str, Any], claim: str) -> list[str]:
    container = pod["containers"][0]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    told = [f"no volume {mount['name']}" for mount in container["volumeMounts"] if mount["name"] not in volumes]
    if told:
        return told
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    (training,) = trainings(" ".join(container["args"]))
    lasting = {path for path, mount in mounts.items() if "persistentVolumeClaim" in volumes[mount["name"]]}
    writable = {path for path, mount in mounts.items() if not mount.get("readOnly")}
    shm = volumes[mounts["/dev/shm"]["name"]].get("emptyDir", {}) if "/dev/shm" in mounts else {}
    claims = {
        volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume
    }
    checks = {
        "data.root is not a read-only mount": training.option("data.root") in lasting - writable,
        "run.dir is not a lasting, writable mount": training.option("run.dir") in lasting & writable,
        "the hub's cache is not writable": "/cache" in writable,
        "/tmp is not writable": "/tmp" in writable,
        "/dev/shm is not 8Gi of memory": (shm.get("medium"), shm.get("sizeLimit")) == ("Memory", "8Gi"),
        "another claim than storage.yaml makes": claims == {claim},
    }
    return [problem for problem, sound in checks.items() if not sound]


def _upload_problems(upload: dict[str, Any], pod: dict[str, Any]) -> list[str]:
    """The pod that takes the clips there makes the folders that the Job mounts, as the user of the Job."""
    container = upload["spec"]["containers"][0]
    root = container["volumeMounts"][0]["mountPath"]
    needed = {f"{root}/{mount['subPath']}" for mount in pod["containers"][0]["volumeMounts"] if "subPath" in mount}
    told = [f"{path} is not made" for path in sorted(needed) if path not in container["command"][-1].split()]
    user = {key: pod["securityContext"].get(key) for key in ("runAsUser", "runAsGroup", "fsGroup")}
    if upload["spec"]["securityContext"] != user or not user["runAsUser"]:
        told.append("upload and training are different users")
    return told + ([] if pod["securityContext"].get("runAsNonRoot") else ["the training may run as root"])


def _command_problems(text: str, container: dict[str, Any]) -> list[str]:
    lines = [" ".join(words) for words in commands(text)]
    secret = container["env"][0].get("valueFrom", {}).get("secretKeyRef", {"name": None, "key": None})
    expected = {
        f"kubectl create secret generic {secret['name']} --from-literal={secret['key']}=${secret['key']}": "the secret",
        "kubectl cp clips upload:/data": "the clips",
        "kubectl delete pod upload": "the claim, which one node holds at a time,",
        "kubectl apply -f job.yaml": "the Job",
    }
    places = [lines.index(line) if line in lines else -1 for line in expected]
    told = [f"{what} is not there in time" for what, at in zip(expected.values(), places, strict=True) if at < 0]
    return told or ([] if places == sorted(places) else ["the commands are in another order"])
