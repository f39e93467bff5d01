"""What several processes share; runs of several real ones are in commands/test_launch.py."""

import socket
import subprocess
import sys

import jax
import pytest

from jorch.model.attention import chosen_paths
from jorch.processes import gather, own_address, own_folder, own_share
from jorch.sections import MeshConfig
from jorch.sharding import make_mesh


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


@pytest.mark.parametrize(
    ("num_tokens", "line"),
    [
        (128, "reference: rows of 128 tokens are at most one tile of 256"),
        (1024, "xla_chunked: it skips invisible tiles on any device"),
    ],
)
def test_the_path_of_attention_is_known_beforehand(num_tokens, line, tiny_config):
    """And again, though a process logs each line once only."""
    for _ in range(2):
        assert chosen_paths(tiny_config(), num_tokens, make_mesh(MeshConfig())) == [line]


DISAGREEING = """
import sys
from jorch.model.attention import chosen_paths
from jorch.processes import check_agreement, join
from jorch.sections import MeshConfig, ModelConfig
from jorch.sharding import make_mesh
from kernels.attention import api, context
place, fsdp, num_context, config = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
join(place)
mesh = make_mesh(MeshConfig(fsdp=fsdp, context=num_context))

def check():
    model = ModelConfig.model_validate_json(config)
    check_agreement("attention", "; ".join(chosen_paths(model, 1024, mesh)))

check()
if place.startswith("1/"):  # as if a kernel had failed here
    for module in (api, context):
        module.choose = lambda *_: ("xla_chunked", "not the kernel: it is off by 0.5 here")
try:
    check()
except ValueError as error:
    print(error, file=sys.stderr)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("fsdp", "num_context"), [("2", "1"), ("1", "2")])
def test_processes_that_would_run_different_programs_stop(fsdp, num_context, tiny_config):
    """Each with a device of its own; a row over both of them, or not."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    children = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                DISAGREEING,
                f"{rank}/2@127.0.0.1:{port}",
                fsdp,
                num_context,
                tiny_config().model_dump_json(),
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for child in children:
        _, said = child.communicate(timeout=120)
        assert child.returncode == 0, said
        assert said.splitlines()[-1] == (
            "attention differs between processes, which would wait for each other for ever: "
            "process 0 has 'xla_chunked: it skips invisible tiles on any device', "
            "process 1 has 'xla_chunked: not the kernel: it is off by 0.5 here'; "
            "run on equal devices, and look at that one"
        )
