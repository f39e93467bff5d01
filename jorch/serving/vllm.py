"""`jorch serve`: a real vLLM process for an exported folder, ready only once it computes what the trainer computes.

vLLM lives in a Python environment of its own and is never imported: an executable, its command line and HTTP are the
whole interface. The flags that matter, and why, are in `command`.
"""

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from jorch.config import ServeConfig
from jorch.export import heads, hf, probe
from jorch.metrics import stage
from jorch.serving import control, guard

EXECUTABLE_VARIABLE = "JORCH_VLLM"
"""Path of the `vllm` executable, where it is not on PATH."""

_WORKER = Path(__file__).parent / "worker"
_STOP_TIMEOUT_S = 30.0
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for --max-lora-rank."""
_LORA_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""All that jorch trains adapters of."""


@dataclass(frozen=True)
class ServeOptions:
    """What one server is started with."""

    folder: Path
    """As `jorch export` writes it."""
    executable: str | None = None
    """None: $JORCH_VLLM, or `vllm` on PATH."""
    host: str = "127.0.0.1"
    port: int = 0
    """0 = a free one."""
    dtype: str = "float32"
    max_context_tokens: int = 4096
    max_rows: int = 64
    """Requests decoded together."""
    kv_cache_bytes: int | None = None
    """None: vLLM's own choice on an accelerator, 256 MiB on a CPU."""
    rl: bool = False
    """The token endpoint and weight updates, which have no authentication of their own: loopback only."""
    lora_rank: int | None = None
    """Highest rank of an adapter, which is then the policy; the folder's own weights are called `control.BASE`."""
    start_timeout_s: float = 600.0
    further: Sequence[str] = ()
    """Further arguments of `vllm serve`."""

    def __post_init__(self) -> None:
        if self.rl and self.host not in ("127.0.0.1", "localhost", "::1"):
            raise ValueError(
                f"--rl opens weight updates, which ask for no password: --host must be 127.0.0.1, not {self.host}"
            )
        if self.lora_rank is not None and not self.rl:
            raise ValueError("--lora-rank is for adapters that a run pushes: it needs --rl")
        if self.lora_rank is not None and self.lora_rank > _LORA_RANKS[-1]:
            raise ValueError(f"--lora-rank {self.lora_rank}: vLLM takes adapters of rank {_LORA_RANKS[-1]} at most")

    @property
    def model(self) -> str:
        """The name of the folder's own weights."""
        return control.MODEL if self.lora_rank is None else control.BASE


def options(config: ServeConfig) -> ServeOptions:
    """Raises ValueError where the folder is no exported model."""
    folder = Path(config.folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"no config.json in {folder}: give a folder that `jorch export` wrote")
    return ServeOptions(
        folder,
        executable=config.vllm,
        host=config.host,
        port=config.port,
        dtype=config.dtype,
        max_context_tokens=config.max_context_tokens,
        max_rows=config.max_rows,
        kv_cache_bytes=config.kv_cache_bytes,
        rl=config.rl,
        lora_rank=config.lora_rank,
        start_timeout_s=config.start_timeout_s,
        further=config.vllm_options,
    )


def find_executable(given: str | None) -> str:
    """The `vllm` to run. Raises ValueError where there is none."""
    name = given or os.environ.get(EXECUTABLE_VARIABLE) or "vllm"
    found = shutil.which(name)
    if found is None:
        raise ValueError(
            f"no executable {name!r}: install vLLM in an environment of its own and pass --vllm PATH or set "
            f"{EXECUTABLE_VARIABLE}=PATH"
        )
    return found


def has_tokenizer(folder: Path) -> bool:
    """Whether vLLM can read the folder's tokenizer; without one it serves token ids only."""
    return (folder / "tokenizer.json").is_file()


def command(options: ServeOptions, port: int) -> list[str]:
    """The argument vector of `vllm serve`."""
    argv = [find_executable(options.executable), "serve", str(options.folder), "--served-model-name", options.model]
    argv += ["--host", options.host, "--port", str(port), "--dtype", options.dtype]
    argv += ["--max-model-len", str(options.max_context_tokens), "--max-num-seqs", str(options.max_rows)]
    # The folder's generation_config.json must not become the sampling defaults of requests that set none.
    argv += ["--generation-config", "vllm", "--disable-uvicorn-access-log"]
    if options.rl:
        # Log-probabilities of the distribution that was really drawn from, temperature included.
        argv += ["--logprobs-mode", "processed_logprobs", "--enable-scale-out"]
        argv += ["--worker-extension-cls", "jorch_vllm_worker.WorkerExtension"]
    if options.lora_rank is not None:
        rank = next(rank for rank in _LORA_RANKS if rank >= options.lora_rank)
        argv += ["--enable-lora", "--max-loras", "1", "--max-lora-rank", str(rank)]
        # Not the head: scoring a prompt beside other requests through an adapted one kills vLLM on CPUs.
        argv += ["--lora-target-modules", *_LORA_MODULES]
    if has_tokenizer(options.folder):
        argv += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    else:
        argv += ["--skip-tokenizer-init"]
    if on_cpu():
        # A seeded request that chunked prefill splits kills vLLM on CPUs; compilation costs more than it gives.
        batched = max(options.max_context_tokens, 4096)
        argv += ["--enforce-eager", "--no-enable-chunked-prefill", "--max-num-batched-tokens", str(batched)]
    kv_cache_bytes = options.kv_cache_bytes or (256 << 20 if on_cpu() else None)
    if kv_cache_bytes:
        argv += ["--kv-cache-memory-bytes", str(kv_cache_bytes)]
    return [*argv, *options.further]


def on_cpu() -> bool:
    return not any(Path("/dev").glob("nvidia[0-9]*")) and not any(Path("/dev").glob("accel*"))


def environment(options: ServeOptions) -> dict[str, str]:
    """Variables of the vLLM process: offline, and the worker extension importable."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    added = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    # Pools reuse connections that have been idle for longer than uvicorn's 5 s.
    added["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"] = "300"
    if options.rl:
        added |= {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": str(_WORKER)}
    if options.lora_rank is not None:
        added["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    return kept | added


@contextmanager
def vllm_server(options: ServeOptions, log: Path) -> Iterator[str]:
    """Start a server and give its url once it is healthy and scores the probe; stop it at exit.

    Raises ValueError where there is no vLLM, or where it does not compute the folder's model; RuntimeError, with the
    log's last line, where it does not start.
    """
    expected = probe.read(options.folder)
    head_dim = hf.load_config(options.folder).head_dim
    if on_cpu() and head_dim % heads.WIDTH:
        raise ValueError(
            f"{options.folder}: head_dim={head_dim}; vLLM's attention on CPUs takes multiples of {heads.WIDTH}: "
            "export the model with --widen-heads"
        )
    port = options.port or _free_port(options.host)
    argv = command(options, port)
    print(shlex.join(argv), flush=True)
    with log.open("ab") as log_file:
        child = subprocess.Popen(
            [sys.executable, "-P", guard.__file__, *argv],
            stdin=subprocess.PIPE,
            stdout=log_file,
            stderr=subprocess.STDOUT,
            env=environment(options),
            start_new_session=True,
        )
    url = f"http://{options.host}:{port}"
    try:
        _wait_until_healthy(child, url, options.start_timeout_s, log)
        if expected is not None:
            scored = control.score(url, expected, salt="start", tokens_only=options.rl, model=options.model)
            probe.check(expected, scored, options.dtype, f"vLLM at {url}")
        yield url
    finally:
        _stop(child)


def serve(options: ServeOptions, log: Path) -> None:
    """Serve until SIGTERM or Ctrl-C, or until vLLM dies (RuntimeError)."""
    with vllm_server(options, log) as url:
        print(f"ready: {url}/v1, model {options.model!r}; log: {log}", flush=True)
        signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        while control.is_healthy(url, timeout_s=30.0):
            time.sleep(2.0)
        raise RuntimeError(f"vLLM at {url} is gone: {_last_line(log)} (log: {log})")


def _wait_until_healthy(child: subprocess.Popen[bytes], url: str, timeout_s: float, log: Path) -> None:
    deadline_s = time.monotonic() + timeout_s
    with stage("starting vLLM"):
        while not control.is_healthy(url):
            if child.poll() is not None:
                raise RuntimeError(f"vLLM ended with status {child.returncode}: {_last_line(log)} (log: {log})")
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"vLLM was not ready within {timeout_s:g} s: {_last_line(log)} (log: {log})")
            time.sleep(0.25)


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    wanted = [line for line in lines if "Error" in line] or lines
    return wanted[-1].strip() if wanted else "no message"


def _stop(child: subprocess.Popen[bytes]) -> None:
    assert child.stdin is not None
    child.stdin.close()
    child.terminate()
    try:
        child.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _free_port(host: str) -> int:
    with socket.create_server((host, 0)) as listener:
        return listener.getsockname()[1]
