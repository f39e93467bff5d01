"""Kernels with a readable reference beside every fast path. Import the submodules; this file stays empty."""
