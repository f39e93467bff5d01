"""Which path serves a request, and why: the only place that chooses."""

import contextlib
import functools
import logging
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args

import jax

from kernels.attention import pallas_mosaic_gpu, pallas_tpu, trial
from kernels.compat import Target

Implementation = Literal["auto", "reference", "xla_chunked", "cudnn", "pallas_tpu", "pallas_mosaic_gpu"]

SHORT_TOKENS = 256
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
    block_q: int
    block_k: int
    target: Target
    num_queries: int | None = None
    """Queries at hand where devices share rows; None = all of them."""


def refusal(implementation: Implementation, request: Request) -> str | None:
    """Why a path cannot serve a request; None where it can."""
    match implementation:
        case "reference" if request.num_queries is not None:
            return "it serves whole rows, and devices share these"
        case "cudnn":
            return _cudnn_refusal(request)
        case "pallas_tpu":
            return _pallas_tpu_refusal(request)
        case "pallas_mosaic_gpu":
            return _pallas_mosaic_gpu_refusal(request)
    return None


def _cudnn_refusal(request: Request) -> str | None:
    if request.target.backend != "gpu":
        return f"it needs an NVIDIA GPU and the backend is {request.target.backend}"
    if not request.causal:
        return 'it serves mask="causal" only, and the mask is an array'
    if request.window is not None or request.softcap is not None or request.return_lse:
        return "it serves no window, softcap or return_lse"
    if request.dtype not in ("bfloat16", "float16"):
        return f"it serves bfloat16 and float16, and the inputs are {request.dtype}"
    if request.head_dim % 8 or request.head_dim > 128:
        return f"it serves head dims that are multiples of 8 up to 128, and H={request.head_dim}"
    return None


def _pallas_tpu_refusal(request: Request) -> str | None:
    if request.target.backend != "tpu":
        return f"it needs a TPU and the backend is {request.target.backend}"
    if request.target.split:
        return _SPLIT
    if request.dtype == "float16":
        return "it serves float32 and bfloat16, and the inputs are float16"
    if request.head_dim % 64 or request.head_dim > 256:
        return f"it serves head dims of 64, 128, 192 and 256, and H={request.head_dim}"
    if request.block_q % 128 or request.block_k % 128:
        return f"its tiles are multiples of 128, and the mask's are {request.block_q} x {request.block_k}"
    visits = pallas_tpu.num_visits(request.num_tokens, request.block_q, request.block_k, request.num_queries)
    if visits > pallas_tpu.MOST_VISITS:
        return f"the row has {visits:,} tiles, and the list holds {pallas_tpu.MOST_VISITS:,}: tile with larger blocks"
    return None


def _pallas_mosaic_gpu_refusal(request: Request) -> str | None:
    if request.target.backend != "gpu" or not any(name in request.target.kind for name in _HOPPER):
        return f"it needs a Hopper GPU, as H100 and H200 are, and the device is {request.target.kind}"
    if request.target.split:
        return _SPLIT
    if request.dtype == "float32":
        return "it serves bfloat16 and float16, and the inputs are float32"
    if request.head_dim not in (64, 128):
        return f"it serves head dims of 64 and 128, and H={request.head_dim}"
    block = pallas_mosaic_gpu.BLOCK
    if (request.block_q, request.block_k) != (block, block):
        return f"its tiles are {block} x {block}, and the mask's are {request.block_q} x {request.block_k}"
    return None


_HOPPER = ("H100", "H200", "H20", "H800")

_SPLIT = "XLA may split the program over several devices, and a Pallas kernel must not be: call it inside jax.shard_map"


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
    if request.num_tokens <= SHORT_TOKENS and not refusal("reference", request):
        return "reference", f"rows of {request.num_tokens} tokens are at most one tile of {SHORT_TOKENS}"
    refused = ""
    for path, reason in _FAST[request.target.backend]:
        against = refusal(path, request) or _fault(path, request)
        if not against:
            return path, reason
        refused += f"; not {path}: {against}"
    return "xla_chunked", f"it skips invisible tiles on any device{refused}"


_TRIED: dict[str, Any] = {"pallas_tpu": pallas_tpu, "pallas_mosaic_gpu": pallas_mosaic_gpu}
"""Paths that `auto` only takes where they compute what the reference does: kernels of our own, close to the machine."""


def _fault(path: Implementation, request: Request) -> str | None:
    """What a trial on this device has against a path; nothing where the program is meant for another device."""
    if path not in _TRIED or request.target.kind != jax.local_devices()[0].device_kind:
        return None
    form = trial.Form(request.block_q, request.block_k, request.window is not None, request.num_queries is not None)
    return trial.fault(_TRIED[path], request.head_dim, request.dtype, request.softcap, form)


_FAST: dict[str, list[tuple[Implementation, str]]] = {
    "gpu": [
        ("cudnn", "plain causal rows on an NVIDIA GPU"),
        ("pallas_mosaic_gpu", "it reads active tiles only, on a Hopper GPU"),
    ],
    "tpu": [("pallas_tpu", "it visits active tiles only, on a TPU")],
    "cpu": [],
}
"""By device, what `auto` tries in this order before the path that serves everything, and why."""


_witnesses: list[list[str]] = []


@contextlib.contextmanager
def witnessed() -> Iterator[list[str]]:
    """What is chosen in the block, a line each, whether or not it was logged before."""
    lines: list[str] = []
    _witnesses.append(lines)
    try:
        yield lines
    finally:
        _witnesses.remove(lines)


def announce(implementation: str, reason: str) -> None:
    """One line in the log for each choice of a process."""
    for lines in _witnesses:
        lines.append(f"{implementation}: {reason}")
    log_once(implementation, reason)


@functools.cache
def log_once(implementation: str, reason: str) -> None:
    logging.getLogger(__name__).info("attention takes %s: %s", implementation, reason)
