"""The sampler that a config asks for: in this process, or vLLM servers, running ones or one of the run's own."""

import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from jorch.export import hf, pretrained
from jorch.export.heads import widen
from jorch.export.source import Held, Source
from jorch.rollout.jax_sampler import JaxSampler
from jorch.rollout.sampler import Sampler
from jorch.rollout.vllm_sampler import VllmSampler
from jorch.sections import MeshConfig, ModelConfig, RolloutConfig, SamplerConfig
from jorch.serving.push import push
from jorch.serving.vllm import ServeOptions, on_cpu, vllm_server
from jorch.sharding import make_mesh


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
    weights = Weights(start.without_params(), weights_folder(config, run_folder), config)
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


def weights_folder(config: SamplerConfig, run_folder: Path) -> Path:
    given = config.vllm and config.vllm.weights_dir
    return Path(given or run_folder / "weights").absolute()


class Weights:
    """A folder that trainer and samplers share: one export per policy version, the latest kept."""

    def __init__(self, start: pretrained.Pretrained, folder: Path, config: SamplerConfig) -> None:
        self._start = start
        self._folder = folder
        self._vllm = config.vllm

    def write(self, params: Any, version: int) -> Path:
        """Raises OSError naming the folder."""
        target = self._folder / f"v{version}"
        config: ModelConfig = self._start.model.config
        served: Source = Held(params)
        if self._vllm and on_cpu():
            config, served = widen(config, served)
        hf.write(target, config, served, self._start.tokenizer, {"policy_version": version})
        return target

    def load(self, folder: Path, version: int, sampler: Sampler) -> None:
        """Sample from what another process wrote into `folder`. Raises as the sampler's `publish`."""
        if isinstance(sampler, VllmSampler):
            sampler.publish_folder(folder, version)
        else:
            sampler.publish(hf.load(folder, self._start.model, make_mesh(MeshConfig())), version)
            self._remove_before(version)

    def push(self, folder: Path, version: int, urls: list[str]) -> dict[str, str]:
        """As `push.push`; older exports go once no server reads them any more."""
        assert self._vllm is not None
        problems = push(urls, folder, f"v{version}", self._vllm.dtype)
        self._remove_before(version)
        return problems

    def _remove_before(self, version: int) -> None:
        for old in self._folder.glob("v*"):
            # A server compares new tensors with those of the folder that it was started from.
            if int(old.name.removeprefix("v")) < version and not (self._vllm and old.name == "v0"):
                shutil.rmtree(old, ignore_errors=True)
