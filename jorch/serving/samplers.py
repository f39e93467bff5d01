"""The sampler that a config asks for: in this process, or vLLM servers, running ones or one of the run's own."""

import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from jorch.config import ModelConfig, RolloutConfig, SamplerConfig
from jorch.export import hf, pretrained
from jorch.export.heads import widen
from jorch.export.source import Held, Source
from jorch.rollout.jax_sampler import JaxSampler
from jorch.rollout.sampler import Sampler
from jorch.rollout.vllm_sampler import VllmSampler
from jorch.serving.push import push
from jorch.serving.vllm import ServeOptions, on_cpu, vllm_server


def make_sampler(
    config: SamplerConfig, rollout: RolloutConfig, start: pretrained.Pretrained, run_folder: Path
) -> Sampler:
    """Ready, with the starting weights. Raises as `vllm_server` where one is started, else SamplerDown."""
    if config.vllm is None:
        return JaxSampler(
            start.model,
            start.params,
            config,
            max_tokens=rollout.max_tokens_per_turn,
            stop_id=start.tokenizer.end_of_turn_id,
        )
    weights = Weights(start, Path(config.vllm.weights_dir or run_folder / "weights").absolute(), config.vllm.dtype)
    with ExitStack() as stack:
        urls = [url.rstrip("/") for url in config.vllm.urls]
        if not urls:
            options = ServeOptions(
                weights.write(start.params, 0),
                dtype=config.vllm.dtype,
                max_context_tokens=config.max_context_tokens,
                max_rows=config.max_rows,
                rl=True,
            )
            urls = [stack.enter_context(vllm_server(options, run_folder / "vllm.log"))]
        sampler = VllmSampler(config, urls, start.tokenizer.end_of_turn_id, weights.write, weights.push)
        if config.vllm.urls:
            sampler.publish(start.params, 0)  # whatever those servers were started with
        sampler.on_close = stack.pop_all().close
    return sampler


class Weights:
    """A folder that trainer and servers share: one export per policy version, the latest kept."""

    def __init__(self, start: pretrained.Pretrained, folder: Path, dtype: str) -> None:
        self._start = start
        self._folder = folder
        self._dtype = dtype

    def write(self, params: Any, version: int) -> Path:
        """Raises OSError naming the folder."""
        target = self._folder / f"v{version}"
        config: ModelConfig = self._start.model.config
        served: Source = Held(params)
        if on_cpu():
            config, served = widen(config, served)
        hf.write(target, config, served, self._start.tokenizer, {"policy_version": version})
        return target

    def push(self, folder: Path, version: int, urls: list[str]) -> dict[str, str]:
        """As `push.push`; older exports go once no server reads them any more."""
        problems = push(urls, folder, f"v{version}", self._dtype)
        for old in self._folder.glob("v*"):
            # A server compares new tensors with those of the folder that it was started from.
            if old.name != "v0" and int(old.name.removeprefix("v")) < version:
                shutil.rmtree(old, ignore_errors=True)
        return problems
