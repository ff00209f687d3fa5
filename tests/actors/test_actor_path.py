"""The whole way of the data: environment, actor, chunk, wire, shard, sample, against a list of what really happened."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

from actors.environments import make_environment
from common import wire
from common.config import EnvConfig, ExplorationConfig
from common.messages import SampleBatch
from replay_server.shard import ReplayShard

MODES = [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP, AutoresetMode.DISABLED]
DISCOUNT, CLIP, FLOOR = 0.9, 2.0, 0.001


def make_shard(spec, capacity=5_000):
    return ReplayShard(
        run="run",
        spec=spec,
        shard_index=0,
        shard_epoch=0,
        memory=64 << 20,
        capacity=capacity,
        min_size=1,
        samples_per_insert=None,
        limiter_buffer_samples=1,
        priority_exponent=0.0,
        send_compressed=True,
        seed=0,
    )


def assert_rows(got, expected):
    s_tm1, a_tm1, r_t, discount_t, s_t = got
    assert np.array_equal(s_tm1, expected.s_tm1)
    assert np.array_equal(s_t, expected.s_t)
    assert a_tm1 == expected.a_tm1
    assert abs(r_t - expected.r_t) < 1e-5  # f32 on the wire.
    assert abs(discount_t - expected.discount_t) < 1e-6


def run_path(make_rig, environment, num_steps, **settings):
    shard = make_shard(environment.spec)
    rig = make_rig(environment, shard=shard, discount=DISCOUNT, reward_clip=CLIP, **settings)
    rig.step(num_steps)
    assert all(reply.refusal is None for reply in rig.writer.replies)
    return rig, shard


def rows_by_env(rig, rows_of, num_envs, env_of):
    """What was sent, by environment: a chunk holds transitions of one environment only."""
    sent = [[] for _ in range(num_envs)]
    for chunk in rig.writer.chunks():
        rows = rows_of(chunk)
        envs = {env_of(row) for row in rows}
        assert len(envs) == 1
        sent[envs.pop()] += zip(rows, chunk.priority.tolist(), strict=True)
    return sent


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.value)
@pytest.mark.parametrize(
    ("pixels", "frame_stack", "n_step", "chunk_transitions", "chunk_bytes"),
    [
        (False, 1, 1, 1, 90_000),
        (False, 1, 3, 7, 90_000),
        (True, 4, 1, 5, 90_000),
        (True, 4, 3, 1, 90_000),
        (True, 4, 5, 64, 400),
        (False, 4, 5, 64, 200),
        (True, 2, 7, 16, 90_000),
    ],
)
def test_path_brings_every_transition_once(
    make_rig, scripted, random_script, oracle, rows_of, mode, pixels, frame_stack, n_step, chunk_transitions, chunk_bytes
):
    """Kills: a stack that reaches into the last episode, the new episode's first observation as s_t of an ended one, a reset
    stored as a transition, a plane forgotten or misnumbered at a chunk's border, an action of the neighbour."""
    rng = np.random.default_rng([n_step, frame_stack, chunk_transitions])
    environment, envs = scripted([random_script(rng), random_script(rng)], mode=mode, frame_stack=frame_stack, pixels=pixels)
    settings = {"n_step": n_step, "chunk_transitions": chunk_transitions, "chunk_bytes": chunk_bytes}
    num_steps = 160
    rig, shard = run_path(make_rig, environment, num_steps, **settings)
    keys = {"n_step": n_step, "discount": DISCOUNT, "reward_clip": CLIP, "frame_stack": frame_stack}
    expected = [[t for episode in env.episodes for t in oracle(episode, **keys)] for env in envs]

    index_of = {t.s_tm1.tobytes(): env for env in range(2) for t in expected[env]}
    sent = rows_by_env(rig, rows_of, 2, lambda row: index_of[row[0].tobytes()])
    for env in range(2):
        # The sent ones are the oracle's from the first on; only the tail may still wait.
        missing = len(expected[env]) - len(sent[env])
        assert 0 <= missing < chunk_transitions + n_step
        for (row, _), wanted in zip(sent[env], expected[env], strict=False):
            assert_rows(row, wanted)
    assert {t.discount_t == 0 for t in expected[0]} == {True, False}  # The script had both kinds of end.

    # Item i of the shard is the i-th transition sent.
    in_order = [row for chunk in rig.writer.chunks() for row in rows_of(chunk)]
    assert shard.size == len(in_order) == rig.actor.stats().sent
    columns = [np.stack(column) for column in zip(*in_order, strict=True)]
    for _ in range(8):
        batch = wire.unpack(shard.sample(128).batch, SampleBatch)
        for sampled, wanted in zip(zip(*rows_of(batch), strict=True), columns, strict=True):
            np.testing.assert_array_equal(np.stack(sampled), wanted[batch.item_id])

    # The ledger of steps: what the environments logged is what the actor counted.
    assert rig.actor.env_steps == sum(len(episode.actions) for env in envs for episode in env.episodes)
    # A chunk has no block before or behind those it needs.
    for chunk in rig.writer.chunks():
        blocks = np.array([*chunk.s_tm1.flat, *chunk.s_t.flat]) // chunk.planes_per_block
        assert (blocks.min(), blocks.max()) == (0, chunk.num_blocks - 1)


def values_of(network, stacks):
    with torch.inference_mode():
        return network(torch.from_numpy(np.stack(stacks))).numpy().astype(np.float64)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.value)
@pytest.mark.parametrize("n_step", [1, 3])
def test_path_first_priorities_are_those_of_the_definition(make_rig, scripted, random_script, oracle, rows_of, mode, n_step):
    """Kills: a truncated end that bootstraps from the next episode's first observation, or not at all; the value of the
    greedy action in place of the one taken; a priority given to the neighbour; the floor forgotten."""
    rng = np.random.default_rng(5)
    environment, envs = scripted([random_script(rng), random_script(rng)], mode=mode, frame_stack=2, pixels=True)
    rig, _ = run_path(make_rig, environment, 150, n_step=n_step, chunk_transitions=4)
    keys = {"n_step": n_step, "discount": DISCOUNT, "reward_clip": CLIP, "frame_stack": 2}
    num_compared, num_told_apart = 0, 0
    for env in envs:
        pairs = [
            (t, episode, next_one)
            for episode, next_one in zip(env.episodes, env.episodes[1:], strict=False)
            for t in oracle(episode, **keys)
        ]
        priority_of = {
            row[0].tobytes(): priority
            for chunk in rig.writer.chunks()
            for row, priority in zip(rows_of(chunk), chunk.priority.tolist(), strict=True)
        }
        transitions = [t for t, _, _ in pairs]
        qa_tm1 = values_of(rig.network, [t.s_tm1 for t in transitions])[np.arange(len(pairs)), [t.a_tm1 for t in transitions]]
        v_t = values_of(rig.network, [t.s_t for t in transitions]).max(axis=1)
        zero = np.zeros_like(env.episodes[0].observations[0])
        v_next = values_of(rig.network, [np.stack([zero, following.observations[0]]) for _, _, following in pairs]).max(axis=1)
        for (t, episode, _), qa, value, decoy in zip(pairs, qa_tm1, v_t, v_next, strict=True):
            if t.s_tm1.tobytes() not in priority_of:
                continue
            priority = priority_of[t.s_tm1.tobytes()]
            assert priority == pytest.approx(abs(t.r_t + t.discount_t * value - qa) + FLOOR, abs=1e-5)
            num_compared += 1
            if episode.end == "truncated" and t.completed_at == len(episode.actions):
                num_told_apart += abs(abs(t.r_t + t.discount_t * decoy - qa) + FLOOR - priority) > 1e-3
    assert num_compared > 200 and num_told_apart > 10


def test_path_atari_life_loss_agrees_with_definition(make_rig, rows_of):
    """The environment's own record is cut at lost lives by hand; stacks reach back over a lost life, but not over a reset."""
    frame_stack, n_step, num_steps = 3, 3, 330
    config = EnvConfig(game="breakout", frame_stack=frame_stack, life_loss_terminates=True)
    environment = make_environment(config, 2)
    rig, _ = run_path(
        make_rig,
        environment,
        num_steps,
        n_step=n_step,
        chunk_transitions=20,
        exploration=ExplorationConfig(initial=1.0, final=1.0),
    )
    expected, num_lives_lost, num_resets = [], 0, 0
    for env in range(2):
        observations = [rig.environment.first_planes[0][env]]
        mine, window = [], []

        def flush(window, *, at_end):
            done = []
            while window and (at_end or len(window) == n_step):
                r_t = sum(DISCOUNT**i * min(max(step[2], -CLIP), CLIP) for i, step in enumerate(window))
                last = window[-1]
                done.append((window[0][0], window[0][1], r_t, 0.0 if last[4] else DISCOUNT ** len(window), last[3]))
                window.pop(0)
            return done

        def stack(observations):
            padding = [np.zeros_like(observations[0])] * frame_stack
            return np.stack([*padding, *observations][-frame_stack:])

        for actions, step in zip(rig.environment.actions, rig.environment.steps, strict=True):
            if step.is_first[env]:
                assert not window
                observations = [step.planes[env]]
                num_resets += 1
                continue
            source = stack(observations)
            observations.append(step.planes[env])
            window.append((source, int(actions[env]), step.reward[env], stack(observations), bool(step.terminated[env])))
            at_end = bool(step.terminated[env] or step.truncated[env])
            num_lives_lost += bool(step.terminated[env])
            mine += flush(window, at_end=at_end)
        expected.append(mine)
    assert num_lives_lost > num_resets > 0, "the games were too short to tell a lost life from an end"

    sent = [[] for _ in range(2)]
    for chunk in rig.writer.chunks():
        rows = rows_of(chunk)
        for env in range(2):
            start = len(sent[env])
            if len(expected[env]) > start and np.array_equal(rows[0][0], expected[env][start][0]):
                sent[env] += rows
                break
        else:
            pytest.fail("a chunk that begins with no expected transition")
    for env in range(2):
        assert 0 <= len(expected[env]) - len(sent[env]) < 20 + n_step
        for row, wanted in zip(sent[env], expected[env], strict=False):
            np.testing.assert_array_equal(row[0], wanted[0])
            assert row[1] == wanted[1]
            assert row[2:4] == pytest.approx(wanted[2:4], rel=1e-6, abs=1e-6)
            np.testing.assert_array_equal(row[4], wanted[4])
