import pytest

from tools_server.config import load_config

GOOD = """\
seed: 3
experts:
  small:
    kind: simulated
    skill: {default: 1, math: 2}
    usd_per_million_tokens: 1.5
    tokens_per_call: 1000
    latency_s: 2
"""


def load(tmp_path, text):
    path = tmp_path / "server.yaml"
    path.write_text(text)
    return load_config(path)


def test_a_file_fills_the_model_and_defaults_the_rest(tmp_path):
    config = load(tmp_path, GOOD)
    assert (config.seed, config.host, config.time_scale) == (3, "127.0.0.1", 0.0)
    assert config.experts["small"].skill == {"default": 1, "math": 2}
    assert config.experts["small"].reliability == 1.0
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            GOOD.replace("tokens_per_call", "token_per_call"),
            ":7: unknown key 'experts.small.token_per_call'; did you mean 'experts.small.tokens_per_call'?",
        ),
        (GOOD + "sed: 4\n", ":9: unknown key 'sed'; did you mean 'seed'?"),
        (
            GOOD.replace("seed: 3", "seed: three"),
            ":1: 'seed': Input should be a valid integer, unable to parse",
        ),
        (
            GOOD.replace("math: 2", "math: 0"),
            ":5: 'experts.small.skill.math': Input should be greater than 0",
        ),
        (GOOD.replace("    latency_s: 2\n", ""), ":3: missing key 'experts.small.latency_s'"),
        (GOOD.replace("latency_s: 2", "latency_s: .nan"), ":8: 'experts.small.latency_s': Input should be"),
        ("experts: [\n", "not YAML"),
        ("- 1\n", ":1: got list, expected a mapping"),
        ("", ":1: got NoneType, expected a mapping"),
    ],
)
def test_a_mistake_is_one_line_with_file_line_and_key(tmp_path, text, message):
    with pytest.raises(ValueError) as caught:
        load(tmp_path, text)
    line = str(caught.value)
    assert line.startswith(f"{tmp_path}/server.yaml:")
    assert message in line
    assert "\n" not in line


def test_a_token_in_the_file_is_refused_and_not_repeated(tmp_path):
    with pytest.raises(ValueError, match=r"unknown key 'token'.*JORCH_TOOLS_TOKEN") as caught:
        load(tmp_path, GOOD + "token: swordfish\n")
    assert "swordfish" not in str(caught.value)


def test_an_unreadable_file_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.yaml: cannot be read \(No such file"):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"seed: \xff\xfe")
    with pytest.raises(ValueError, match=r"binary\.yaml: not UTF-8 text"):
        load_config(tmp_path / "binary.yaml")
