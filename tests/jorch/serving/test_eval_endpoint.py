"""`jorch eval --endpoint` against the base as `jorch serve` serves it: the chat scores as our own sampler does."""

import json
import os
from pathlib import Path

import pytest
import yaml

from jorch import cli
from jorch.export import hf, pretrained
from jorch.export.heads import widen
from jorch.export.source import Held
from jorch.sections import MeshConfig, MiniatureConfig
from jorch.serving.vllm import EXECUTABLE_VARIABLE, ServeOptions, vllm_server
from jorch.sharding import make_mesh
from jorch.synth import miniature

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(EXECUTABLE_VARIABLE not in os.environ, reason=f"{EXECUTABLE_VARIABLE} names no vllm executable"),
]
EVAL = """
init_from: base
tasks: tasks.jsonl
tools_server: {config: server.yaml}
sampler: {max_rows: 32, max_context_tokens: 112, prefill_chunk_tokens: 64}
rollout: {max_turns: 5, max_tokens_per_turn: 4, max_prompt_tokens: 64, max_malformed_calls: 1}
"""


def test_the_base_scores_the_same_behind_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    miniature.write_jsonl(Path("tasks.jsonl"), miniature.tasks(MiniatureConfig(num_train=64), "train", 0))
    Path("server.yaml").write_text(yaml.safe_dump({"experts": miniature.catalogue()}))
    for name in ("ours", "theirs"):
        Path(f"{name}.yaml").write_text(f"out: {name}{EVAL}")
    start = pretrained.load("base", make_mesh(MeshConfig()))
    hf.write(Path("model"), *widen(start.model.config, Held(start.params)), start.tokenizer, {})
    with vllm_server(ServeOptions(Path("model"), max_context_tokens=256), Path("vllm.log")) as url:
        assert cli.main(["eval", "theirs.yaml", "--endpoint", f"{url}/v1"]) == 0
    assert cli.main(["eval", "ours.yaml"]) == 0
    ours, theirs = (json.loads(Path(name, "summary.json").read_text())["model"] for name in ("ours", "theirs"))
    assert ours["accuracy"]["mean"] > 0.9, "the base plays well, so the comparison says something"
    assert theirs == ours
