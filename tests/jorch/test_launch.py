"""What `jorch launch` would submit, judged by bash, shellcheck, and the schemas of Kubernetes and of JobSet."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from jorch.launch import kubernetes, slurm

ARGUMENTS = ["sft", "it's mine.yaml", "optimizer.learning_rate=1e-4", "--resume"]
ALLOCATION = {"name": "run-1", "nodes": 2, "gpus_per_node": 8, "time": "2-00:00:00"}
CLUSTER = {"name": "run-1", "image": "registry.example/jorch:1", "claim": "work"}


def closed(schema: Any) -> Any:
    """The schema under which an unknown field is an error, as kubectl's strict validation has it."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    inside = {key: closed(part) for key, part in schema.items()}
    known = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    return inside | {"additionalProperties": False} if known else inside


JOBSET = closed(json.loads(Path(__file__).with_name("jobset_schema.json").read_text()))


@pytest.mark.parametrize("partition", [None, "gpu"])
def test_the_sbatch_script_passes_bash_and_shellcheck(partition, tmp_path):
    path = tmp_path / "job.sh"
    path.write_text(slurm.script(ARGUMENTS, slurm.Allocation(**ALLOCATION, partition=partition)))
    subprocess.run(["bash", "-n", path], check=True)
    shellcheck = Path(sys.executable).with_name("shellcheck")
    checked = subprocess.run([shellcheck, path], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stdout) == (0, "")


def test_each_slurm_task_gets_its_place(tmp_path):
    """The script really run, with stand-ins for Slurm's two commands that do what theirs do on two nodes."""
    commands = {
        "scontrol": "printf 'node7\\nnode8\\n'",
        "srun": 'while [[ $1 == --* ]]; do shift; done; for i in 0 1; do SLURM_PROCID=$i SLURM_NTASKS=2 "$@"; done',
        "jorch": 'printf "%s\\n" "$@"',
    }
    for name, body in commands.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "node[7-8]"}
    text = slurm.script(ARGUMENTS, slurm.Allocation(**ALLOCATION))
    done = subprocess.run(["bash"], input=text, env=environment, capture_output=True, text=True, check=True)
    tasks = [[*ARGUMENTS, "--process", f"{rank}/2@node7:{slurm.COORDINATOR_PORT}"] for rank in (0, 1)]
    assert done.stdout.splitlines() == [word for task in tasks for word in task]


@pytest.mark.parametrize(
    ("changes", "hosts", "limits", "place"),
    [
        ({"hosts": 2}, 2, {"nvidia.com/gpu": 8}, "$JOB_COMPLETION_INDEX/2@run-1-workers-0-0.run-1:8476"),
        ({"tpu": "v5e:4x4"}, 4, {"google.com/tpu": 4}, "auto"),
        ({"tpu": "v5p:2x2x4"}, 4, {"google.com/tpu": 4}, "auto"),
    ],
)
def test_the_jobset_holds_a_valid_job_for_every_host(changes, hosts, limits, place):
    jobset = yaml.safe_load(kubernetes.manifest(ARGUMENTS, kubernetes.Cluster(**CLUSTER | changes)))
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = jobset["spec"]["replicatedJobs"]
    jsonschema.validate(jobset, JOBSET)
    # The validator does not know JobSet's own resource; the Job inside it is Kubernetes' own.
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "j"}, "spec": replicated["template"]["spec"]}
    kubernetes_validate.validate(job, "1.31", strict=True)
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == hosts
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == limits
    shell = container["command"]
    assert shell[:2] == ["bash", "-c"]
    assert shlex.split(shell[2]) == ["exec", "jorch", *ARGUMENTS, "--process", place]


def test_the_validators_see_a_misspelt_field():
    jobset = yaml.safe_load(kubernetes.manifest(ARGUMENTS, kubernetes.Cluster(**CLUSTER)))
    spec = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    spec["template"]["spec"]["restartPolicies"] = "Never"
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "j"}, "spec": spec}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, "1.31", strict=True)
    jobset["spec"]["network"]["enableDnsHostnames"] = True
    with pytest.raises(jsonschema.ValidationError, match="enableDnsHostnames"):
        jsonschema.validate(jobset, JOBSET)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"tpu": "v9:4x4"}, "--tpu 'v9:4x4': write KIND:TOPOLOGY, e.g. v5e:4x4; kinds: v5e, v5p, v6e"),
        ({"tpu": "v5e:1x1"}, "--tpu 'v5e:1x1': 1 chips are no whole number of hosts of 4"),
        ({"name": "Run_1"}, "--name 'Run_1': lower-case letters, digits and dashes only"),
    ],
)
def test_a_cluster_that_cannot_be_is_refused(changes, line):
    with pytest.raises(ValueError) as caught:
        kubernetes.Cluster(**CLUSTER | changes)
    assert str(caught.value) == line


def test_a_name_cannot_break_out_of_the_script():
    with pytest.raises(ValueError, match="--time '1; rm x': letters, digits and . _ : - only"):
        slurm.Allocation(**ALLOCATION | {"time": "1; rm x"})
