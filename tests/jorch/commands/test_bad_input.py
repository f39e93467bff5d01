"""A user's mistakes, made on the command line: one line that says where, exit status 2, and nothing is lost."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from jorch.export.pretrained import BASE

Main = Callable[..., str]


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "run.lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("group_size: 4", "goup_size: 4", "rl.yaml:7: unknown key 'goup_size'; did you mean 'group_size'?"),
        (
            "max_turns: 5",
            "max_turn: 5",
            "rl.yaml:10: unknown key 'rollout.max_turn'; did you mean 'rollout.max_turns'?",
        ),
        ("steps: 4", "steps: '4'", "rl.yaml:5: 'steps' is the text '4'; must be a valid integer"),
        ("steps: 4", "steps: 0", "rl.yaml:5: 'steps' is 0; must be greater than 0"),
        (
            "max_prompt_tokens: 64",
            "max_prompt_tokens: 109",
            "rl.yaml:12: rollout.max_prompt_tokens=109 + rollout.max_tokens_per_turn=4 exceed "
            "sampler.max_context_tokens=112: long prompts could not be answered",
        ),
        (
            "config: server.yaml",
            "config: server.yaml, url: 'http://h:1'",
            "rl.yaml:4: section 'tools_server': set exactly one of tools_server.url and tools_server.config",
        ),
    ],
)
def test_a_wrong_config_is_told_by_its_line(old: str, new: str, line: str, main: Main, world: Path) -> None:
    edit(world / "rl.yaml", old, new)
    assert main(2, "rl", "rl.yaml") == f"error: {line}"
    assert not (world / "rl").exists()


def test_rows_that_cannot_be_read_are_told_by_their_numbers(main: Main, world: Path) -> None:
    lines = (world / "tasks.jsonl").read_text().splitlines()
    row = json.loads(lines[0])
    bad = [
        lines[0][:-9],
        json.dumps(row | {"id": "a", "category": "essay"}),
        json.dumps({key: value for key, value in row.items() if key != "model_mapping"}),
        "[1, 2]",
    ]
    (world / "tasks.jsonl").write_text("\n".join([lines[0], bad[0], "", *lines[1:3], *bad[1:]]) + "\n")
    line = main(2, "rl", "rl.yaml")
    assert line.startswith("error: tasks.jsonl: 4 unreadable row(s): line 2: not valid JSON (")
    assert "; line 6: 'category' is 'essay'; allowed: 'qa', 'func_call'; line 7: no 'model_mapping'; line 8: " in line
    assert line.endswith("; fix or remove them")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            lambda world: (world / "tasks.jsonl").unlink(),
            "no task file at tasks.jsonl; set `tasks` to a JSONL of tasks",
        ),
        (lambda world: (world / "tasks.jsonl").write_text(""), "tasks.jsonl: no tasks in it"),
        (
            lambda world: (world / "tasks.jsonl").write_text((world / "tasks.jsonl").read_text() * 2),
            "tasks.jsonl: task id 'train-000000' occurs twice; ids must be unique",
        ),
        (
            lambda world: (world / "server.yaml").unlink(),
            "tool server: server.yaml: cannot be read (No such file or directory)",
        ),
        (
            lambda world: (world / "server.yaml").write_text("experts: {}\nport: high\n"),
            "tool server: server.yaml:2: 'port': Input should be a valid integer",
        ),
        (
            lambda world: (world / "server.yaml").write_text("experts: {}\n"),
            "the tool server refused task train-000000: setup.model_mapping.",
        ),
    ],
)
def test_what_a_run_needs_is_checked_before_it_starts(
    change: Callable[[Path], object], line: str, main: Main, world: Path
) -> None:
    change(world)
    assert main(2, "rl", "rl.yaml").startswith(f"error: {line}")
    assert not (world / "rl" / "checkpoints").exists()


def test_a_domain_that_the_server_lacks_is_refused_at_the_start(main: Main, world: Path) -> None:
    """A func_call row of the released data, whose domain needs an environment that is not there."""
    example = {
        "id": "weather_17",
        "user_scenario": {"instructions": {"domain": "weather", "reason_for_call": "Is it dry in Oslo?"}},
        "evaluation_criteria": {"actions": [], "communicate_info": []},
    }
    row = {"index": "weather____14577", "category": "func_call", "example": example, "pref_vec": {"accuracy": 1}}
    with (world / "tasks.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    line = main(2, "rl", "rl.yaml")
    assert line == (
        "error: the tool server refused task weather____14577: this server has no copy of ToolScale: "
        "set `toolscale` in its config"
    )


def test_no_tool_server_at_the_address(main: Main) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    overrides = ("tools_server.config=null", f"tools_server.url={url}")
    line = main(1, "rl", "rl.yaml", *overrides)
    assert line.startswith(f"error: tool server {url} does not answer (2 attempts at /healthz): ")
    assert line.endswith(f"; go on with: jorch rl rl.yaml {' '.join(overrides)} --resume")
    assert main(1, "eval", "eval.yaml", *overrides).startswith(f"error: tool server {url} does not answer (1 attempt ")


def test_something_else_at_the_address(main: Main, world: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1"],
        cwd=world,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as other:
        assert other.stdout is not None
        url = "http://127.0.0.1:" + other.stdout.readline().split("port ")[1].split()[0]
        line = main(2, "rl", "rl.yaml", "tools_server.config=null", f"tools_server.url={url}")
        other.kill()
    assert line.startswith(f"error: tool server {url} refused /healthz (HTTP 404): ")


def test_a_taken_port(world: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-c", "import sys; from jorch.cli import main; sys.exit(main())"]
        result = subprocess.run(
            [*command, "tools-server", "server.yaml", "--port", str(port)],
            cwd=world,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    line = f"port {port} is in use on 127.0.0.1; pass --port with another, or 0 for a free one\n"
    assert (result.returncode, result.stdout, result.stderr) == (2, "", line)


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (shutil.rmtree, "init_from='model' is no folder; give one with safetensors, or \"base\""),
        (lambda model: (model / "model.safetensors").unlink(), "no *.safetensors in model"),
        (lambda model: (model / "config.json").unlink(), "no config.json in model; it must be a folder of "),
        (
            lambda model: (model / "tokenizer.model").unlink(),
            "no tokenizer at model/tokenizer.json; set tokenizer.path",
        ),
        (
            lambda model: (model / "tokenizer.model").write_bytes(b"\x07" * 99),
            "model/tokenizer.model is not a sentencepiece tokenizer: ",
        ),
        (
            lambda model: os.truncate(model / "model.safetensors", 100_000),
            "model/model.safetensors: not readable as safetensors (",
        ),
        (
            lambda model: edit(model / "config.json", '"vocab_size": 640', '"vocab_size": 512'),
            "model: vocab_size=512 is smaller than the tokenizer's 640",
        ),
        (
            lambda model: edit(model / "config.json", '"hidden_size": 64', '"hidden_size": 32'),
            "model: tensor 'model.embed_tokens.weight' has shape (640, 64)",
        ),
    ],
)
def test_a_damaged_or_missing_model_is_named(
    damage: Callable[[Path], object], line: str, main: Main, world: Path
) -> None:
    shutil.copytree(BASE, world / "model")
    damage(world / "model")
    assert main(2, "rl", "rl.yaml", "init_from=model").startswith(f"error: {line}")
    assert not (world / "rl" / "checkpoints").exists()


def test_a_folder_of_another_configs_run_is_left_alone(main: Main, world: Path) -> None:
    folder = world / "rl"
    (folder / "checkpoints" / "3").mkdir(parents=True)
    assert main(2, "rl", "rl.yaml") == ("error: rl holds a run without its config.yaml: choose another out=")
    edit(world / "rl.yaml", "steps: 4", "steps: 5")
    (folder / "config.yaml").write_text((world / "rl.yaml").read_text())
    before = contents(folder)
    for arguments in ((), ("--resume",)):
        line = main(2, "rl", "rl.yaml", *arguments, "steps=4")
        assert line == (
            "error: rl holds a run of another config (steps=5 there, 4 here): pass --fresh to remove it, "
            "or choose another out="
        )
    assert contents(folder) == before


def test_another_seeds_quickstart_is_left_alone(main: Main, world: Path) -> None:
    """Also where it was stopped before training: its tasks are of its seed."""
    (world / "quick" / "tasks").mkdir(parents=True)
    resolved = subprocess.run(
        [sys.executable, "-c", "from jorch.cli import main; main()", "quickstart", "--out", "quick", "--dry-run"],
        cwd=world,
        capture_output=True,
        text=True,
        check=True,
    )
    (world / "quick" / "config.yaml").write_text(resolved.stdout)
    line = main(2, "quickstart", "--out", "quick", "--seed", "1")
    assert line == (
        "error: quick holds a run of another config (seed=0 there, 1 here): pass --fresh to remove it, "
        "or choose another out="
    )


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (("policy=gold",), "policy: gold replays the calls of tau2 tasks; tasks.jsonl has none: set policy=model"),
        (("init_from=null",), "command line: policy: model needs init_from"),
        (("tasks=tau2:hotel",), "tau2 domain 'hotel' is unknown; allowed: airline, retail"),
        (("temperatures=[]",), "command line: 'temperatures' is a list; "),
    ],
)
def test_an_evaluation_that_makes_no_sense(overrides: tuple[str, ...], line: str, main: Main) -> None:
    assert main(2, "eval", "eval.yaml", *overrides).startswith(f"error: {line}")


def test_baselines_need_the_miniature_worlds_truth(main: Main, world: Path) -> None:
    rows = [json.loads(line) for line in (world / "tasks.jsonl").read_text().splitlines()]
    text = "".join(json.dumps({k: v for k, v in row.items() if k != "truth"}) + "\n" for row in rows)
    (world / "tasks.jsonl").write_text(text)
    line = main(2, "eval", "eval.yaml", "baselines=true")
    assert line == ("error: baselines: only tasks of the miniature world have them, not tasks.jsonl: baselines=false")


def test_demonstrations_that_cannot_be_read(main: Main, world: Path) -> None:
    good = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]}
    for bad, line in (
        ("{", "demo.jsonl:2: unreadable demonstration: "),
        ('{"message": []}', "demo.jsonl:2: unreadable demonstration: no 'messages'"),
        (
            json.dumps({"messages": good["messages"][:1]}),
            "demo.jsonl:2: unreadable demonstration: a demonstration needs ",
        ),
    ):
        (world / "demo.jsonl").write_text(f"{json.dumps(good)}\n{bad}\n")
        assert main(2, "sft", "sft.yaml", "demonstrations=demo.jsonl").startswith(f"error: {line}")
    assert main(2, "sft", "sft.yaml", "demonstrations=nowhere.jsonl").startswith("error: no demonstrations at nowhere")


def test_a_recipe_for_another_vocabulary(main: Main) -> None:
    line = main(2, "sft", "sft.yaml", "model.vocab_size=64")
    assert line.startswith("error: model.vocab_size=64 is smaller than the tokenizer's ")


def test_a_summary_that_cannot_be_read(main: Main, world: Path) -> None:
    (world / "quick").mkdir()
    main_line = main(2, "quickstart", "--out", "quick", "rl.step=3")
    assert main_line == "error: command line: unknown key 'rl.step'; did you mean 'rl.steps'?"
    from jorch import config_io
    from jorch.config import QuickstartConfig

    config = config_io.load(config_io.configs_dir() / "quickstart.yaml", QuickstartConfig, ["out=quick"])
    (world / "quick" / "config.yaml").write_text(config_io.dump(config))
    (world / "quick" / "summary.json").write_text('{"base": ')
    assert main(2, "quickstart", "--out", "quick").startswith("error: quick/summary.json:1: not JSON (")


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("nowhere", "nowhere is no run folder: it has no config.yaml"),
        (".", ". is no run folder: it has no config.yaml"),
        ("evaluation", "evaluation holds no training run (no SFT, RL or quickstart), so no model to export"),
        ("begun", "begun has no checkpoint yet"),
    ],
)
def test_an_export_of_what_is_no_model(source: str, line: str, main: Main, world: Path) -> None:
    for name, config in (("evaluation", "eval.yaml"), ("begun", "rl.yaml")):
        (world / name).mkdir()
        shutil.copy(world / config, world / name / "config.yaml")
    assert main(2, "export", source, "--out", "exported") == f"error: {line}"
    assert not (world / "exported").exists()


def test_an_export_into_a_folder_that_is_not_empty(main: Main, world: Path) -> None:
    (world / "begun").mkdir()
    shutil.copy(world / "rl.yaml", world / "begun" / "config.yaml")
    for out in (".", "rl.yaml"):
        assert main(2, "export", "begun", "--out", out) == f"error: {out} is not an empty folder; choose another --out"
