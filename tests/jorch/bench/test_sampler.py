"""`jorch bench sampler` measures both ways of keeping a prompt and writes the numbers down."""

import json

import pytest

from jorch.bench import sampler


@pytest.mark.slow
def test_both_ways_are_measured(tmp_path, capsys):
    sampler.run(tmp_path / "f.json", cases=((2, 128),), num_rounds=2)
    [figure] = json.loads((tmp_path / "f.json").read_text())["figures"]
    assert (len(figure["copied_s"]), len(figure["shared_s"])) == (2, 2)
    # Sixteen rows share the 128 columns of two prompts; each has 256 more of its own.
    assert figure["shared_bytes"] < (2 * 128 + 16 * 272) / (16 * 384) * 1.05 * figure["copied_bytes"]
    assert "kept once" in capsys.readouterr().out
