"""An sbatch script that runs one process per node under srun, and its submission."""

import re
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

COORDINATOR_PORT = 8476

_TEMPLATE = """\
#!/usr/bin/env bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={gpus_per_node}
#SBATCH --time={time}
#SBATCH --output={name}-%j.log
{partition}set -euo pipefail

# The first node of the allocation holds process 0, which the others look for.
coordinator=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
export coordinator

# A process that dies takes the job with it; Slurm's log names its task. SLURM_* are each task's own: single quotes.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 --label bash -c \\
    'exec "$@" --process "$SLURM_PROCID/$SLURM_NTASKS@$coordinator:{port}"' \\
    bash {command}
"""


@dataclass(frozen=True)
class Allocation:
    """What to ask Slurm for; `time` as sbatch takes it, e.g. 2-00:00:00."""

    name: str
    nodes: int
    gpus_per_node: int
    time: str
    partition: str | None = None

    def __post_init__(self) -> None:
        for key in ("name", "time", "partition"):
            value = getattr(self, key)
            if value is not None and not re.fullmatch(r"[A-Za-z0-9._:-]+", value):
                raise ValueError(f"--{key} {value!r}: letters, digits and . _ : - only")


def script(arguments: Sequence[str], allocation: Allocation) -> str:
    """The sbatch script for `jorch ARGUMENTS`."""
    return _TEMPLATE.format(
        name=allocation.name,
        nodes=allocation.nodes,
        gpus_per_node=allocation.gpus_per_node,
        time=allocation.time,
        partition=f"#SBATCH --partition={allocation.partition}\n" if allocation.partition else "",
        port=COORDINATOR_PORT,
        command=shlex.join(["jorch", *arguments]),
    )


def submit(text: str) -> None:
    """Hand the script to sbatch. Raises ValueError where there is none or it refuses."""
    try:
        done = subprocess.run(["sbatch"], input=text, text=True, capture_output=True, check=False)
    except FileNotFoundError:
        raise ValueError("sbatch is not installed here: run this on a login node, or add --dry-run") from None
    if done.returncode:
        raise ValueError(f"sbatch refused the script: {' '.join(done.stderr.split())}")
    print(done.stdout, end="")
