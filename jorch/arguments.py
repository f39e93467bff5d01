"""What the command line says: the command, its validated config, its options. Needs no jax.

`cli.main` calls `parse` first; the texts of `--help` come from here and, for the keys, from `config_help.py`.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any, NoReturn, get_args

from pydantic import BaseModel, ValidationError

import jorch
from jorch import config, config_help, config_io, sections

ABOUT = {
    "quickstart": "the whole loop on the miniature world, in minutes on a CPU",
    "sft": "behaviour cloning on demonstrations",
    "rl": "group-relative policy optimisation on multi-turn rollouts",
    "eval": "play tasks with a policy and report",
    "import": "read Hugging Face safetensors into a checkpoint",
    "export": "write a run's model as Hugging Face safetensors with its tokenizer",
    "plan": "bytes, FLOPs and fit of an sft or rl config on accelerators, before they are rented",
    "launch": "run `jorch sft` or `jorch rl` in several processes: on this machine, under Slurm, or on Kubernetes",
    "verify": "compare a checkpoint's logits with those of Hugging Face transformers",
    "tools-server": "serve tools, experts and environments over HTTP",
    "serve": "serve an exported model with vLLM, checked against the trainer's own numbers",
    "bench": "measure where the time of a training step goes, or the kernels",
}
_DTYPES = ("float32", "bfloat16")
_PARTS = {
    "kernels": ("causal", "packed", "shared-prompt", "logprob"),
    "serving": ("export", "push", "client", "async"),
}
"""Of a benchmark."""
RESUMABLE = ("sft", "rl", "launch")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see `{self.prog} --help`)")


def parse(argv: list[str]) -> tuple[str, Any, argparse.Namespace]:
    """Command, its validated config (None where it has none) and its options. Raises ValueError, one line."""
    top = _Parser(prog="jorch", description=_overview(), formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--version", action="version", version=jorch.__version__)
    top.add_argument("command", choices=ABOUT, metavar="COMMAND", help="one of the above")
    top.parse_args(argv[:1])
    command, rest = argv[0], argv[1:]
    if command == "serve":
        return command, *_parse_serve(rest)
    if command in ("import", "export", "verify", "bench"):
        options = _plain_parser(command).parse_args(rest)
        if command == "bench":
            options.only = _parts(options.what, options.only)
        return command, None, options
    model = _model(command)
    options = _config_parser(command, model).parse_intermixed_args(rest)
    path, overrides = _positionals(command, options)
    options.config = path
    if command in ("plan", "launch") and "tools_server" in config_io.read_mapping(path):
        model = config.RlConfig
    options.stage = "rl" if model is config.RlConfig else "sft"
    return command, config_io.load(path, model, overrides), options


def _overview() -> str:
    width = max(map(len, ABOUT))
    lines = [f"  {name:<{width}}  {about}" for name, about in ABOUT.items()]
    return "\n".join([jorch.__doc__ or "", "", *lines, "", "`jorch COMMAND --help` lists a command's keys."])


def _model(command: str) -> type[BaseModel]:
    if command == "tools-server":
        from tools_server.config import ServerConfig

        return ServerConfig
    models: dict[str, type[BaseModel]] = {
        "quickstart": config.QuickstartConfig,
        "sft": config.SftConfig,
        "launch": config.SftConfig,
        "plan": config.SftConfig,
        "rl": config.RlConfig,
        "eval": config.EvalConfig,
    }
    return models[command]


def _plain_parser(command: str) -> argparse.ArgumentParser:
    parser = _Parser(prog=f"jorch {command}", description=ABOUT[command], allow_abbrev=False)
    parser.set_defaults(dry_run=False)
    if command == "import":
        parser.add_argument(
            "--from", type=Path, required=True, dest="source", metavar="DIR", help="folder of a Qwen3 in safetensors"
        )
        parser.add_argument("--out", type=Path, required=True, metavar="CKPT", help="folder to write")
        parser.add_argument(
            "--dtype", type=_dtype, choices=_DTYPES, help="of the checkpoint's parameters (default: as stored)"
        )
    elif command == "export":
        parser.add_argument(
            "source", type=Path, metavar="CKPT", help="folder of a training run, or what `jorch import` wrote"
        )
        parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
        parser.add_argument("--step", type=int, metavar="N", help="which checkpoint of the run (default: the newest)")
        parser.add_argument(
            "--widen-heads", action="store_true", help="pad heads to a multiple of 32, as vLLM needs them on CPUs"
        )
        parser.add_argument(
            "--dtype", type=_dtype, choices=_DTYPES, help="of the exported parameters (default: as stored)"
        )
        lora = "of a run with lora: merged = added to its base (default); adapter = alone, in PEFT's format"
        parser.add_argument("--lora", choices=("merged", "adapter"), help=lora)
    elif command == "verify":
        parser.add_argument("source", type=Path, metavar="CKPT", help="what `jorch import` or `jorch export` wrote")
        parser.add_argument("--against", type=Path, required=True, metavar="DIR", help="Qwen3 in safetensors")
        parser.add_argument(
            "--python", metavar="PATH", help="interpreter with torch and transformers (default: jorch's own)"
        )
    else:
        what = (
            "loop: an RL step of the quickstart's model; kernels: attention and log-probabilities; "
            "checkpoint: saving and restoring 1.5 GB in the working folder, with OCDBT and without; train: a train "
            "step in the shape of Qwen3-8B (small on a CPU), beside the same with jax.nn.dot_product_attention; "
            "sampler: decoding of siblings whose prompt is kept once; "
            "serving: exports, weight pushes and the rollout client with vLLM, and asynchronous training"
        )
        parser.add_argument("what", choices=["loop", "kernels", "checkpoint", "train", "sampler", "serving"], help=what)
        parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there as well")
        parser.add_argument(
            "--tokens",
            type=_row_tokens,
            nargs="+",
            metavar="N",
            help="lengths of rows, in tokens; default for kernels 1024 2048 on a CPU, else 4096 to 131072; for train "
            "512 on a CPU, else 8192 32768",
        )
        layers = "train: of the 36 (default: 2 on a CPU, else 4, and with --lora all)"
        parser.add_argument("--layers", type=_positive, metavar="L", help=layers)
        only = "; ".join(f"{name}: {', '.join(parts)}" for name, parts in _PARTS.items())
        parser.add_argument("--only", nargs="+", metavar="PART", help=f"parts to measure (default: all). {only}")
        parser.add_argument("--lora", action="store_true", help="train: an adapter of rank 16 on frozen weights")
        remat = "train: what the backward pass recomputes (default: full)"
        parser.add_argument("--remat", choices=get_args(sections.Remat), default="full", help=remat)
    return parser


def _parse_serve(words: list[str]) -> tuple[config.ServeConfig, argparse.Namespace]:
    """Options go before the file's keys; what follows `--` is vLLM's own, behind the file's."""
    cut = words.index("--") if "--" in words else len(words)
    parser = _Parser(
        prog="jorch serve",
        usage="jorch serve DIR|CONFIG.yaml [options] [-- VLLM_OPTION ...]",
        description=f"{ABOUT['serve']}. Options after -- go to `vllm serve` as they are.",
        epilog=f"keys of the config:\n{_keys(config.ServeConfig)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="DIR|CONFIG.yaml", help="exported model, or a file with the keys below")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and stop")
    kinds: dict[str, dict[str, Any]] = {
        "rl": {"action": "store_true"},
        "dtype": {"type": _dtype, "choices": _DTYPES},
        **{key: {"type": int} for key in ("port", "max_context_tokens", "max_rows", "kv_cache_bytes", "lora_rank")},
        "start_timeout_s": {"type": float, "metavar": "S"},
        **{key: {} for key in ("vllm", "host", "log")},
    }
    for key, kind in kinds.items():
        flag = f"--{key.removesuffix('_s').replace('_', '-')}"
        about = f"key {key}: {config.ServeConfig.model_fields[key].description}"
        parser.add_argument(flag, dest=key, default=argparse.SUPPRESS, help=about, **kind)
    options = parser.parse_args(words[:cut])
    given = {key: getattr(options, key) for key in kinds if hasattr(options, key)}
    return _serve_config(options.source, given, words[cut + 1 :]), options


def _serve_config(source: str, given: dict[str, Any], further: list[str]) -> config.ServeConfig:
    if source.endswith((".yaml", ".yml")):
        overrides = [f"{key}={json.dumps(value)}" for key, value in given.items()]
        loaded = config_io.load(source, config.ServeConfig, overrides)
    else:
        try:
            loaded = config.ServeConfig(folder=source, **given)
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"command line: {first['loc'][0]}={first['input']!r}: {first['msg']}") from None
    return loaded.model_copy(update={"vllm_options": (*loaded.vllm_options, *further)})


def _dtype(text: str) -> str:
    return {"f32": "float32", "bf16": "bfloat16"}.get(text, text)


def _parts(benchmark: str, named: list[str] | None) -> tuple[str, ...]:
    """Which parts of a benchmark to measure."""
    parts = _PARTS.get(benchmark, ())
    for name in named or ():
        if name not in parts:
            raise ValueError(
                f"argument --only: {benchmark} has no part {name!r}; it has {', '.join(parts) or 'none'} "
                "(see `jorch bench --help`)"
            )
    return tuple(named or parts)


def _row_tokens(text: str) -> int:
    if not text.isdecimal() or int(text) < 64:
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: whole numbers from 64 tokens")
    return int(text)


def _config_parser(command: str, model: type[BaseModel]) -> argparse.ArgumentParser:
    overrides = "[options]" if command == "tools-server" else "[KEY=VALUE ...] [options]"
    path = "[CONFIG.yaml]" if command == "quickstart" else "CONFIG.yaml"
    parser = _Parser(
        prog=f"jorch {command}",
        usage=f"jorch {command} {path} {overrides}",
        description=ABOUT[command],
        epilog=f"keys of the config:\n{_keys(model)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("positionals", nargs="*", metavar="CONFIG.yaml KEY=VALUE", help="see the keys below")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and stop")
    if command == "tools-server":
        parser.add_argument("--host", help="address to listen on; before the config's")
        parser.add_argument("--port", type=int, help="port to listen on, 0 = a free one; before the config's")
    if command == "plan":
        _add_plan_options(parser)
    elif command != "tools-server":
        start = parser.add_mutually_exclusive_group()
        start.add_argument("--fresh", action="store_true", help="remove the run in the run folder first")
    if command in RESUMABLE:
        start.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    if command in ("sft", "rl"):
        place = "which of several processes this is: RANK/COUNT@HOST:PORT, or auto (`jorch launch` sets it)"
        parser.add_argument("--process", metavar="PLACE", help=place)
    if command == "launch":
        _add_launch_options(parser)
    if command == "eval":
        parser.add_argument(
            "--endpoint",
            metavar="URL",
            help="an OpenAI-compatible model plays (key endpoint.url), such as vLLM's .../v1",
        )
    if command == "quickstart":
        parser.add_argument("--out", metavar="DIR", help="run folder (key out)")
        parser.add_argument("--seed", type=int, metavar="N", help="of every random choice (key seed)")
        parser.add_argument("--from-scratch", action="store_true", help="train the base first")
        parser.add_argument("--sampler", choices=("jax", "vllm"), help="who samples: this process, or a vLLM server")
    return parser


def _add_plan_options(parser: argparse.ArgumentParser) -> None:
    shapes = "v5e:4x4, v5p:2x2x4, h100:8, cpu:8, ..."
    parser.add_argument("--topology", required=True, metavar="KIND:SHAPE", help=shapes)
    kinds = "dense: scores of all pairs exist; tiled: never (default: tiled)"
    parser.add_argument("--attention", choices=["dense", "tiled"], default="tiled", help=kinds)
    parser.add_argument("--no-compile", action="store_true", help="analytical figures only, in seconds")
    parser.add_argument("--json", action="store_true", help="one JSON object, bytes and FLOPs")


def _add_launch_options(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--local", type=_positive, metavar="N", help="N processes on this machine's CPU")
    where.add_argument("--slurm", action="store_true", help="submit an sbatch script: one process a node")
    where.add_argument("--k8s", action="store_true", help="submit a JobSet: one process a host")
    parser.add_argument("--name", default="jorch", help="of the job (default: jorch)")
    parser.add_argument("--hosts", type=_positive, default=1, metavar="N", help="nodes with GPUs (default: 1)")
    parser.add_argument("--gpus-per-host", type=_positive, default=8, metavar="N", help="(default: 8)")
    parser.add_argument(
        "--time", default="1-00:00:00", help="Slurm: limit, days-hours:minutes:seconds (default: a day)"
    )
    parser.add_argument("--partition", help="Slurm: partition (default: the cluster's)")
    parser.add_argument(
        "--tpu", metavar="KIND:TOPOLOGY", help="Kubernetes: a TPU slice such as v5e:4x4 (default: GPUs)"
    )
    parser.add_argument("--image", help="Kubernetes: container image with jorch (required)")
    parser.add_argument("--claim", help="Kubernetes: volume claim with config, data and run folder (required)")
    parser.add_argument("--namespace", default="default", help="Kubernetes: (default: default)")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def _keys(model: type[BaseModel]) -> str:
    return config_help.describe(model, min(shutil.get_terminal_size().columns, 110) - 2)


def _positionals(command: str, options: argparse.Namespace) -> tuple[Path, list[str]]:
    """The config's path and the overrides, last those that options such as `--out` stand for."""
    path, overrides = None, list(options.positionals)
    if overrides and (command != "quickstart" or "=" not in overrides[0]):
        path = Path(overrides.pop(0))
    if command == "quickstart":
        path = path or config_io.configs_dir() / "quickstart.yaml"
    if path is None:
        raise ValueError(f"no config: write `jorch {command} CONFIG.yaml`; examples are in {config_io.configs_dir()}")
    if overrides and command == "tools-server":
        raise ValueError(f"got '{overrides[0]}'; only --host and --port can be set outside of {path}")
    if getattr(options, "sampler", None) == "vllm":
        overrides.append("rl.sampler.vllm={}")
    if getattr(options, "endpoint", None):
        overrides.append(f"endpoint.url={json.dumps(options.endpoint)}")
    for key in ("out", "seed", "host", "port"):
        value = getattr(options, key, None)
        if value is not None:
            overrides.append(f"{key}={json.dumps(value)}")
    return path, overrides
