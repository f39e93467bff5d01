"""`jorch launch`: one run in several processes, here, under Slurm or on Kubernetes. Needs no jax."""
