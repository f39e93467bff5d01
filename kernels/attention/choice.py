"""Which path serves a request, and why: the only place that chooses."""

import functools
import logging
from typing import Literal, NamedTuple, get_args

from kernels.attention.tiles import BLOCK_K

Implementation = Literal["auto", "reference", "xla_chunked", "cudnn"]

SHORT_TOKENS = BLOCK_K
"""Up to one tile there is nothing to skip, and dense scores are small."""


class Request(NamedTuple):
    """What a path must serve; everything is known when a function is traced."""

    num_tokens: int
    head_dim: int
    dtype: str
    causal: bool
    """The mask is "causal", known without looking at an array."""
    window: int | None
    softcap: float | None
    return_lse: bool
    backend: str
    """As `jax.default_backend()`: "cpu", "gpu" or "tpu"."""


def refusal(implementation: Implementation, request: Request) -> str | None:
    """Why a path cannot serve a request; None where it can."""
    if implementation != "cudnn":
        return None
    if request.backend != "gpu":
        return f"it needs an NVIDIA GPU and the backend is {request.backend}"
    if not request.causal:
        return 'it serves mask="causal" only, and the mask is an array'
    if request.window is not None or request.softcap is not None or request.return_lse:
        return "it serves no window, softcap or return_lse"
    if request.dtype not in ("bfloat16", "float16"):
        return f"it serves bfloat16 and float16, and the inputs are {request.dtype}"
    if request.head_dim % 8 or request.head_dim > 128:
        return f"it serves head dims that are multiples of 8 up to 128, and H={request.head_dim}"
    return None


def choose(implementation: Implementation, request: Request) -> tuple[Implementation, str]:
    """The path that serves a request, and the reason.

    Raises:
        ValueError: an unknown name, or an explicit path that cannot serve the request.
    """
    allowed = get_args(Implementation)
    if implementation not in allowed:
        raise ValueError(f"implementation={implementation!r}; allowed: {', '.join(map(repr, allowed))}")
    if implementation != "auto":
        reason = refusal(implementation, request)
        if reason:
            raise ValueError(f"implementation={implementation!r} cannot serve this: {reason}")
        return implementation, "asked for"
    if request.num_tokens <= SHORT_TOKENS:
        return "reference", f"rows of {request.num_tokens} tokens are at most one tile of {SHORT_TOKENS}"
    reason = refusal("cudnn", request)
    if not reason:
        return "cudnn", "plain causal rows on an NVIDIA GPU"
    return "xla_chunked", f"it skips invisible tiles on any device; not cudnn: {reason}"


@functools.cache
def log_once(implementation: str, reason: str) -> None:
    """One line for each choice of a process."""
    logging.getLogger(__name__).info("attention takes %s: %s", implementation, reason)
