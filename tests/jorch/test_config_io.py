"""What a config says is what a stage gets; whatever is wrong with one is said in one line, with its place."""

from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, model_validator

from jorch import config, config_help, config_io, sections

MODELS = [config.SftConfig, config.RlConfig, config.EvalConfig, config.QuickstartConfig]


class Inner(sections.Section):
    group_size: int = Field(default=8, ge=2, description="siblings")
    clip: Literal["low", "high"] = "low"
    rate: float = 0.5
    token: None = Field(default=None, description="set THE_VARIABLE")


class Outer(sections.Section):
    out: str = Field(description="run folder")
    rl: Inner = Inner()
    temperatures: tuple[float, ...] = (0.0,)
    limit: int | None = None
    total: int = 8

    @model_validator(mode="after")
    def _check(self) -> "Outer":
        if self.total % self.rl.group_size:
            raise ValueError(f"total={self.total} is not a multiple of rl.group_size={self.rl.group_size}")
        return self


def load(text: str, folder: Path, *overrides: str) -> Outer:
    path = folder / "c.yaml"
    path.write_text(text)
    return config_io.load(path, Outer, overrides)


def error_of(text: str, folder: Path, *overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        load(text, folder, *overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(f"{folder}/", "")


def test_values_come_from_the_file_then_the_command_line(tmp_path: Path) -> None:
    text = "out: runs/a\nrl: {group_size: 4, rate: 1e-6}\ntemperatures: [0, 1.5]\ntotal: 12\n"
    assert load(text, tmp_path) == Outer(
        out="runs/a", rl=Inner(group_size=4, rate=1e-6), temperatures=(0.0, 1.5), total=12
    )
    changed = load(text, tmp_path, "rl.group_size=3", "rl.clip=high", "limit=7", "total=9", "limit=null")
    assert changed.rl == Inner(group_size=3, rate=1e-6, clip="high")
    assert (changed.limit, changed.total) == (None, 9)


def test_an_override_may_open_a_section_or_replace_one(tmp_path: Path) -> None:
    assert load("out: a", tmp_path, "rl.group_size=4").rl.group_size == 4
    assert load("out: a\nrl: {rate: 3.0}", tmp_path, "rl={group_size: 2}").rl == Inner(group_size=2)


@pytest.mark.parametrize("word", ["on", "no", "2026-01-01", "1:30", "010", "0x10"])
def test_words_that_old_yaml_reads_as_something_else_stay_text(word: str, tmp_path: Path) -> None:
    assert load(f"out: {word}", tmp_path).out == word


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (
            "out: a\nrl:\n  goup_size: 4",
            (),
            "c.yaml:3: unknown key 'rl.goup_size'; did you mean 'rl.group_size'?",
        ),
        ("out: a\ngroup_size: 4", (), "c.yaml:2: unknown key 'group_size'; did you mean 'rl.group_size'?"),
        (
            "out: a\nxyz: 4",
            (),
            "c.yaml:2: unknown key 'xyz'; allowed here: out, rl, temperatures, limit, total",
        ),
        (
            "out: a\nrl:\n  xyz: 4",
            (),
            "c.yaml:3: unknown key 'rl.xyz'; allowed in 'rl': group_size, clip, rate, token",
        ),
        (
            "out: a",
            ("rl.goup_size=4",),
            "command line: unknown key 'rl.goup_size'; did you mean 'rl.group_size'?",
        ),
        (
            "rl:\n  goup_size: 4",
            (),
            "c.yaml:2: unknown key 'rl.goup_size'; did you mean 'rl.group_size'? (and 1 more)",
        ),
        (
            "out: a\nrl:\n  group_size: eight",
            (),
            "c.yaml:3: 'rl.group_size' is the text 'eight'; must be a valid integer",
        ),
        ('out: a\nlimit: "8"', (), "c.yaml:2: 'limit' is the text '8'; must be a valid integer"),
        ("out: a\nlimit: 8.5", (), "c.yaml:2: 'limit' is 8.5; must be a valid integer"),
        ("out: a\nlimit: true", (), "c.yaml:2: 'limit' is true; must be a valid integer"),
        ("out: 3", (), "c.yaml:1: 'out' is 3; must be a valid string"),
        ("out: a\nrl: 3", (), "c.yaml:2: 'rl' is 3; must be a section of keys"),
        ("out: a\nrl:", (), "c.yaml:2: 'rl' is null; must be a section of keys"),
        ("out: a\nlimit: [1]", (), "c.yaml:2: 'limit' is a list; must be a valid integer"),
        (
            "out: a\ntemperatures: [0, b]",
            (),
            "c.yaml:2: 'temperatures.1' is the text 'b'; must be a valid number",
        ),
        ("out: a\nrl:\n  clip: mid", (), "c.yaml:3: 'rl.clip' is the text 'mid'; must be 'low' or 'high'"),
        (
            "out: a",
            ("rl.group_size=1",),
            "command line: 'rl.group_size' is 1; must be greater than or equal to 2",
        ),
        ("out: a", ("out.x=1",), "command line: 'out' is a section of keys; must be a valid string"),
        ("total: 3", (), "c.yaml: missing key 'out' (run folder)"),
        ("", (), "c.yaml: missing key 'out' (run folder)"),
        (
            "out: a\nrl:\n  token: secret",
            (),
            "c.yaml:3: 'rl.token' must stay unset: set THE_VARIABLE",
        ),
        (
            "out: a\ntotal: 9",
            (),
            "c.yaml:2: total=9 is not a multiple of rl.group_size=8",
        ),
        (
            "out: a\ntotal: 8",
            ("rl.group_size=3",),
            "command line: total=8 is not a multiple of rl.group_size=3",
        ),
        ("out: a\nrl:\n  rate: 1\n  rate: 2", (), "c.yaml:4: key 'rl.rate' is set twice; first at c.yaml:3"),
        ("out: a\nout: a", (), "c.yaml:2: key 'out' is set twice; first at c.yaml:1"),
        ("out: a\nrl: {rate: 1", (), "c.yaml:2: bad YAML: "),
        ("out: a\n\tlimit: 3", (), "c.yaml:2: bad YAML: found character '\\t' that cannot start any token; "),
        ("out: a\nlimit: \x07", (), "c.yaml:2: bad YAML: a control character"),
        ("out: a\n---\nout: b", (), "c.yaml:2: bad YAML: "),
        ("- a\n- b", (), "c.yaml:1: got a list; a config is a mapping of keys to values"),
        ("out: a\n[1]: 3", (), "c.yaml:2: a key in '' is not a plain word"),
        ("out: &x a\nrl: *x", (), "c.yaml:1: 'rl' is an alias; write it out"),
        ("out: &x [*x]", (), "c.yaml:1: 'out.0' is an alias; write it out"),
        ("out: !path a", (), "c.yaml:1: 'out' has the tag !path; leave it out"),
        ("out: a", ("limit",), "command line: got 'limit'; an override is written key=value, e.g. seed=1"),
        ("out: a", ("rl.=3",), "command line: got 'rl.=3'; an override is written key=value, e.g. seed=1"),
        ("out: a", ("rl={rate: 1",), "command line: bad YAML in 'rl': "),
        (
            "out: a",
            ("rl={rate: 1, rate: 2}",),
            "command line: key 'rl.rate' is set twice; first at command line",
        ),
    ],
)
def test_each_mistake_is_one_line_with_its_place(
    text: str, overrides: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    got = error_of(text, tmp_path, *overrides)
    assert got.startswith(message) if message.endswith((": ", "; ")) else got == message


def test_a_secret_is_never_printed(tmp_path: Path) -> None:
    assert "hunter2" not in error_of("out: a\nrl: {token: hunter2}", tmp_path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.yaml: no such file$"):
        config_io.load(tmp_path / "nowhere.yaml", Outer)
    with pytest.raises(ValueError, match=r"cannot be read: Is a directory$"):
        config_io.load(tmp_path, Outer)
    (tmp_path / "latin.yaml").write_bytes(b"out: \xe9")
    with pytest.raises(ValueError, match=r"latin\.yaml: not UTF-8 text \(byte 5\)$"):
        config_io.load(tmp_path / "latin.yaml", Outer)


@given(
    out=st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    | st.sampled_from(["1e-6", "on", "null", "~", "010", "1.", ".inf", "2026-01-01", "<<", "="]),
    rate=st.floats(allow_nan=False),
    temperatures=st.lists(st.floats(0, 2), max_size=3),
)
def test_dump_then_load_is_the_identity(
    tmp_path_factory: pytest.TempPathFactory, out: str, rate: float, temperatures: list[float]
) -> None:
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    written = Outer(out=out, rl=Inner(rate=rate), temperatures=tuple(temperatures))
    path.write_text(config_io.dump(written), encoding="utf-8")
    assert config_io.load(path, Outer) == written


@pytest.mark.parametrize("model", MODELS)
def test_every_key_of_every_stage_is_described(model: type[sections.Section]) -> None:
    described = dict(config_help.fields(model))
    missing = [key for key, field in described.items() if not config_help.section_of(field) and not field.description]
    assert not missing


def test_help_text_shows_type_bounds_default_and_description() -> None:
    lines = config_help.describe(Outer, 80).splitlines()
    assert lines[:2] == ["  out  text  (required)", "      run folder"]
    assert "  rl.group_size  int >= 2  = 8" in lines
    assert "  rl.clip  low|high  = low" in lines
    assert "  temperatures  list of float  = [0.0]" in lines
    assert "  limit  int or null  = null" in lines


@pytest.mark.parametrize("path", sorted(config_io.configs_dir().glob("*.yaml")), ids=lambda path: path.name)
def test_configs_begin_with_the_command_that_runs_them(path: Path) -> None:
    header = path.read_text().split("\nout:")[0].split("\nhost:")[0]
    assert any(line.startswith("#") and " jorch " in line for line in header.splitlines())
