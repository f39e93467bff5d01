"""Block sizes come from the user's file, then the shipped one, then a rule; the command writes what it measured."""

import json

import jax.numpy as jnp
import pytest

from kernels import tune, tuning
from kernels.attention.tiles import tile
from kernels.compat import Target, target
from kernels.tuning import Blocks

V5E = Target("tpu", "TPU v5 lite", False)


def entry(file, **kinds):
    file.write_text(json.dumps(kinds))
    return file


def test_files_come_before_the_rule_and_the_users_first(tmp_path):
    user = entry(tmp_path / "user.json", **{V5E.kind: [[4096, 256, 512], [16384, 512, 1024, 3]]})
    shipped = entry(tmp_path / "shipped.json", **{V5E.kind: [[1, 128, 256]]})
    found = [tuning.blocks(V5E, n, (user, shipped)) for n in (1000, 4096, 20000)]
    assert found == [(128, 256, 4), (256, 512, 4), (512, 1024, 3)]
    assert tuning.blocks(Target("tpu", "TPU v9", False), 300, (user, shipped)) == (384, 384, 4)
    assert tuning.blocks(V5E, 20000, (tmp_path / "none.json",)) == (512, 512, 4)
    assert tuning.blocks(Target("gpu", "NVIDIA H100", False), 20000, ()) == (128, 128, 4)


@pytest.mark.parametrize(
    ("blocks", "piece", "wanted"),
    [
        (Blocks(512, 512), 256, (256, 512)),
        (Blocks(512, 128), 256, (256, 128)),
        (Blocks(384, 192), 256, (128, 64)),
        (Blocks(128, 128), 8, (8, 128)),
    ],
)
def test_tiles_within_pieces_of_rows_nest(blocks, piece, wanted):
    assert blocks.within(piece)[:2] == wanted


def test_nothing_ships_that_nobody_measured():
    assert tuning.read(tuning.SHIPPED_FILE) == {}


@pytest.mark.parametrize("text", ["{", "[]", '{"TPU v5 lite": [[1, 2]]}', '{"TPU v5 lite": 3}'])
def test_a_file_of_something_else_is_refused(tmp_path, text):
    file = tmp_path / "blocks.json"
    file.write_text(text)
    with pytest.raises(ValueError, match="blocks.json: not block sizes; must be JSON like"):
        tuning.blocks(V5E, 8192, (file,))


def test_ties_stay_with_the_rule():
    first, slower, faster = (tune.Candidate(Blocks(n, n), s, None) for n, s in ((256, 1.0), (128, 0.99), (512, 0.9)))
    refused = tune.Candidate(Blocks(1024, 1024), None, "no memory")
    assert tune.fastest([first, slower, refused]) == first
    assert tune.fastest([first, faster, slower]) == faster
    with pytest.raises(ValueError, match="no candidate compiles: no memory"):
        tune.fastest([refused])


def test_what_spills_more_than_the_rule_is_not_timed():
    first, same, worse = (
        tune.Compiled(Blocks(128, 128, n), "a program", spilled, None) for n, spilled in ((2, 40), (3, 40), (4, 44))
    )
    refused = tune.Compiled(Blocks(128, 128, 5), None, 0, "shared memory")
    kept = tune.pruned([first, same, worse, refused])
    assert kept[:2] == [first, same]
    assert kept[2].refusal == "spills 44 bytes a thread, the first 40"
    assert kept[2].program is None
    assert kept[3] == refused


@pytest.mark.slow
def test_the_command_writes_what_attention_reads(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tune, "candidates", lambda *_: [Blocks(256, 256), Blocks(384, 256), Blocks(128, 256)])
    file = tmp_path / "new" / "blocks.json"
    assert tune.main(["--tokens", "512", "--timings", "2", "--out", str(file)]) == 0
    printed = capsys.readouterr().out
    ((num_tokens, *best),) = json.loads(file.read_text())[target().kind]
    assert num_tokens == 512
    assert f"512 tokens:  {best[0]} x {best[1]}  {best[2]} stages, written to {file}" in printed
    assert printed.count(" ms\n") == 2
    assert "384 x 256  4 stages    block_q=384 and block_k=256: one must be a multiple of the other" in printed
    assert tuning.blocks(target(), 600, (file,)) == tuple(best)
    assert tune.main(["--tokens", "0"]) == 2


def test_candidates_begin_with_the_rule_and_differ():
    pairs = tune.candidates(V5E, 8192)
    assert pairs[0] == (512, 512, 4)
    assert len(set(pairs)) == len(pairs) > 10
    assert tune.candidates(Target("gpu", "NVIDIA H100", False), 8192) == [(128, 128, n) for n in (4, 2, 3, 5)]


def test_a_mask_takes_them_where_none_are_given():
    mask = tile(jnp.full((1, 300), 300, jnp.int32))
    assert (mask.block_q, mask.block_k, mask.stages) == tuning.blocks(target(), 300)
