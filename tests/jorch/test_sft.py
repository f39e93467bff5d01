"""`jorch sft` in small: from nothing on the miniature world, and from the base on a user's own demonstrations."""

import json
from pathlib import Path

import pytest

from jorch.config import SftConfig
from jorch.export import pretrained
from jorch.run_folder import read_jsonl
from jorch.synth import sft
from jorch.train.sft import train as train_in_folder
from jorch.train.step import make_train_step

DIALOGUES = [
    [
        {"role": "user", "content": f"Wie heisst Nummer {i}?"},
        {"role": "assistant", "content": '<tool_call>{"name": "search", "arguments": {}}</tool_call>'},
        {"role": "tool", "content": "documents"},
        {"role": "assistant", "content": f"Sie heisst\u2028 {i}."},
    ]
    for i in range(10)
]


def make_config(out, **changes):
    settings = {
        "out": str(out),
        "steps": 12,
        "rows_per_step": 8,
        "batch": {"row_tokens": 160, "micro_rows": 4},
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 2},
        "checkpoint": {"every_steps": 1, "keep": 2},
        "log_every": 1,
    }
    return SftConfig.model_validate(settings | changes)


def from_base(out: Path, demonstrations: Path):
    return make_config(out, init_from="base", demonstrations=str(demonstrations))


def write_rows(path, rows) -> Path:
    lines = (row if isinstance(row, str) else json.dumps({"messages": row}, ensure_ascii=False) for row in rows)
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def losses(out):
    return [row["train/loss"] for row in read_jsonl(out / "metrics.jsonl")]


@pytest.mark.slow
def test_from_nothing_on_the_miniature_world(tmp_path, mesh):
    """A model far too small and a run far too short; the loss falls from that of guessing all the same."""
    model = {
        "vocab_size": 640,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "tie_word_embeddings": True,
    }
    optimizer = {"kind": "muon", "learning_rate": 1e-2}
    config = make_config(tmp_path / "run", model=model, demonstrations="miniature", steps=25, optimizer=optimizer)
    sft.run(config, resume=False, fresh=False)
    loss = losses(tmp_path / "run")
    assert len(loss) == 25
    assert 5.5 < loss[0] < 7.5  # log 640 = 6.5
    assert loss[-1] < loss[0] - 1.5
    exported = pretrained.load(str(tmp_path / "run" / "model"), mesh)
    assert exported.model.config.hidden_size == 16
    assert exported.tokenizer.digest == sft.train_tokenizer().digest


class Watched:
    """A metric of a step, which tells `events` when the host asks for its value, and so waits for it."""

    def __init__(self, value, step, events):
        self.value, self.step, self.events = value, step, events

    def __float__(self):
        if ("read", self.step) not in self.events:
            self.events.append(("read", self.step))
        return float(self.value)


def test_on_demonstrations_of_a_users_own(tmp_path, monkeypatch):
    """And every step is dispatched before the metrics of the one before are read."""
    events = []

    def watched(*arguments, **options):
        train_step = make_train_step(*arguments, **options)

        def step(state, *rest):
            number = sum(kind == "dispatch" for kind, _ in events)
            events.append(("dispatch", number))
            state, metrics = train_step(state, *rest)
            return state, {name: Watched(value, number, events) for name, value in metrics.items()}

        return step

    monkeypatch.setattr("jorch.train.sft.make_train_step", watched)
    demonstrations = write_rows(tmp_path / "demo.jsonl", [*DIALOGUES, ""])
    config = make_config(
        tmp_path / "run",
        init_from="base",
        demonstrations=str(demonstrations),
        checkpoint={"every_steps": 100, "keep": 1},
    )
    sft.run(config, resume=False, fresh=False)
    loss = losses(tmp_path / "run")
    assert len(loss) == 12
    assert loss[-1] < loss[0] / 2
    expected = [event for n in range(1, 12) for event in (("dispatch", n), ("read", n - 1))]
    assert events == [("dispatch", 0), *expected, ("read", 11)]


@pytest.mark.slow
def test_a_run_that_was_cut_short_ends_with_the_same_weights(tmp_path, monkeypatch):
    demonstrations = write_rows(tmp_path / "demo.jsonl", DIALOGUES)
    sft.run(from_base(tmp_path / "straight", demonstrations), resume=False, fresh=False)

    def interrupt(number):
        if number >= 7 * 8:  # the first demonstration of step 7
            raise KeyboardInterrupt
        return original(number)

    def train(*arguments):
        nonlocal original
        *others, original = arguments
        return train_in_folder(*others, interrupt)

    original = None
    config = from_base(tmp_path / "interrupted", demonstrations)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("jorch.train.sft.train", train)
        sft.run(config, resume=False, fresh=False)
    assert len(losses(tmp_path / "interrupted")) == 7
    sft.run(config, resume=True, fresh=False)
    assert losses(tmp_path / "interrupted") == losses(tmp_path / "straight")
    weights = [tmp_path / run / "model" / "model.safetensors" for run in ("straight", "interrupted")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{", "unreadable demonstration: Expecting property name"),
        ("[]", "unreadable demonstration: no 'messages', a list"),
        ('{"messages": "hello"}', "unreadable demonstration: no 'messages', a list"),
        ('{"messages": ["hello"]}', "unreadable demonstration: a message is an object with the strings"),
        ([{"role": "user", "content": None}], "unreadable demonstration: a message is an object with the strings"),
        (DIALOGUES[0][:1], "unreadable demonstration: a demonstration needs a prompt and then an assistant message"),
        (DIALOGUES[0][1:], "unreadable demonstration: a demonstration needs a prompt and then an assistant message"),
        ([*DIALOGUES[0][:3], {"role": "assistant", "content": "x" * 200}], "tokens do not fit batch.row_tokens=160"),
    ],
)
def test_an_unreadable_demonstration_is_named_by_its_line(row, reason, tmp_path):
    demonstrations = write_rows(tmp_path / "demo.jsonl", [DIALOGUES[0], "", row, DIALOGUES[1]])
    with pytest.raises(ValueError) as caught:
        sft.run(from_base(tmp_path / "run", demonstrations), resume=False, fresh=False)
    line = str(caught.value)
    assert line.startswith(f"{demonstrations}:3: ")
    assert reason in line
    assert "\n" not in line


@pytest.mark.parametrize(("rows", "message"), [(None, "no demonstrations at "), (["", " "], "no demonstrations in it")])
def test_a_file_without_demonstrations_is_refused(rows, message, tmp_path):
    path = tmp_path / "demo.jsonl"
    if rows is not None:
        write_rows(path, rows)
    with pytest.raises(ValueError, match=message):
        sft.run(from_base(tmp_path / "run", path), resume=False, fresh=False)
