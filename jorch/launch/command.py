"""`jorch launch`: where to run, and with which command line."""

import argparse
from collections.abc import Callable

from jorch.launch import kubernetes, local, slurm


def run(options: argparse.Namespace) -> None:
    """Run or submit `jorch sft` or `jorch rl` with the same config, overrides and start.

    Or print what would be submitted.

    Raises ValueError for a mistake of the user, ChildProcessError where a process died.
    """
    arguments = _arguments(options)
    if options.local is not None:
        if options.dry_run:
            print(f"{options.local} processes of: jorch {' '.join(arguments)}")
        else:
            local.run(arguments, options.local)
    elif options.slurm:
        allocation = slurm.Allocation(
            options.name, options.hosts, options.gpus_per_host, options.time, options.partition
        )
        _hand_over(slurm.script(arguments, allocation), slurm.submit, options.dry_run)
    else:
        _hand_over(kubernetes.manifest(arguments, _cluster(options)), kubernetes.submit, options.dry_run)


def _arguments(options: argparse.Namespace) -> list[str]:
    start = [f"--{name}" for name in ("resume", "fresh") if getattr(options, name)]
    return [options.stage, *options.positionals, *start]


def _cluster(options: argparse.Namespace) -> kubernetes.Cluster:
    for key in ("image", "claim"):
        if getattr(options, key) is None:
            raise ValueError(f"--k8s needs --{key} (see `jorch launch --help`)")
    return kubernetes.Cluster(
        name=options.name,
        image=options.image,
        claim=options.claim,
        hosts=options.hosts,
        gpus_per_host=options.gpus_per_host,
        tpu=options.tpu,
        namespace=options.namespace,
    )


def _hand_over(text: str, submit: Callable[[str], None], dry_run: bool) -> None:
    if dry_run:
        print(text, end="")
    else:
        submit(text)
