"""The in-process sampler as the driver uses it: many trajectories of several turns, against the float64 model.

A trajectory here is a prompt and a list of observations; after each completion comes the next observation.
"""

import asyncio
import dataclasses
import functools
import itertools
import time
import zlib
from dataclasses import dataclass

import jax
import numpy as np
import pytest

from jorch.data.packing import pack
from jorch.rollout import jax_sampler
from jorch.rollout.jax_sampler import JaxSampler
from jorch.rollout.row_batch import RowBatch
from jorch.rollout.stats import SamplerStats
from jorch.sections import MeshConfig, SamplerConfig
from jorch.sharding import make_mesh
from jorch.train.step import make_logprobs_fn
from jorch.types import CompletionRequest, Sample

pytestmark = pytest.mark.usefixtures("quick_compiles")

MAX_TOKENS, STOP_ID, CONTEXT = 3, 9, 46
# Float32 against float64 through two layers, logits up to about 10.
ATOL = 2e-4


@dataclass(frozen=True)
class Script:
    """What a trajectory is told. `name` decides its seeds."""

    name: str
    prompt: tuple[int, ...]
    observations: tuple[tuple[int, ...], ...] = ()
    slow_turn: int = -1
    """Before this turn it waits for `late`."""
    forked_turn: int = -1
    """This turn's prompt forgets the first completion."""


def scripts(count, *, siblings=1, seed=0):
    """Ragged prompts (shared by `siblings`), 1 to 6 turns. Each turn some rows are told much and the others little, so
    that blocks add up to more columns than any row has tokens."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        if i % siblings == 0:
            prompt = tuple(rng.integers(0, 64, rng.choice([4, 5, 8])).tolist())
        lengths = [7 if (i + turn) % 3 == 0 else 1 for turn in range(rng.integers(0, 6))]
        turns = [tuple(rng.integers(0, 64, length).tolist()) for length in lengths]
        made.append(Script(f"t{i}", prompt, tuple(turns)))
    return made


async def play(sampler, script, temperature, late=None):
    """The prompt and completion of every turn."""
    tokens, turns = np.array(script.prompt, np.int32), []
    try:
        for number in range(len(script.observations) + 1):
            if number == script.slow_turn and late is not None:
                await late.wait()
            seed = zlib.crc32(f"{script.name}/{number}".encode())
            completion = await sampler.complete(CompletionRequest(script.name, tokens, MAX_TOKENS, temperature, seed))
            turns.append((tokens, completion))
            if number < len(script.observations):
                observation = np.array(script.observations[number], np.int32)
                kept = tokens if number + 1 == script.forked_turn else np.concatenate([tokens, completion.token_ids])
                tokens = np.concatenate([kept, observation])
    finally:
        sampler.release(script.name)
    return turns


def play_all(sampler, made, temperature=0.0):
    """Turns by name, all trajectories at once."""

    async def run():
        sampler.expect([script.name for script in made])
        async with asyncio.timeout(120):
            return await asyncio.gather(*(play(sampler, script, temperature) for script in made))

    return dict(zip([script.name for script in made], asyncio.run(run()), strict=True))


@pytest.fixture(scope="module")
def make_sampler(tiny):
    """Samplers of any config that share their compiled programs."""
    model, params = tiny
    samplers = []

    def make(batches=1, **changes):
        config = SamplerConfig(**({"max_rows": 32, "max_context_tokens": CONTEXT, "prefill_chunk_tokens": 4} | changes))
        sampler = JaxSampler(model, params, config, max_tokens=MAX_TOKENS, stop_id=STOP_ID, batches=batches)
        if samplers:
            sampler.decoder = samplers[0].decoder
        samplers.append(sampler)
        return sampler

    yield make
    for sampler in samplers:
        sampler.close()


@pytest.fixture
def kept_once(monkeypatch):
    """From how many tokens on prompts' beginnings are kept once."""
    return lambda num: monkeypatch.setattr(jax_sampler, "RowBatch", functools.partial(RowBatch, min_shared=num))


@pytest.fixture
def check(tiny, qwen3_logits):
    """Compare turns with the float64 model, which has no cache."""
    model, params = tiny

    def check_turns(turns, temperature):
        for tokens, completion in turns:
            ids = completion.token_ids
            logits = qwen3_logits(params, model.config, np.concatenate([tokens, ids]))[len(tokens) - 1 : -1]
            chosen = logits[np.arange(len(ids)), ids]
            if temperature == 0:
                np.testing.assert_array_less(logits.max(-1) - ATOL, chosen)
            scaled = logits / (temperature or 1.0)
            normaliser = np.log(np.exp(scaled - scaled.max(-1, keepdims=True)).sum(-1)) + scaled.max(-1)
            expected = chosen / (temperature or 1.0) - normaliser
            np.testing.assert_allclose(completion.logprobs, expected, rtol=0, atol=ATOL)
            stopped = ids[-1] == STOP_ID
            assert completion.finish_reason == ("stop" if stopped else "length")
            assert stopped or len(ids) == MAX_TOKENS

    return check_turns


@pytest.mark.parametrize(("temperature", "lanes"), [(0.0, 1), (1.0, 1), (1.0, 3)])
def test_a_cache_kept_over_turns_equals_none(temperature, lanes, make_sampler, check):
    """40 trajectories in two generations: rows end at different turns, batches shrink, columns are compacted."""
    sampler = make_sampler(lanes=lanes)
    made = scripts(40, siblings=4)
    played = play_all(sampler, made, temperature)
    for turns in played.values():
        check(turns, temperature)
    assert sampler.decoder.compact._cache_size() > 0, "the columns never ran out"
    assert sampler.decoder.take_rows._cache_size() > 1, "no batch ever shrank"
    assert sampler.stats.sampled_tokens == sum(len(c.token_ids) for turns in played.values() for _, c in turns)


@pytest.mark.parametrize(("temperature", "lanes"), [(0.0, 1), pytest.param(1.0, 2, marks=pytest.mark.slow)])
def test_prompts_whose_first_tokens_are_kept_once_change_nothing(temperature, lanes, make_sampler, check, kept_once):
    """Groups that end raggedly, lose rows and are compacted; the same tokens as with a copy for each row."""
    made = scripts(40, siblings=4)
    sampler = make_sampler(lanes=lanes)
    copied = play_all(sampler, made, temperature)
    shared, shrunk = (program._cache_size() for program in (sampler.decoder.share, sampler.decoder.take_rows))
    compacted = sampler.decoder.compact._cache_size()
    kept_once(4)
    for name, turns in play_all(make_sampler(lanes=lanes), made, temperature).items():
        check(turns, temperature)
        for (_, completion), (_, expected) in zip(turns, copied[name], strict=True):
            np.testing.assert_array_equal(completion.token_ids, expected.token_ids)
    assert sampler.decoder.share._cache_size() > shared
    assert sampler.decoder.compact._cache_size() > compacted, "its columns never ran out"
    if lanes == 1:  # a smaller batch is never smaller than eight rows
        assert sampler.decoder.take_rows._cache_size() > shrunk, "no batch with shared tokens ever shrank"


@pytest.mark.parametrize("fewest", [None, 4])
def test_a_prompt_that_forks_is_read_anew(fewest, make_sampler, check, kept_once):
    """Some rows forget what they said, at different turns, while others go on."""
    if fewest:
        kept_once(fewest)
    made = [
        dataclasses.replace(script, forked_turn=1 + number % 3) if number % 2 else script
        for number, script in enumerate(scripts(24, siblings=4, seed=3))
    ]
    played = play_all(make_sampler(), made)
    forks = 0
    for turns in played.values():
        check(turns, 0.0)
        for (tokens, completion), (after, _) in itertools.pairwise(turns):
            past = np.concatenate([tokens, completion.token_ids])
            forks += not np.array_equal(after[: len(past)], past)
    assert forks > 5


def test_sampled_tokens_do_not_depend_on_the_batch(make_sampler):
    sampler = make_sampler()
    made = scripts(40, siblings=4)
    together = play_all(sampler, made, 1.0)
    for few in (made[:3], made[33:34]):
        for name, turns in play_all(sampler, few, 1.0).items():
            for (_, completion), (_, expected) in zip(turns, together[name], strict=True):
                np.testing.assert_array_equal(completion.token_ids, expected.token_ids)
                np.testing.assert_allclose(completion.logprobs, expected.logprobs, rtol=0, atol=ATOL)
    in_lanes, again = (play_all(make_sampler(lanes=3), made, 1.0) for _ in range(2))
    for name, turns in in_lanes.items():
        for (_, completion), (_, expected), (_, same) in zip(turns, together[name], again[name], strict=True):
            np.testing.assert_array_equal(completion.token_ids, expected.token_ids)
            np.testing.assert_array_equal(completion.logprobs, same.logprobs)  # whichever lane was faster
    siblings = [tuple(c.token_ids.tolist() for _, c in together[f"t{i}"]) for i in range(4)]
    assert len(set(map(str, siblings))) > 1, "siblings of one prompt draw different tokens"


def test_logprobs_equal_the_trainers_on_the_packed_samples(make_sampler, tiny):
    model, params = tiny
    samples = []
    for turns in play_all(make_sampler(), scripts(24, siblings=4, seed=1), 1.0).values():
        prompt, last = turns[-1]
        token_ids = np.concatenate([prompt, last.token_ids])
        mask, logprobs = np.zeros(len(token_ids), bool), np.zeros(len(token_ids), np.float32)
        for tokens, completion in turns:
            where = slice(len(tokens), len(tokens) + len(completion.token_ids))
            mask[where], logprobs[where] = True, completion.logprobs
        samples.append(Sample(token_ids, mask, logprobs, 1.0))
    batch = pack(samples, row_tokens=96, micro_rows=4, num_micro=6)
    trained = np.asarray(make_logprobs_fn(model)(params, batch))
    where = batch.loss_weights > 0
    assert where.sum() == sum(s.loss_mask.sum() for s in samples)
    np.testing.assert_allclose(trained[where], batch.sampler_logprobs[where], rtol=0, atol=1e-4)


def test_no_program_is_compiled_for_shapes_that_were_there_before(make_sampler, tiny):
    sampler = make_sampler()
    play_all(sampler, scripts(40, siblings=4), 1.0)
    warm = sampler.decoder.num_programs()
    sampler.publish(jax.tree.map(lambda x: x * 1.01, tiny[1]), 1)
    played = play_all(sampler, scripts(40, siblings=4), 1.0)
    assert sampler.decoder.num_programs() == warm
    assert {v for turns in played.values() for _, c in turns for v in c.policy_versions.tolist()} == {1}


def test_new_weights_in_mid_trajectory_draw_its_next_turn(make_sampler, tiny):
    """Which weights drew a token is told; those of before keep the keys and values that they computed."""
    _, params = tiny
    sampler, script = make_sampler(), Script("t", (5, 6, 7), ((8,), (9, 10)), slow_turn=1)

    async def run():
        late = asyncio.Event()
        playing = asyncio.create_task(play(sampler, script, 0.0, late))
        while sampler.stats.waves == 0:
            await asyncio.sleep(0.01)
        sampler.publish(jax.tree.map(lambda x: x * 1.5, params), 1)
        late.set()
        return await playing

    turns = asyncio.run(run())
    assert [set(c.policy_versions.tolist()) for _, c in turns] == [{0}, {1}, {1}]
    undisturbed = play_all(make_sampler(), [dataclasses.replace(script, slow_turn=-1)], 0.0)["t"]
    same = [np.array_equal(c.logprobs, other.logprobs) for (_, c), (_, other) in zip(turns, undisturbed, strict=True)]
    assert same == [True, False, False]


def test_announced_batches_have_lanes_of_their_own(make_sampler):
    """A second one does not wait for the end of the first, a third one does."""
    sampler = make_sampler(batches=2)
    made = [[Script(f"{batch}{i}", (batch, i, 2)) for i in range(3)] for batch in range(3)]

    async def run():
        late = asyncio.Event()
        for batch in made:
            sampler.expect([script.name for script in batch])
        held = dataclasses.replace(made[0][0], slow_turn=0)
        first = [asyncio.create_task(play(sampler, held, 0.0, late))]
        first += [asyncio.create_task(play(sampler, script, 0.0)) for script in made[0][1:]]
        third = [asyncio.create_task(play(sampler, script, 0.0)) for script in made[2]]
        async with asyncio.timeout(120):
            await asyncio.gather(*(play(sampler, script, 0.0) for script in made[1]))
            waiting = not any(task.done() for task in first)
            late.set()
            await asyncio.gather(*first, *third)
        return waiting

    assert asyncio.run(run())


def test_the_warm_up_compiles_the_turns_of_every_batch_size(tiny):
    model, params = tiny
    params = jax.device_put(params, model.shardings(make_mesh(MeshConfig())))  # as a train step returns them
    config = SamplerConfig(max_rows=32, max_context_tokens=CONTEXT, prefill_chunk_tokens=4)
    sampler = JaxSampler(model, params, config, max_tokens=MAX_TOKENS, stop_id=STOP_ID)
    sampler.warm_up(append_tokens=3)
    play_all(sampler, [Script(f"one{i}", (1, 2, 3, 4)) for i in range(32)])  # compiles the prompts' programs
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: compiled.append(event))
    play_all(sampler, [Script(f"more{i}", (1, 2, 3, 4), ((5, 6, 7),) * (i % 4)) for i in range(32)])
    sampler.close()
    assert "/jax/core/compile/backend_compile_duration" not in compiled


def test_an_append_block_may_be_any_number_of_tokens(make_sampler, check):
    """9 is no power of two: padding must not reach past the columns when the longest row is full."""
    sampler = make_sampler(prefill_chunk_tokens=9, max_rows=8, max_context_tokens=24)
    long = Script("long", (1,) * (24 - MAX_TOKENS))
    made = [long, Script("short", (7, 2, 3, 4, 5, 6, 8, 1, 0), ((3,) * 9,))]
    for turns in play_all(sampler, made).values():
        check(turns, 0.0)


def test_a_straggler_holds_up_nobody_after_max_wait_s(make_sampler, check):
    """Late at its first turn or at a later one, it then gets what it would have got at once."""
    for slow_turn in (0, 1):
        sampler = make_sampler(max_wait_s=0.05)
        straggler = Script("slow", (5, 6, 7), ((8,), (9, 10)), slow_turn)
        others = [Script(f"f{i}", (i, 1, 2), ((3, 4),)) for i in range(3)]

        async def run(sampler=sampler, straggler=straggler, others=others):
            late = asyncio.Event()
            sampler.expect([straggler.name, *(script.name for script in others)])
            async with asyncio.timeout(120):
                slow = asyncio.create_task(play(sampler, straggler, 0.0, late))
                fast = await asyncio.gather(*(play(sampler, script, 0.0) for script in others))
                late.set()
                return [await slow, *fast]

        for turns in asyncio.run(run()):
            check(turns, 0.0)


def test_who_asks_during_a_wave_waits_for_max_wait_s_only(make_sampler, check):
    """The others hold their answers back; nothing but the end of the wave can tell that somebody asked."""
    sampler = make_sampler(max_wait_s=0.05)
    made = [Script("slow", (5, 6)), Script("fast", (1, 2))]

    async def run():
        sampler.expect(["slow", "fast"])
        fast = asyncio.create_task(sampler.complete(CompletionRequest("fast", np.int32([1, 2]), MAX_TOKENS, 0.0, 1)))
        while sampler.stats.waves == 0 and not sampler.stats._running:
            await asyncio.sleep(0.01)
        async with asyncio.timeout(120):
            slow = await play(sampler, made[0], 0.0)
            turns = [slow, [(np.int32([1, 2]), await fast)]]
        sampler.release("fast")
        return turns

    for turns in asyncio.run(run()):
        check(turns, 0.0)


def test_without_max_wait_s_everybody_is_waited_for(make_sampler):
    """So that the same run always makes the same batches."""
    sampler = make_sampler()

    async def run():
        late = asyncio.Event()
        sampler.expect(["slow", "fast"])
        slow = asyncio.create_task(play(sampler, Script("slow", (5, 6), slow_turn=0), 0.0, late))
        fast = asyncio.create_task(play(sampler, Script("fast", (1, 2)), 0.0))
        await asyncio.sleep(0.2)
        waited = not fast.done()
        late.set()
        await asyncio.gather(slow, fast)
        return waited

    assert asyncio.run(run())
    assert sampler.stats.waves == 1


def test_a_lane_goes_on_while_another_waits(make_sampler):
    """One lane's tool calls take their time beside the other's decoding."""
    sampler = make_sampler(lanes=2)
    made = [Script(f"t{i}", (i, 1, 2), ((3, 4), (5,))) for i in range(6)]

    async def run():
        late = asyncio.Event()
        sampler.expect([script.name for script in made])
        waiting = asyncio.create_task(play(sampler, dataclasses.replace(made[0], slow_turn=1), 0.0, late))
        others = [asyncio.create_task(play(sampler, script, 0.0)) for script in made[1:]]
        async with asyncio.timeout(120):
            await asyncio.gather(*others[2:])
            held_up = [task.done() for task in (waiting, *others[:2])]
            late.set()
            await asyncio.gather(waiting, *others)
        return held_up

    assert asyncio.run(run()) == [False] * 3
    assert sampler.stats.waves == 6


def test_busy_time_is_counted_once_for_lanes_side_by_side():
    stats = SamplerStats()
    began = time.perf_counter()
    with stats.wave():
        time.sleep(0.02)
        with stats.wave():
            time.sleep(0.02)
    time.sleep(0.05)
    with stats.wave():
        time.sleep(0.02)
    assert 0.06 <= stats.busy_s <= time.perf_counter() - began - 0.05


def test_rows_that_leave_without_asking_leave_no_gap(make_sampler, check):
    """9 expected rows need the bigger batch, the 8 that ask the smaller one."""
    sampler = make_sampler()
    made = scripts(9, seed=2)

    async def run():
        sampler.expect([script.name for script in made])
        sampler.release(made[0].name)
        async with asyncio.timeout(120):
            return await asyncio.gather(*(play(sampler, script, 0.0) for script in made[1:]))

    for turns in asyncio.run(run()):
        check(turns, 0.0)


def test_a_trajectory_may_begin_again(make_sampler, check):
    """After an infrastructure failure the driver releases it and asks from its first prompt on."""
    sampler = make_sampler()
    made = scripts(5, seed=3)

    async def run():
        sampler.expect([script.name for script in made])
        others = [asyncio.create_task(play(sampler, script, 0.0)) for script in made[1:]]
        first = made[0]
        request = CompletionRequest(first.name, np.array(first.prompt, np.int32), MAX_TOKENS, 0.0, 1)
        async with asyncio.timeout(120):
            await sampler.complete(request)
            sampler.release(first.name)
            return [await play(sampler, first, 0.0), *await asyncio.gather(*others)]

    for turns in asyncio.run(run()):
        check(turns, 0.0)


def test_a_failure_reaches_everybody_who_waits(make_sampler, monkeypatch):
    sampler = make_sampler()

    def fail(*_):
        raise MemoryError("out of memory")

    monkeypatch.setattr(RowBatch, "decode", fail)

    async def run():
        sampler.expect(["a", "b"])
        return await asyncio.gather(
            *(play(sampler, Script(name, (1, 2)), 0.0) for name in "ab"), return_exceptions=True
        )

    assert [type(error) for error in asyncio.run(run())] == [MemoryError, MemoryError]


def test_what_breaks_the_contract_is_our_own_mistake(make_sampler, tiny):
    sampler = make_sampler()

    async def ask(tokens):
        return await sampler.complete(CompletionRequest("a", np.array(tokens, np.int32), MAX_TOKENS, 0.0, 1))

    with pytest.raises(AssertionError, match="exceed the context"):
        asyncio.run(ask([1] * CONTEXT))
