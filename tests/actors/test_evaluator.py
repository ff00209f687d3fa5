"""The evaluator: full episodes, raw returns, quotas."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from actors.environments import make_environment
from actors.evaluator import Evaluator
from common.config import EnvConfig, EnvSpec, EvaluationConfig, NetworkConfig
from common.networks import make_network

# Returns 6, -500, 20 and again: an environment with short episodes must not play more of them.
SHORT = [([1.0, 2.0, 3.0], "terminated"), ([-500.0], "truncated"), ([10.0, 10.0], "terminated")]
LONG = [([1.0] * 30, "truncated"), ([2.0] * 20, "terminated")]


@pytest.fixture
def make_evaluator(scripted):
    """Makes (Evaluator over scripted environments, a list that gets its ScriptedEnvs)."""

    def make(scripts, *, params=None, frame_stack=1, mode=None, **settings):
        envs, scripts = [], list(scripts)

        def make_scripted(config):
            keys = {"mode": mode} if mode else {}
            environment, (env,) = scripted([scripts[len(envs)]], frame_stack=frame_stack, **keys)
            envs.append(env)
            return environment

        spec = scripted([SHORT], frame_stack=frame_stack)[0].spec
        evaluator = Evaluator(
            env=EnvConfig(game="Scripted-v0", frame_stack=frame_stack),
            evaluation=EvaluationConfig(num_envs=len(scripts), **settings),
            network=make_network(NetworkConfig(hidden_sizes=(8,)), spec, 0),
            params=params,
            make=make_scripted,
        )
        return evaluator, envs

    return make


def atari_evaluator(config, *, num_envs=1, epsilon=1.0, make=lambda config: make_environment(config, 1)):
    spec = make_environment(config, 1).spec
    network = make_network(NetworkConfig(hidden_sizes=(8,)), spec, 0)
    evaluation = EvaluationConfig(num_envs=num_envs, epsilon=epsilon)
    return Evaluator(env=config, evaluation=evaluation, network=network, params=None, make=make)


def finish(evaluator, episodes, seed):
    evaluator.start(episodes, seed)
    result = evaluator.run(60.0)
    assert result is not None
    return result


@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
def test_evaluator_plays_each_environments_quota_and_no_more(make_evaluator, mode):
    """Kills: the first five episodes to end, whoever plays them, which prefers short ones; clipped returns."""
    evaluator, envs = make_evaluator([SHORT, LONG], mode=mode)
    result = finish(evaluator, episodes=5, seed=0)
    assert result.returns == [6.0, -500.0, 20.0, 30.0, 40.0]  # Three of the first environment, two of the second.
    assert result.episodes == 5
    assert result.mean_return == pytest.approx((6 - 500 + 20 + 30 + 40) / 5)
    # Not a step more than the quota.
    assert [sum(len(episode.actions) for episode in env.episodes) for env in envs] == [3 + 1 + 2, 30 + 20]


def test_evaluator_makes_no_more_environments_than_episodes(make_evaluator):
    evaluator, envs = make_evaluator([SHORT, LONG, LONG])
    assert finish(evaluator, episodes=2, seed=0).returns == [6.0, 30.0]
    assert len(envs) == 2


def test_evaluator_run_stops_at_its_time_and_goes_on(make_evaluator):
    evaluator, envs = make_evaluator([LONG])
    evaluator.start(1, 0)
    assert evaluator.run(0.0) is None
    assert envs[0].episodes[-1].actions == []
    assert evaluator.run(60.0).returns == [30.0]


@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
def test_evaluator_stack_begins_with_zeros_and_grows(make_evaluator, mode):
    """The network must see in evaluation what it saw in training: also over an autoreset."""
    seen = []
    evaluator, envs = make_evaluator([[([1.0, 1.0], "terminated")]], frame_stack=3, mode=mode)
    evaluator.network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].numpy().copy()))
    finish(evaluator, episodes=2, seed=0)
    first, second = (episode.observations for episode in envs[0].episodes[:2])
    zero = np.zeros_like(first[0])
    expected = [[zero, zero, first[0]], [zero, first[0], first[1]]]
    expected += [first] if mode == "NextStep" else []  # There the last observation waits for the reset.
    expected += [[zero, zero, second[0]], [zero, second[0], second[1]]]
    np.testing.assert_array_equal([stack[0] for stack in seen], expected)


def test_evaluator_lives_never_end_an_episode(taped):
    """Breakout with the training's own setting; the same actions with the signal on show how many lives were lost."""
    config = EnvConfig(game="breakout", life_loss_terminates=True)
    configs, environments = [], []

    def make(config):
        configs.append(config)
        environments.append(taped(make_environment(config, 1))[0])
        return environments[-1]

    evaluator = atari_evaluator(config, make=make)
    result = finish(evaluator, episodes=1, seed=0)
    evaluator.close()
    ((environment,), (made_with,)) = environments, configs
    assert not made_with.life_loss_terminates
    assert [bool(step.terminated[0]) for step in environment.steps].count(True) == 1
    assert result.returns == [sum(float(step.reward[0]) for step in environment.steps)]
    twin = make_environment(config, 1)
    twin.reset(environment.seeds[0])
    num_terminated = sum(bool(twin.step(actions).terminated[0]) for actions in environment.actions)
    twin.close()
    assert num_terminated == 5  # Breakout's five lives, the last of them the end.


def test_evaluator_atari_same_seed_same_game(taped):
    """Also from environments that were used before, and with sticky actions; another seed is another game."""
    config = EnvConfig(game="breakout", sticky_action_probability=0.25, max_episode_frames=240)
    logs = []

    def make(config):
        logs.append(taped(make_environment(config, 1))[0])
        return logs[-1]

    evaluator, fresh = (atari_evaluator(config, num_envs=2, epsilon=0.5, make=make) for _ in range(2))
    games = []
    for played_by, seed in ((evaluator, 7), (evaluator, 8), (evaluator, 7), (fresh, 7)):
        starts = [len(log.steps) for log in logs]
        returns = finish(played_by, 3, seed).returns
        starts += [0] * (len(logs) - len(starts))
        planes = [step.planes for log, start in zip(logs, starts, strict=True) for step in log.steps[start:]]
        games.append((returns, np.array(planes)))
    evaluator.close()
    fresh.close()
    assert games[0][0] == games[2][0] == games[3][0]
    np.testing.assert_array_equal(games[0][1], games[2][1])
    np.testing.assert_array_equal(games[0][1], games[3][1])
    assert games[0][1].shape != games[1][1].shape or (games[0][1] != games[1][1]).any()


def test_evaluator_environments_have_seeds_of_their_own(make_evaluator):
    evaluator, envs = make_evaluator([SHORT, SHORT, SHORT])
    finish(evaluator, 3, seed=0)
    finish(evaluator, 3, seed=1)
    seeds = [seed for env in envs for seed in env.seeds if seed is not None]
    assert len(seeds) == len(set(seeds)) == 6


def test_evaluator_takes_and_reports_the_newest_parameters(make_evaluator, fake_params):
    evaluator, _ = make_evaluator([LONG], params=fake_params)
    with pytest.raises(TimeoutError, match="waited 0 s"):
        evaluator.begin(1, 0, None, 0.0)
    other = make_network(NetworkConfig(hidden_sizes=(8,)), EnvSpec((3,), "<f4", 1, 3), 99)
    fake_params.publish(other, epoch=2, version=300)
    with pytest.raises(TimeoutError, match=r"\(2, 301\).*\(2, 300\)"):
        evaluator.begin(1, 0, (2, 301), 0.0)
    evaluator.begin(1, 0, (1, 900), 0.0)
    for mine, theirs in zip(evaluator.network.parameters(), other.parameters(), strict=True):
        np.testing.assert_array_equal(mine.detach().numpy(), theirs.detach().numpy())
    result = evaluator.run(60.0)
    assert (result.params_epoch, result.params_version) == evaluator.params_version == (2, 300)
    assert (result.protocol, result.seed, result.epsilon) == ("gymnasium", 0, 0.0)


def test_evaluator_keeps_its_parameters_while_an_evaluation_runs(make_evaluator, fake_params):
    evaluator, _ = make_evaluator([LONG], params=fake_params)
    fake_params.publish(evaluator.network, epoch=0, version=1)
    evaluator.begin(1, 0, None, 0.0)
    fake_params.publish(evaluator.network, epoch=0, version=2)
    assert evaluator.run(60.0).params_version == 1


@pytest.mark.parametrize(("life_loss_terminates", "expected"), [(False, "machado"), (True, "custom")])
def test_evaluator_names_the_protocol_with_the_signal_that_training_had(life_loss_terminates, expected, scripted):
    """Lives end no episode here in either case, but Machado et al. forbid the signal in training."""
    env = dataclasses.replace(EnvConfig(game="pong").with_protocol("machado"), life_loss_terminates=life_loss_terminates)
    environment, _ = scripted([LONG])
    evaluator = Evaluator(
        env=env,
        evaluation=EvaluationConfig(),
        network=make_network(NetworkConfig(hidden_sizes=(8,)), environment.spec, 0),
        params=None,
        make=lambda config: environment,
    )
    assert finish(evaluator, episodes=1, seed=0).protocol == expected
