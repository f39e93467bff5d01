"""A JobSet manifest (jobset.x-k8s.io/v1alpha2) for hosts with GPUs or for one TPU slice, and its submission."""

import math
import re
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

COORDINATOR_PORT = 8476
_JOB = "workers"

_TPU_NODES = {"v5e": "tpu-v5-lite-podslice", "v5p": "tpu-v5p-slice", "v6e": "tpu-v6e-slice"}
"""Our name -> GKE's node label."""
_TPU_CHIPS_PER_HOST = 4  # of every slice that spans several hosts


@dataclass(frozen=True)
class Cluster:
    """What to ask Kubernetes for: `hosts` with `gpus_per_host` each, or a TPU slice such as "v5e:4x4"."""

    name: str
    image: str
    claim: str
    """PersistentVolumeClaim that all hosts can write to, mounted as the working directory /work."""
    hosts: int = 1
    gpus_per_host: int = 8
    tpu: str | None = None
    namespace: str = "default"

    def __post_init__(self) -> None:
        for key in ("name", "claim", "namespace"):
            if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,40}[a-z0-9])?", getattr(self, key)):
                raise ValueError(f"--{key} {getattr(self, key)!r}: lower-case letters, digits and dashes only")
        if self.tpu is not None:
            _tpu_slice(self.tpu)


def _tpu_slice(text: str) -> tuple[str, str, int]:
    """(node label, topology, chips) of "v5e:4x4"."""
    kind, _, topology = text.partition(":")
    if kind not in _TPU_NODES or not re.fullmatch(r"\d+x\d+(x\d+)?", topology):
        raise ValueError(f"--tpu {text!r}: write KIND:TOPOLOGY, e.g. v5e:4x4; kinds: {', '.join(_TPU_NODES)}")
    chips = math.prod(map(int, topology.split("x")))
    if chips < _TPU_CHIPS_PER_HOST or chips % _TPU_CHIPS_PER_HOST:
        raise ValueError(f"--tpu {text!r}: {chips} chips are no whole number of hosts of {_TPU_CHIPS_PER_HOST}")
    return _TPU_NODES[kind], topology, chips


def manifest(arguments: Sequence[str], cluster: Cluster) -> str:
    """The JobSet for `jorch ARGUMENTS`, as YAML."""
    hosts, resource, devices, selector, place = _hardware(cluster)
    # exec: the container's first process is jorch, so that Kubernetes' signals reach it.
    command = f'exec {shlex.join(["jorch", *arguments])} --process "{place}"'
    container: dict[str, Any] = {
        "name": "jorch",
        "image": cluster.image,
        "workingDir": "/work",
        "command": ["bash", "-c", command],
        "ports": [{"containerPort": COORDINATOR_PORT}],
        "resources": {"limits": {resource: devices}},
        "volumeMounts": [{"name": "work", "mountPath": "/work"}, {"name": "shm", "mountPath": "/dev/shm"}],
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "containers": [container],
        "volumes": [
            {"name": "work", "persistentVolumeClaim": {"claimName": cluster.claim}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},  # NCCL's own needs more than the default 64 MiB
        ],
    }
    if selector:
        pod["nodeSelector"] = selector
    # A slice is one node pool, which no other Job may share.
    exclusive = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    annotations = {"annotations": exclusive} if selector else {}
    job = {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,  # one dead process fails the job, whose other pods then end
        "template": {"spec": pod},
    }
    return yaml.safe_dump(
        {
            "apiVersion": "jobset.x-k8s.io/v1alpha2",
            "kind": "JobSet",
            "metadata": {"name": cluster.name, "namespace": cluster.namespace} | annotations,
            "spec": {
                "network": {"enableDNSHostnames": True, "subdomain": cluster.name},
                "failurePolicy": {"maxRestarts": 0},
                "replicatedJobs": [{"name": _JOB, "replicas": 1, "template": {"spec": job}}],
            },
        },
        sort_keys=False,
        width=110,
    )


def _hardware(cluster: Cluster) -> tuple[int, str, int, dict[str, str], str]:
    """(hosts, resource, devices per host, node selector, `--process`)."""
    if cluster.tpu is None:
        first = f"{cluster.name}-{_JOB}-0-0.{cluster.name}"
        place = f"$JOB_COMPLETION_INDEX/{cluster.hosts}@{first}:{COORDINATOR_PORT}"
        return cluster.hosts, "nvidia.com/gpu", cluster.gpus_per_host, {}, place
    label, topology, chips = _tpu_slice(cluster.tpu)
    selector = {"cloud.google.com/gke-tpu-accelerator": label, "cloud.google.com/gke-tpu-topology": topology}
    # The order of a slice's hosts is the TPU runtime's to say.
    return chips // _TPU_CHIPS_PER_HOST, "google.com/tpu", _TPU_CHIPS_PER_HOST, selector, "auto"


def submit(text: str) -> None:
    """Hand the manifest to kubectl. Raises ValueError where there is none or it refuses."""
    try:
        done = subprocess.run(["kubectl", "create", "-f", "-"], input=text, text=True, capture_output=True, check=False)
    except FileNotFoundError:
        raise ValueError("kubectl is not installed here: install it, or add --dry-run") from None
    if done.returncode:
        raise ValueError(f"kubectl refused the manifest: {' '.join(done.stderr.split())}")
    print(done.stdout, end="")
