"""Training holds no second copy of the weights that it began with, unless a penalty compares with them."""

import gc
import weakref
from pathlib import Path
from typing import Any

import jax
import pytest

from jorch import cli
from jorch.export import pretrained
from jorch.rl import loop


@pytest.mark.slow
@pytest.mark.parametrize(("kl_coefficient", "held"), [(0.0, False), (0.1, True)])
def test_the_initial_weights_go_unless_they_are_a_reference(
    kl_coefficient: float, held: bool, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, take_step = pretrained.load, loop.take_step
    loaded: list[Any] = []
    alive: list[int] = []

    def watched_load(*arguments: Any, **settings: Any) -> pretrained.Pretrained:
        start = load(*arguments, **settings)
        loaded.extend(map(weakref.ref, jax.tree.leaves(start.params)))
        return start

    async def watched_take_step(*arguments: Any) -> Any:
        gc.collect()
        alive.append(sum(array() is not None for array in loaded))
        return await take_step(*arguments)

    monkeypatch.chdir(world)
    monkeypatch.setattr(pretrained, "load", watched_load)
    monkeypatch.setattr(loop, "take_step", watched_take_step)
    assert cli.main(["rl", "rl.yaml", "steps=1", f"algorithm.kl_coefficient={kl_coefficient}"]) == 0
    assert len(loaded) > 10
    assert alive == [len(loaded) if held else 0]
