"""The actor: the order of one step, waiting, parameters, counters and epsilon."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from torch import nn

from actors.environments import make_environment
from common.config import EnvConfig, ExplorationConfig, NetworkConfig
from common.errors import NonFiniteError
from common.networks import QNetwork, make_network

FOREVER = [([1.0] * 50, "truncated")]
PLAIN = [([1.0, 2.0, 4.0], "terminated"), ([8.0, 16.0], "truncated")]


class TapedNetwork(QNetwork):
    """Writes every forward pass on the tape."""

    tape: list[str]

    def forward(self, observations, noise=None):
        self.tape.append("forward")
        return super().forward(observations, noise)


def constant_network(spec, action):
    """A network that prefers one action everywhere."""
    network = make_network(NetworkConfig(hidden_sizes=()), spec, 0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
        last.bias[action] = 1.0
    return network


GREEDY = ExplorationConfig(initial=0.0, final=0.0)


def test_actor_step_order(make_rig, scripted):
    """Parameters are looked for before acting, a chunk is packed when its last state has a value, and sent before the next
    step; replay is asked before anything is done."""
    environment, _ = scripted([FOREVER])
    network = TapedNetwork(NetworkConfig(hidden_sizes=()), environment.spec)
    network.tape = []
    rig = make_rig(environment, network=network, n_step=1, chunk_transitions=1, pull_period_steps=2)
    network.tape = rig.tape
    for _ in range(3):
        assert rig.actor.send_waiting(0.0)
        rig.actor.step()
    rig.actor.close(1.0)
    assert rig.tape == [
        *["reset"],
        *["ready", "poll", "forward", "env step"],
        *["ready", "forward", "env step"],
        *["ready", "push", "ready", "poll", "forward", "env step"],
        *["drain", "env close"],
    ]


def test_actor_never_steps_while_replay_says_wait(make_rig, scripted):
    environment, _ = scripted([FOREVER])
    rig = make_rig(environment, chunk_transitions=1)
    rig.writer.waits_for = ["shard 0: actors wait for the learner"] * 1_000_000
    stats = rig.actor.run(0.02)
    assert "env step" not in rig.tape and "push" not in rig.tape and "wait" in rig.tape
    assert stats.waits_for == "shard 0: actors wait for the learner"
    assert 0 < stats.waiting_seconds < 1.0
    rig.writer.waits_for = []
    stats = rig.actor.run(0.02)
    assert "env step" in rig.tape
    assert stats.waits_for is None


def test_actor_acts_on_for_answers_alone_until_more_chunks_wait_than_it_has_environments(make_rig, scripted):
    """Kills: an actor that stands still for every answer, and one that piles up chunks for a shard which hangs."""
    environment, _ = scripted([FOREVER, FOREVER])
    rig = make_rig(environment, n_step=1, chunk_transitions=5)
    rig.writer.is_slow = True
    rig.writer.waits_for = ["actors wait for the shards to take 4 chunks"] * 1_000_000
    stats = rig.actor.run(0.2)
    assert rig.tape.count("env step") == 11, "the second two chunks are there when the values of step 11 are"
    assert len(rig.actor._outbox) == 4 and "push" not in rig.tape
    assert stats.waits_for == "actors wait for the shards to take 4 chunks" and stats.sent == 0
    rig.writer.waits_for = []
    rig.actor.run(0.02)
    assert [chunk.seq for chunk in rig.writer.chunks()[:4]] == [0, 1, 2, 3]


@pytest.mark.parametrize("mode", list(AutoresetMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("chunk_bytes", [60, 90_000])
def test_chunks_are_the_same_to_the_bit_when_every_step_is_looked_at_alone(make_rig, scripted, mode, chunk_bytes):
    """Kills: a run that is looked at too late for a chunk that is full by its transitions or its bytes, or from a wrong value on."""

    def play(alone):
        environment, _ = scripted([[([1.0] * 23, "truncated")], PLAIN, [([3.0] * 40, "terminated")]], mode=mode)
        rig = make_rig(environment, n_step=3, chunk_transitions=7, chunk_bytes=chunk_bytes)
        for _ in range(200):
            if alone:
                rig.actor._num_until_full = 0
            rig.step(1)
        return rig

    together, alone = play(False), play(True)
    assert len(together.writer.messages) > 60 and together.actor.stats().env_steps == alone.actor.stats().env_steps
    for one, other in zip(together.writer.messages, alone.writer.messages, strict=True):
        assert one.tobytes() == other.tobytes()


def test_a_restart_within_a_run_goes_on_to_the_bit(make_rig):
    def make():
        environment = make_environment(EnvConfig(game="CartPole-v1"), 2)
        return make_rig(environment, n_step=3, chunk_transitions=16, keeps_actions=True)

    straight, first, second = make(), make(), make()
    straight.step(120)
    before = 50
    first.step(before)
    while not first.actor._run_steps:
        first.step(1)
        before += 1
    arrays, values = first.actor.state()
    second.actor.restore(arrays, values)
    second.step(120 - before)
    messages = [message.tobytes() for message in first.writer.messages + second.writer.messages]
    assert len(second.writer.messages) > 3
    assert messages == [message.tobytes() for message in straight.writer.messages]


def test_actor_looks_for_parameters_while_it_waits(make_rig, scripted):
    """Kills: an actor that the limiter holds back keeps old parameters, and the alarm takes it for a broken one."""
    environment, _ = scripted([FOREVER])
    rig = make_rig(environment, pull_period_steps=1000)
    rig.actor.step()
    rig.params.publish(rig.network, epoch=0, version=7)
    rig.tape.clear()
    rig.writer.waits_for = ["wait"] * 1_000_000
    stats = rig.actor.run(0.02)
    assert "env step" not in rig.tape
    assert (stats.params_epoch, stats.params_version) == (0, 7)


def test_actor_looks_for_parameters_in_every_run(make_rig, scripted):
    """Kills: an actor whose environments take a second a step looks once in pull_period_steps seconds."""
    environment, _ = scripted([FOREVER])
    rig = make_rig(environment, pull_period_steps=1_000_000)
    for version in (1, 2):
        rig.params.publish(rig.network, epoch=0, version=version)
        assert rig.actor.run(0.0).params_version == version


def test_actor_takes_a_higher_epoch_with_a_smaller_version(make_rig, scripted):
    """A learner that died goes on from its last checkpoint: with fewer updates, and newer for all that."""
    environment, _ = scripted([FOREVER])
    rig = make_rig(environment)
    for epoch, version in ((0, 900), (1, 850)):
        rig.params.publish(rig.network, epoch, version)
        stats = rig.actor.run(0.0)
        assert (stats.params_epoch, stats.params_version) == (epoch, version)
    assert rig.params.asked == [(-1, 0), (0, 900)]


def test_actor_params_age_is_the_mean_over_the_steps_since_the_last_report(make_rig, scripted, monkeypatch):
    environment, _ = scripted([FOREVER])
    rig = make_rig(environment, pull_period_steps=2)
    now = [100.0]
    monkeypatch.setattr("actors.actor.time.monotonic", lambda: now[0])
    rig.actor.step()
    assert np.isnan(rig.actor.stats().params_age_seconds)  # It has none whose age could be told.
    rig.params.publish(rig.network, epoch=0, version=1)
    rig.params.age = 3.0
    rig.actor.step()
    rig.actor.step()  # Takes them: published at 97.
    now[0] = 105.0
    rig.actor.step()
    assert rig.actor.stats().params_age_seconds == (3 + 8) / 2
    assert np.isnan(rig.actor.stats().params_age_seconds)
    rig.params.publish(rig.network, epoch=0, version=2)
    rig.params.age = 0.5
    rig.actor.step()
    assert rig.actor.stats().params_age_seconds == 0.5


def test_actor_waiting_loses_and_repeats_nothing(make_rig, scripted, random_script, oracle, rows_of):
    """Replay asks to wait at random, also between two chunks of one step."""
    rng = np.random.default_rng(0)
    environment, envs = scripted([random_script(rng) for _ in range(3)])
    rig = make_rig(environment, n_step=2, chunk_transitions=2, discount=0.9)
    rig.writer.waits_for = [None if rng.random() < 0.4 else "wait" for _ in range(400)]
    rig.step(100)
    assert "wait" in rig.tape
    for env in envs:
        keys = {"n_step": 2, "discount": 0.9, "reward_clip": None, "frame_stack": 1}
        expected = [t for episode in env.episodes for t in oracle(episode, **keys)]
        known = {t.s_tm1.tobytes() for t in expected}
        sent = [row for chunk in rig.writer.chunks() for row in rows_of(chunk) if row[0].tobytes() in known]
        assert 0 <= len(expected) - len(sent) < 4
        np.testing.assert_array_equal([row[0] for row in sent], [t.s_tm1 for t in expected[: len(sent)]])
    assert rig.actor.stats().sent == sum(chunk.num_transitions for chunk in rig.writer.chunks())


def test_actor_chunks_are_numbered_without_gaps(make_rig, scripted, random_script):
    rng = np.random.default_rng(1)
    environment, _ = scripted([random_script(rng) for _ in range(3)])
    rig = make_rig(environment, n_step=3, chunk_transitions=4, slot=2, incarnation=5)
    rig.step(80)
    chunks = rig.writer.chunks()
    assert [chunk.seq for chunk in chunks] == list(range(len(chunks)))
    sizes = [chunk.num_transitions for chunk in chunks]
    assert [chunk.num_sent_before for chunk in chunks] == [sum(sizes[:i]) for i in range(len(sizes))]
    assert {(chunk.run, chunk.actor_slot, chunk.incarnation) for chunk in chunks} == {("run", 2, 5)}
    # A step completes at most one full window, or at an end up to n.
    assert len(chunks) > 30 and set(sizes) <= {4, 5, 6}


def test_actor_chunk_ends_at_its_bytes_and_never_stalls(make_rig, scripted):
    """A plane is 12 bytes; the history that a chunk carries over counts for nothing, so 20 planes are 20 steps."""
    sizes = {}
    for chunk_bytes in (1, 12 * 20, 90_000):
        environment, _ = scripted([FOREVER])
        rig = make_rig(environment, n_step=1, chunk_transitions=32, chunk_bytes=chunk_bytes)
        rig.step(300)
        sizes[chunk_bytes] = [chunk.num_transitions for chunk in rig.writer.chunks()]
    assert set(sizes[1]) == {1} and len(sizes[1]) > 280
    assert set(sizes[90_000]) == {32}
    assert 18 <= max(sizes[240]) <= 20
    assert sum(sizes[240]) > 280


def test_actor_pulls_parameters_by_version_and_acts_with_them(make_rig, scripted):
    environment, _ = scripted([FOREVER, FOREVER])
    old, new = (constant_network(environment.spec, action) for action in (0, 2))
    rig = make_rig(environment, network=old, pull_period_steps=5, chunk_transitions=1, n_step=1, exploration=GREEDY)
    rig.step(7)  # Looks at step 0 and 5: there is nothing, and it goes on.
    assert rig.params.asked == [(-1, 0), (-1, 0)]
    rig.params.publish(new, epoch=0, version=40)
    rig.step(6)  # Steps 7 to 12; looks at 10.
    actions = np.array(rig.environment.actions)
    assert (actions[:10] == 0).all() and (actions[10:] == 2).all()
    rig.step(10)
    assert rig.params.asked == [(-1, 0), (-1, 0), (-1, 0), (0, 40), (0, 40)]
    stats = rig.actor.stats()
    assert (stats.params_epoch, stats.params_version) == (0, 40)
    versions = [chunk.params_version for chunk in rig.writer.chunks()]
    assert set(versions) == {0, 40} and versions == sorted(versions)


def test_actor_takes_a_lower_version_of_a_later_epoch(make_rig, scripted):
    environment, _ = scripted([FOREVER])
    old, new = (constant_network(environment.spec, action) for action in (0, 1))
    rig = make_rig(environment, network=old, pull_period_steps=1, exploration=GREEDY)
    rig.params.publish(old, epoch=0, version=900)
    rig.step(2)
    rig.params.publish(new, epoch=1, version=600)
    rig.step(2)
    assert np.array(rig.environment.actions)[:, 0].tolist() == [0, 0, 1, 1]
    assert rig.actor.stats().params_version == 600


def test_actor_reports_each_return_once_and_raw(make_rig, scripted):
    """PLAIN's episodes give 7 and 24; rewards are clipped for training only."""
    environment, _ = scripted([PLAIN, FOREVER])
    rig = make_rig(environment, reward_clip=1.0)
    rig.step(3)  # The episode is over, its return comes with the reset.
    assert list(rig.actor.stats().returns) == []
    rig.step(1)
    assert list(rig.actor.stats().returns) == [7.0]
    assert list(rig.actor.stats().returns) == []
    rig.step(7)
    assert list(rig.actor.stats().returns) == [24.0, 7.0]


def test_actor_env_steps_count_no_resets_and_go_on_in_a_replacement(make_rig, scripted):
    environment, _ = scripted([PLAIN])
    rig = make_rig(environment, env_steps=1_000, incarnation=1)
    rig.step(8)  # 3 steps, a reset, 2 steps, a reset, 1 step.
    assert rig.actor.env_steps == rig.actor.stats().env_steps == 1_000 + 6


def test_actor_linear_epsilon_counts_the_fleet_and_goes_on_in_a_replacement(make_rig, scripted):
    environment, _ = scripted([FOREVER, FOREVER])
    linear = ExplorationConfig(initial=1.0, final=0.0, decay_steps=1_000)
    epsilons = []
    for env_steps in (0, 250, 600):
        rig = make_rig(environment, env_steps=env_steps, num_actors=2, exploration=linear)
        rig.step(1)
        epsilons.append(rig.actor.stats().epsilon)
        rig.step(1)
        epsilons.append(rig.actor.stats().epsilon)
    # Two environments: the second step comes after two env steps of this slot, four of the fleet.
    assert epsilons == pytest.approx([1.0, 1 - 4 / 1000, 0.5, 0.5 - 4 / 1000, 0.0, 0.0])


def test_actor_multiplicative_epsilon_counts_updates(make_rig, scripted):
    environment, _ = scripted([FOREVER])
    decay = ExplorationConfig(kind="multiplicative", initial=0.8, final=0.1, decay_rate=0.5)
    rig = make_rig(environment, pull_period_steps=1, exploration=decay)
    epsilons = []
    for version in (None, 1, 2, 50):
        if version is not None:
            rig.params.publish(rig.network, epoch=0, version=version)
        rig.step(1)
        epsilons.append(rig.actor.stats().epsilon)
    assert epsilons == pytest.approx([0.8, 0.4, 0.2, 0.1])


def test_actor_ladder_gives_each_environment_of_the_fleet_its_own_epsilon(make_rig, scripted):
    means = []
    for slot in range(2):
        environment, _ = scripted([FOREVER, FOREVER])
        rig = make_rig(environment, slot=slot, num_actors=2, exploration=ExplorationConfig(kind="ladder"))
        rig.step(1)
        means.append(rig.actor.stats().epsilon)
    rungs = [0.4 ** (1 + 7 * i / 3) for i in range(4)]
    assert means == pytest.approx([(rungs[0] + rungs[1]) / 2, (rungs[2] + rungs[3]) / 2])


def test_actor_ladder_explores_most_in_the_first_environment(make_rig, scripted):
    """With a steep ladder only the first environment explores: the means alone would not tell them apart."""
    environment, _ = scripted([FOREVER, FOREVER])
    steep = ExplorationConfig(kind="ladder", ladder_base=0.5, ladder_exponent=1_000.0)
    rig = make_rig(environment, network=constant_network(environment.spec, 1), exploration=steep)
    rig.step(100)
    actions = np.array(rig.environment.actions)
    assert (actions[:, 1] == 1).all()
    assert 10 < (actions[:, 0] != 1).sum() < 60  # A third of 100, were it 1/2 * 2/3.


def play(make_rig, scripted, **identity):
    environment, envs = scripted([FOREVER, FOREVER])
    rig = make_rig(environment, **identity)
    rig.step(60)
    return np.array(rig.environment.actions), [env.seeds[0] for env in envs]


def test_actor_same_identity_does_the_same(make_rig, scripted):
    (actions, seeds), (again, seeds_again) = (play(make_rig, scripted, seed=3, slot=1, incarnation=2) for _ in range(2))
    np.testing.assert_array_equal(actions, again)
    assert seeds == seeds_again and None not in seeds


@pytest.mark.parametrize("other", [{"seed": 1}, {"slot": 1, "num_actors": 2}, {"incarnation": 1}], ids=str)
def test_actor_seed_slot_and_incarnation_each_give_another_stream(make_rig, scripted, other):
    (actions, seeds), (others, other_seeds) = play(make_rig, scripted), play(make_rig, scripted, **other)
    assert (actions != others).any()
    assert not set(seeds) & set(other_seeds)


class RecordingNetwork(QNetwork):
    """Keeps the noise and the values of every forward pass."""

    def __init__(self, config, spec):
        super().__init__(config, spec)
        self.noises, self.given = [], []

    def forward(self, observations, noise=None):
        values = super().forward(observations, noise)
        self.noises.append(noise)
        self.given.append(values.numpy().astype(np.float64))
        return values


def recording_network(spec, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return RecordingNetwork(NetworkConfig(hidden_sizes=(8,), **options), spec)


def test_actor_draws_fresh_noise_at_every_step_for_every_environment(make_rig, scripted):
    """Kills: one draw for all environments; one for the whole run; noise that is not used."""
    environment, _ = scripted([FOREVER, FOREVER, FOREVER])
    network = recording_network(environment.spec, noisy_sigma=0.5)
    make_rig(environment, network=network).step(4)
    noises = torch.stack(network.noises)  # [steps, environments, num_noise]
    assert noises.shape == (4, 3, network.num_noise)
    assert len(torch.unique(noises[:, :, 0])) == 4 * 3


@pytest.mark.parametrize("other", [{"seed": 1}, {"slot": 1, "num_actors": 2}, {"incarnation": 1}], ids=str)
def test_actor_noise_is_repeatable_and_of_its_own_stream(make_rig, scripted, other):
    """With epsilon 1 the actions are those of an actor without noise: its draws move no other stream."""
    noises, actions = [], []
    always = ExplorationConfig(initial=1.0, final=1.0)
    for identity, sigma in (({}, 0.5), ({}, 0.5), (other, 0.5), ({}, None)):
        environment, _ = scripted([FOREVER, FOREVER])
        network = recording_network(environment.spec, noisy_sigma=sigma)
        rig = make_rig(environment, network=network, exploration=always, **identity)
        rig.step(20)
        noises.append(network.noises)
        actions.append((rig.environment.seeds, np.array(rig.environment.actions).tolist()))
    assert torch.equal(torch.stack(noises[0]), torch.stack(noises[1]))
    assert not torch.equal(torch.stack(noises[0]), torch.stack(noises[2]))
    assert noises[3] == [None] * 20
    assert actions[0] == actions[1] == actions[3] != actions[2]


def rescaled(x):
    return np.sign(x) * (np.sqrt(np.abs(x) + 1) - 1) + 0.001 * x


def returned(y):
    """The inverse of `rescaled`, by bisection."""
    low, high = -1e6, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if rescaled(middle) < y else (low, middle)
    return low


@pytest.mark.parametrize(
    ("options", "apply", "apply_inv"),
    [
        ({"noisy_sigma": 2.0}, float, float),
        ({"value_rescaling": True}, rescaled, returned),
        ({"noisy_sigma": 2.0, "distribution": "quantile", "num_quantiles": 3}, float, float),
    ],
    ids=["noisy", "rescaled", "noisy quantiles"],
)
def test_actor_first_priorities_are_of_the_values_acted_on(make_rig, scripted, options, apply, apply_inv):
    """Kills: priorities of the mean parameters; of another draw; the rescaling left out, or applied to the reward alone."""
    environment, _ = scripted([[([50.0, -3.0, 7.0] * 10, "truncated")]])
    network = recording_network(environment.spec, **options)
    with torch.no_grad():
        network.advantage[-1].weight.mul_(5.0)
    rig = make_rig(environment, network=network, n_step=1, discount=0.9, chunk_transitions=1)
    rig.step(20)
    rewards = [step.reward[0] for step in rig.environment.steps]
    actions = [step[0] for step in rig.environment.actions]
    priorities = [priority for chunk in rig.writer.chunks() for priority in chunk.priority.tolist()]
    expected = [
        abs(apply(rewards[t] + 0.9 * apply_inv(network.given[t + 1][0].max())) - network.given[t][0, actions[t]]) + 0.001
        for t in range(len(priorities))
    ]
    assert len(priorities) >= 17
    np.testing.assert_allclose(priorities, expected, rtol=1e-4, atol=1e-5)


def test_actor_values_a_last_observation_with_the_noise_of_its_environment(make_rig, scripted):
    """Where environments are reset within a step, the observation that was cut off is valued with that step's draw."""
    environment, _ = scripted([FOREVER, [([1.0], "truncated")] * 9], mode="SameStep")
    network = recording_network(environment.spec, noisy_sigma=0.5)
    make_rig(environment, network=network).step(1)
    of_step, of_last = network.noises
    assert torch.equal(of_last, of_step[1:])


def test_actor_reward_not_finite_raises_and_says_where(make_rig, scripted):
    environment, _ = scripted([FOREVER, [([1.0, 1.0, float("nan"), 1.0], "terminated")]])
    rig = make_rig(environment, slot=3, num_actors=4, env_steps=100, n_step=2)
    rig.step(2)
    with pytest.raises(NonFiniteError, match=r"actor 3, env step 104: environment 1 .*nan"):
        rig.actor.step()


def test_actor_parameters_of_another_network_raise(make_rig, scripted):
    environment, _ = scripted([FOREVER])
    rig = make_rig(environment)
    rig.params.publish(make_network(NetworkConfig(hidden_sizes=(3,)), environment.spec, 0), epoch=0, version=1)
    with pytest.raises(ValueError, match="layout"):
        rig.actor.step()
