"""The sampler that a config asks for: in this process, or vLLM servers, running ones or one of the run's own."""

import shutil
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import jax
import numpy as np

from jorch.export import adapter, hf, pretrained
from jorch.export.adapter import Adapter
from jorch.export.heads import widen
from jorch.export.probe import make_probe
from jorch.export.source import Held, Source, flat_adapter
from jorch.model.lora import LoraQwen3
from jorch.model.transformer import Params
from jorch.rollout.jax_sampler import JaxSampler
from jorch.rollout.sampler import Sampler
from jorch.rollout.vllm_sampler import VllmSampler
from jorch.sections import LoraConfig, MeshConfig, ModelConfig, RolloutConfig, SamplerConfig
from jorch.serving import control
from jorch.serving.push import push
from jorch.serving.vllm import ServeOptions, on_cpu, vllm_server
from jorch.sharding import make_mesh


def make_sampler(
    config: SamplerConfig,
    rollout: RolloutConfig,
    start: pretrained.Pretrained,
    run_folder: Path,
    lora: LoraConfig | None = None,
) -> Sampler:
    """Ready, with the starting weights; `lora`: what is to be trained, so that servers get adapters if they take them.

    Raises as `vllm_server` where one is started, else SamplerDown.
    """
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
                weights.write_base(start.params),
                dtype=config.vllm.dtype,
                max_context_tokens=config.max_context_tokens,
                max_rows=config.max_rows,
                rl=True,
                lora_rank=lora and lora.rank,
            )
            urls = [stack.enter_context(vllm_server(options, run_folder / "vllm.log"))]
        sampler = VllmSampler(config, urls, start.tokenizer.end_of_turn_id, weights.write, weights.push)
        if lora is not None and (not config.vllm.urls or _take_adapters(urls)):
            sampler.takes_adapters = True
            sampler.publish(_idle_adapter(start, lora), 0)  # which also proves that they hold its base
        elif config.vllm.urls:
            sampler.publish(start.params, 0)  # whatever those servers were started with
        sampler.on_close = stack.pop_all().close
    return sampler


def _take_adapters(urls: Sequence[str]) -> bool:
    """Whether the servers that answer were started for adapters. Raises ValueError where only some were."""
    takes: dict[str, bool] = {}
    for url in urls:
        with suppress(ConnectionError):  # the first push leaves it out
            takes[url] = control.BASE in control.models(url)
    without = [url for url, does in takes.items() if not does]
    if without and len(without) < len(takes):
        raise ValueError(f"vLLM at {without[0]} takes no adapters, others do: start all with --lora-rank, or none")
    if without:
        print(f"vLLM at {without[0]} takes no adapters (jorch serve --lora-rank): merged weights are pushed")
    return not without


def _idle_adapter(start: pretrained.Pretrained, lora: LoraConfig) -> Adapter:
    """One that leaves the base as it is."""
    shapes = LoraQwen3(start.model, lora).abstract_params()
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    return Adapter(zeros, lora, make_probe(start.model.config, Held(start.params)))


def weights_folder(config: SamplerConfig, run_folder: Path) -> Path:
    given = config.vllm and config.vllm.weights_dir
    return Path(given or run_folder / "weights").absolute()


_BASE = "base"


class Weights:
    """A folder that trainer and samplers share: one export per policy version, the latest kept."""

    def __init__(self, start: pretrained.Pretrained, folder: Path, config: SamplerConfig) -> None:
        self._start = start
        self._folder = folder
        self._vllm = config.vllm

    def write(self, published: Params | Adapter, version: int) -> Path:
        """A whole model, or an adapter of the base that servers hold. Raises OSError naming the folder."""
        target, facts = self._folder / f"v{version}", {"policy_version": version}
        if isinstance(published, Adapter):
            params, lora, expected = published
            _, served = self._as_served(Held(flat_adapter(params)))
            adapter.save(target, lora, served, str(self._folder / _BASE), expected, facts, durable=False)
            return target
        config, served = self._as_served(Held(published))
        # Not durable: after a power cut the trainer writes them again.
        hf.write(target, config, served, self._start.tokenizer, facts, durable=False)
        return target

    def write_base(self, params: Params) -> Path:
        """What a server is started with; it stays. Raises OSError naming the folder."""
        target = self._folder / _BASE
        config, served = self._as_served(Held(params))
        hf.write(target, config, served, self._start.tokenizer, {"policy_version": 0})
        return target

    def _as_served(self, source: Source) -> tuple[ModelConfig, Source]:
        config = self._start.model.config
        return widen(config, source) if self._vllm and on_cpu() else (config, source)

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
            if int(old.name.removeprefix("v")) < version:
                shutil.rmtree(old, ignore_errors=True)
