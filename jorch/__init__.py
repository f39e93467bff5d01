"""jorch: train small language models that orchestrate tools and bigger models, in JAX."""

__version__ = "0.1.0"
