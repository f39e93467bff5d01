"""What several processes share; runs of several real ones are in commands/test_launch.py."""

import jax
import pytest

from jorch.processes import gather, own_address, own_folder, own_share


@pytest.fixture
def among_four(monkeypatch):
    def become(rank):
        monkeypatch.setattr(jax, "process_count", lambda: 4)
        monkeypatch.setattr(jax, "process_index", lambda: rank)

    return become


def test_shares_are_even_and_leave_nothing_out(among_four):
    items = list("abcdefgh")
    shares = []
    for rank in range(4):
        among_four(rank)
        shares.append(items[own_share(8, "tasks_per_step")])
    assert shares == [["a", "b"], ["c", "d"], ["e", "f"], ["g", "h"]]
    with pytest.raises(ValueError, match=r"^tasks_per_step=6 is no multiple of the 4 processes that share it$"):
        own_share(6, "tasks_per_step")


def test_each_process_has_its_own_folder_and_address(among_four, tmp_path):
    among_four(2)
    assert own_folder(tmp_path) == tmp_path / "processes" / "2"
    assert own_folder(tmp_path).is_dir()
    assert own_address("http://tools-{process}:8900") == "http://tools-2:8900"


def test_alone_everything_is_ones_own(tmp_path):
    assert own_share(5, "tasks_per_step") == slice(0, 5)
    assert own_folder(tmp_path) == tmp_path
    assert gather([1, 2]) == [1, 2]
