"""`jorch bench serving` in a small size; its figures belong to machines that do nothing else."""

import json
import os

import pytest

from jorch.bench import serving
from jorch.serving.vllm import EXECUTABLE_VARIABLE


def figures(path):
    content = json.loads(path.read_text())
    assert {"device", "versions"} < set(content)
    return {figure["name"]: figure for figure in content["figures"]}


@pytest.mark.vllm
@pytest.mark.timeout(600)
@pytest.mark.skipif(EXECUTABLE_VARIABLE not in os.environ, reason=f"{EXECUTABLE_VARIABLE} names no vllm executable")
def test_exports_pushes_and_the_client(tmp_path, monkeypatch):
    monkeypatch.setattr(serving, "_NUM_PUSHES", 2)
    monkeypatch.setattr(serving, "_NUM_ROUNDS", 2)
    serving.run(tmp_path / "f.json", ("export", "push", "client"), size="base")
    found = figures(tmp_path / "f.json")
    assert all(min(f["values"]) > 0 for name, f in found.items() if "costs" not in name)
    push = found["push of base to one server, s"]
    assert len(push["values"]) == 2
    assert len(found["push of an adapter (rank 16) of base to one server, s"]["values"]) == 2
    assert push["met"] == (push["median"] <= 0.5)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_training_beside_rollouts(tmp_path, monkeypatch):
    monkeypatch.setattr(serving, "NUM_HELDOUT", 32)
    serving.run(tmp_path / "f.json", ("async",), num_steps=3)
    found = figures(tmp_path / "f.json")
    ratio = found["asynchronous / synchronous"]
    rates = [found[f"{kind} training, tools of 1 s, steps/s"]["median"] for kind in ("synchronous", "asynchronous")]
    assert ratio["median"] == pytest.approx(rates[1] / rates[0])
    assert ratio["met"] == (ratio["median"] >= 1.5)
    assert 0 < found["utility after asynchronous training"]["median"] <= 1


@pytest.mark.parametrize(
    ("value", "at_most", "met"), [(1.0, True, True), (1.1, True, False), (1.0, False, True), (0.9, False, False)]
)
def test_a_target_is_met_on_its_own_side(value, at_most, met):
    assert serving.Figure("x", (0.0, value, 9.0), 1.0, at_most).met is met
