"""The benchmark saves and restores what a run would, both ways."""

import json

import pytest

from jorch.bench import checkpoint as checkpoint_bench


def test_it_times_both_ways_and_writes_the_numbers_down(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, value in {"NUM_LAYERS": 2, "D": 64, "F": 128, "NUM_TIMINGS": 1}.items():
        monkeypatch.setattr(checkpoint_bench, name, value)
    checkpoint_bench.run(tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    state_bytes = 3 * 4 * 2 * (2 * 64 * 64 + 2 * 64 * 128)
    assert found["state_bytes"] == state_bytes
    for timing in found["timings"].values():
        assert timing["save_s"] >= timing["save_returns_s"] > 0
        assert timing["stored_bytes"] == pytest.approx(state_bytes, rel=0.5)
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"], "nothing is left behind"
    assert "ocdbt=false" in capsys.readouterr().out
