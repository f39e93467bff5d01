"""`jorch serve`: what a user gets wrong is one line, before any process starts."""

import stat
from pathlib import Path

import pytest

from jorch import cli, config_io
from jorch.config import ServeConfig
from jorch.export import heads, hf, pretrained
from jorch.export.source import Held
from jorch.serving import vllm
from jorch.serving.vllm import EXECUTABLE_VARIABLE, ServeOptions, command


@pytest.fixture
def line(tmp_path, monkeypatch, capfd):
    """Runs `jorch serve ...` in a folder of its own: stderr's one line after `jorch: error: `."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(EXECUTABLE_VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))

    def run(*arguments):
        assert cli.main(["serve", *map(str, arguments)]) == 2
        error = capfd.readouterr().err
        assert error.count("\n") == 1
        return error.removeprefix("jorch: error: ").strip()

    return run


@pytest.fixture
def model(tmp_path, mesh):
    start = pretrained.load("base", mesh)
    hf.write(tmp_path / "model", *heads.widen(start.model.config, Held(start.params)), start.tokenizer, {})
    return tmp_path / "model"


def test_no_model(line):
    assert line("elsewhere") == "no config.json in elsewhere: give a folder that `jorch export` wrote"


def test_a_config_takes_the_options_places(line, model, tmp_path, capfd):
    path = tmp_path / "serve.yaml"
    path.write_text("folder: model\nport: 8200\nmax_rows: 16\nvllm_options: [--seed, '7']\n")
    words = ["serve", str(path), "--port", "8300", "--dtype", "f32", "--dry-run", "--", "--uvicorn-log-level", "error"]
    assert cli.main(words) == 0
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(capfd.readouterr().out)
    options = vllm.options(config_io.load(resolved, ServeConfig))
    assert (options.folder, options.port, options.max_rows, options.dtype) == (Path("model"), 8300, 16, "float32")
    assert options.further == ("--seed", "7", "--uvicorn-log-level", "error")
    assert line(path, "--vllm", "nowhere").startswith("no executable 'nowhere': ")
    path.write_text("folder: model\nports: 8200\n")
    assert line(path) == f"{path}:2: unknown key 'ports'; did you mean 'port'?"
    assert line(model, "--max-rows", "0") == "command line: max_rows=0: Input should be greater than 0"


def test_no_vllm(line, model):
    assert line(model) == (
        "no executable 'vllm': install vLLM in an environment of its own and pass --vllm PATH or set JORCH_VLLM=PATH"
    )
    assert line(model, "--vllm", "nowhere/vllm").startswith("no executable 'nowhere/vllm': ")


def test_weight_updates_stay_on_loopback(line, model):
    assert line(model, "--rl", "--host", "0.0.0.0") == (
        "--rl opens weight updates, which ask for no password: --host must be 127.0.0.1, not 0.0.0.0"
    )


def test_adapters_come_from_runs(line, model):
    assert line(model, "--lora-rank", "8") == "--lora-rank is for adapters that a run pushes: it needs --rl"
    assert line(model, "--rl", "--lora-rank", "1000") == "--lora-rank 1000: vLLM takes adapters of rank 512 at most"


def test_a_damaged_probe(line, model):
    (model / "jorch.json").write_text("{")
    assert "jorch.json: not readable" in line(model)


def test_heads_too_narrow_for_a_cpu(line, model, monkeypatch):
    monkeypatch.setattr(vllm, "on_cpu", lambda: True)
    config = model / "config.json"
    config.write_text(config.read_text().replace('"head_dim": 32', '"head_dim": 16'))
    assert line(model).endswith(
        "head_dim=16; vLLM's attention on CPUs takes multiples of 32: export the model with --widen-heads"
    )


def test_vllms_own_options_pass_through(model, tmp_path, monkeypatch):
    executable = tmp_path / "vllm"
    executable.write_text("#!/bin/sh\n")
    executable.chmod(executable.stat().st_mode | stat.S_IXUSR)
    options = ServeOptions(model, str(executable), further=("--tensor-parallel-size", "2"))
    argv = command(options, 8100)
    assert argv[:3] == [str(executable), "serve", str(model)]
    assert argv[-2:] == ["--tensor-parallel-size", "2"]
    assert "--worker-extension-cls" not in argv
    assert "--tool-call-parser" in argv
    assert "--worker-extension-cls" in command(ServeOptions(model, str(executable), rl=True), 8100)


def test_a_vllm_that_ends_at_once_is_reported_with_its_last_line(model, tmp_path, monkeypatch, capfd):
    executable = tmp_path / "vllm"
    executable.write_text("#!/bin/sh\necho 'ValueError: no such device'\nexit 3\n")
    executable.chmod(0o755)
    with pytest.raises(RuntimeError, match=r"^vLLM ended with status 3: ValueError: no such device \(log: .*\)$"):
        with vllm.vllm_server(ServeOptions(model, str(executable)), tmp_path / "log"):
            raise AssertionError
