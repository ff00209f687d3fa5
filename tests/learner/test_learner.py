import numpy as np
import pytest
import torch

from common import params as params_module
from common.errors import CheckpointError, NonFiniteError
from learner import checkpoint as checkpoints
from learner.update import make_optimizer, pick_device


def online(learner):
    return params_module.flatten(learner._online)


def target(learner):
    return params_module.flatten(learner._target)


def steps(learner, num):
    for _ in range(num):
        assert learner.step()


@pytest.mark.parametrize("loss", ["mse", "huber"])
@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
def test_a_fixed_batch_overfits(make_learner, loss, optimizer):
    """The destination values come from a target that is never copied, so the loss can go to zero."""
    learner, *_ = make_learner(
        loss=loss,
        optimizer=optimizer,
        learning_rate=3e-3,
        optimizer_epsilon=1e-5,
        target_period_updates=10_000,
        is_prioritized=False,
    )
    steps(learner, 1)
    first = learner.stats().loss
    steps(learner, 500)
    learner.stats()
    steps(learner, 1)
    assert learner.stats().loss < 0.01 * first


def test_hard_target_is_copied_at_exactly_the_period(make_learner):
    learner, *_ = make_learner(target_period_updates=3)
    before = target(learner)
    steps(learner, 2)
    np.testing.assert_array_equal(target(learner), before)
    steps(learner, 1)
    np.testing.assert_array_equal(target(learner), online(learner))
    steps(learner, 1)
    assert (target(learner) != online(learner)).any()


def test_soft_target_moves_by_its_rate_at_every_update(make_learner):
    learner, *_ = make_learner(target_period_updates=None, target_soft_rate=0.25)
    before = target(learner)
    steps(learner, 1)
    np.testing.assert_allclose(target(learner), before + 0.25 * (online(learner) - before), rtol=1e-5, atol=1e-7)


def test_gradient_norm_is_clipped(make_learner):
    """SGD would show it directly; RMSprop and Adam are invariant to scale, so the gradients themselves are read."""
    learner, *_ = make_learner(max_grad_norm=1e-3)
    steps(learner, 1)
    norm = torch.cat([p.grad.reshape(-1) for p in learner._online.parameters()]).norm()
    assert learner.stats().grad_norm > 1e-2
    assert float(norm) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("limit", [None, 1e3])
def test_gradient_within_the_limit_stays_as_it_is(make_learner, limit):
    learner, *_ = make_learner(max_grad_norm=limit)
    steps(learner, 1)
    norm = torch.cat([p.grad.reshape(-1) for p in learner._online.parameters()]).norm()
    assert float(norm) == pytest.approx(learner.stats().grad_norm, rel=1e-5)
    assert 1e-2 < norm < 1e3


def test_importance_weights_scale_the_gradient(make_learner, fake_shard):
    """Two shards of 100 and 300 items, four each: P = 1/2 * 1/100 and 1/2 * 1/300 over 400 items, beta 1."""
    shards = [fake_shard(0, size=100), fake_shard(1, size=300)]
    learner, *_ = make_learner(shards, importance_exponent=1.0, priority_floor=1e-9)
    batch = learner._source.next_batch(0.0)
    raw = np.array([1 / (400 * 0.5 / 100)] * 4 + [1 / (400 * 0.5 / 300)] * 4)
    np.testing.assert_allclose(batch.importance_weight.numpy(), raw / raw.max(), rtol=1e-6)
    learner._learn(batch, batch.weight_scale)
    td_error = torch.from_numpy(np.concatenate([shard.updates[0].priority for shard in shards]))
    expected = (0.5 * td_error.abs().clamp(max=1).square() + (td_error.abs() - 1).clamp(min=0)) * batch.importance_weight
    assert learner.stats().loss == pytest.approx(float(expected.mean()), rel=1e-5)


def test_priorities_go_back_to_the_shard_and_item_they_came_from(make_learner, fake_shard):
    shards = [fake_shard(0), fake_shard(1)]
    learner, *_ = make_learner(shards, priority_floor=0.5)
    batch = learner._source.next_batch(0.0)
    td_error = learner._update.gradients(batch, batch.weight_scale).td_error.numpy()
    learner, *_ = make_learner(shards, priority_floor=0.5)  # The same parameters again: the same TD errors.
    steps(learner, 1)
    for index, shard in enumerate(shards):
        (update,) = shard.updates
        assert (update.shard_index, update.shard_epoch) == (index, 3)
        np.testing.assert_array_equal(update.item_id, 100 * index + np.arange(4))
        np.testing.assert_allclose(update.priority, np.abs(td_error[4 * index : 4 * index + 4]) + 0.5, rtol=1e-6)


def test_uniform_replay_is_sent_no_priorities(make_learner):
    learner, shards, _ = make_learner(is_prioritized=False)
    steps(learner, 3)
    assert shards[0].updates == []


def test_params_are_published_by_version_at_their_period(make_learner):
    learner, _, store = make_learner(publish_period_updates=4)
    learner.publish()
    steps(learner, 9)
    assert [(s.epoch, s.version) for s in store.published] == [(0, 0), (0, 4), (0, 8)]
    assert (store.published[0].params != store.published[1].params).any()


def test_a_waiting_shard_is_named_and_nothing_is_updated(make_learner):
    learner, (shard,), _ = make_learner()
    shard.waits_for = "shard 0: the learner waits for actors"
    assert not learner.step()
    assert learner.stats().waits_for == shard.waits_for and learner.updates == 0
    shard.waits_for = None
    steps(learner, 1)
    assert learner.stats().waits_for is None


def test_prefetch_thread_gives_the_same_updates_as_none(make_learner):
    direct, *_ = make_learner()
    threaded, *_ = make_learner()
    threaded.start()
    try:
        for _ in range(20):
            assert direct.step()
            assert threaded.step(10.0)
        np.testing.assert_array_equal(online(direct), online(threaded))
    finally:
        threaded.close()


def test_a_fault_on_the_prefetch_thread_reaches_the_learner(make_learner):
    learner, (shard,), _ = make_learner()
    shard.collect = lambda timeout_seconds: 1 / 0
    learner.start()
    try:
        with pytest.raises(ZeroDivisionError):
            learner.step(10.0)
    finally:
        learner.close()


def test_a_nan_loss_stops_with_the_batch_saved_and_parameters_unchanged(make_learner, tmp_path):
    learner, (shard,), _ = make_learner()
    steps(learner, 2)
    learner.save({})
    before = online(learner)
    shard.r_t = np.full(8, 3e38)  # Finite on the wire; its square is not.
    learner._update._objective._td_loss = lambda td_error: td_error.square()
    with pytest.raises(NonFiniteError, match="update 2"):
        learner.step()
    np.testing.assert_array_equal(online(learner), before)
    assert (tmp_path / "bad_batch_0000000002.safetensors").stat().st_size > 100
    assert [path.name for path in checkpoints.paths(tmp_path / "checkpoints")] == ["0000000002"]


def test_beta_rises_to_one_over_its_updates_and_stays(make_learner, tmp_path):
    learner, *_ = make_learner(importance_exponent=0.4, importance_anneal_updates=4)
    seen = [learner._source.importance_exponent]
    for _ in range(6):
        steps(learner, 1)
        seen.append(learner._source.importance_exponent)
    np.testing.assert_allclose(seen, [0.4, 0.55, 0.7, 0.85, 1.0, 1.0, 1.0])
    name = learner.save({})
    again, *_ = make_learner(importance_exponent=0.4, importance_anneal_updates=12)
    again.restore(tmp_path / "checkpoints" / name)
    assert again._source.importance_exponent == pytest.approx(0.7)
    constant, *_ = make_learner(importance_exponent=0.4)
    steps(constant, 6)
    assert constant._source.importance_exponent == 0.4


def test_learning_rate_falls_to_its_end_over_its_updates_and_stays(make_learner, tmp_path):
    """Adam's first step moves every parameter with a gradient by the learning rate; at the end, 0, nothing moves any more."""
    settings = {"learning_rate": 0.08, "learning_rate_final": 0.0, "optimizer_epsilon": 1e-12, "max_grad_norm": None}
    learner, *_ = make_learner(learning_rate_anneal_updates=4, **settings)
    moved = []
    for _ in range(6):
        before = online(learner)
        steps(learner, 1)
        moved.append(float(np.abs(online(learner) - before).max()))
    assert moved[0] == pytest.approx(0.08, rel=1e-3)
    assert all(step > 0 for step in moved[:4]) and moved[4:] == [0.0, 0.0]
    learner, *_ = make_learner(learning_rate_anneal_updates=4, **settings)
    steps(learner, 2)
    name = learner.save({})
    again, *_ = make_learner(learning_rate_anneal_updates=8, **settings)
    again.restore(tmp_path / "checkpoints" / name)
    assert again._optimizer.param_groups[0]["lr"] == pytest.approx(0.06)
    held, *_ = make_learner(learning_rate_anneal_updates=4, learning_rate_hold_updates=3, **settings)
    rates = []
    for _ in range(8):
        rates.append(held._optimizer.param_groups[0]["lr"])
        steps(held, 1)
    assert rates == pytest.approx([0.08] * 4 + [0.06, 0.04, 0.02, 0.0])


def test_the_target_network_is_published_where_so_configured(make_learner):
    learner, _, store = make_learner(
        publish_params="target", target_period_updates=None, target_soft_rate=0.25, publish_period_updates=2
    )
    steps(learner, 2)
    np.testing.assert_array_equal(store.published[-1].params, target(learner))
    assert (target(learner) != online(learner)).any()


def test_observations_are_shifted_where_so_configured_and_the_same_after_a_restart(make_learner, tmp_path):
    """The planes of these shards are single rows of three numbers, so that a shift is one along the row."""
    plain, *_ = make_learner()
    shifted, *_ = make_learner(random_shift_pixels=1)
    for learner in (plain, shifted):
        steps(learner, 1)
    assert not np.array_equal(online(plain), online(shifted))
    steps(shifted, 3)
    twin, *_ = make_learner(random_shift_pixels=1)
    steps(twin, 2)
    again, *_ = make_learner(random_shift_pixels=1)
    again.restore(tmp_path / "checkpoints" / twin.save({}))
    steps(again, 2)
    np.testing.assert_array_equal(online(again), online(shifted))


def test_the_shifted_fraction_rises_over_its_updates_and_is_the_same_after_a_restart(make_learner, tmp_path):
    """Kills: a fraction that begins at its end, or again at 0 after a restart."""
    settings = {"random_shift_pixels": 1, "random_shift_fraction": 0.5}
    learner, *_ = make_learner(**settings, random_shift_anneal_updates=4)
    fractions = []
    for _ in range(6):
        fractions.append(learner._source.random_shift_fraction)
        steps(learner, 1)
    assert fractions == pytest.approx([0.0, 0.125, 0.25, 0.375, 0.5, 0.5])
    plain, *_ = make_learner()
    shifted, *_ = make_learner(random_shift_pixels=1, random_shift_fraction=1.0, random_shift_anneal_updates=1)
    same = []
    for _ in range(2):
        for one in (plain, shifted):
            steps(one, 1)
        same.append(np.array_equal(online(plain), online(shifted)))
    assert same == [True, False], "the batches follow the fraction"
    again, *_ = make_learner(**settings, random_shift_anneal_updates=12)
    again.restore(tmp_path / "checkpoints" / learner.save({}))
    assert again._source.random_shift_fraction == pytest.approx(0.25)
    constant, *_ = make_learner(**settings)
    steps(constant, 1)
    assert constant._source.random_shift_fraction == 0.5


def test_late_reports_change_no_parameter_and_no_priority(make_learner):
    """On a GPU an update's TD errors are read after the next one was launched; here the same order is asked of a CPU."""
    direct, (at_once,), _ = make_learner()
    late, (later,), _ = make_learner()
    late._num_late = 1
    steps(direct, 5)
    steps(late, 5)
    np.testing.assert_array_equal(online(direct), online(late))
    assert (len(at_once.updates), len(later.updates)) == (5, 4)
    late.stats()  # Reads what is left.
    for mine, other in zip(at_once.updates, later.updates, strict=True):
        np.testing.assert_array_equal(mine.priority, other.priority)


@pytest.mark.parametrize("leave", ["step", "publish", "save", "stats"])
def test_what_came_of_a_late_nan_never_leaves_the_learner(make_learner, tmp_path, leave):
    learner, (shard,), store = make_learner(publish_period_updates=1_000)
    learner._num_late = 1
    steps(learner, 2)
    shard.r_t = np.full(8, 3e38)
    learner._update._objective._td_loss = lambda td_error: td_error.square()
    steps(learner, 1)  # Nothing is known yet.
    with pytest.raises(NonFiniteError, match="the loss is inf"):
        learner.save({}) if leave == "save" else getattr(learner, leave)()
    assert len(shard.updates) == 2 and store.published == []
    assert checkpoints.paths(tmp_path / "checkpoints") == []
    assert list(tmp_path.glob("bad_batch_*"))


def test_parameters_that_are_not_finite_are_never_checkpointed(make_learner, tmp_path):
    learner, *_ = make_learner()
    with torch.no_grad():
        next(learner._online.parameters())[0, 0] = float("nan")
    with pytest.raises(NonFiniteError):
        learner.save({})
    assert checkpoints.paths(tmp_path / "checkpoints") == []


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
def test_a_restored_learner_continues_to_the_bit(make_learner, tmp_path, optimizer):
    old, *_ = make_learner(optimizer=optimizer, target_period_updates=7)
    steps(old, 12)
    name = old.save({"env_steps": {"0": 5}})
    new, *_ = make_learner(optimizer=optimizer, target_period_updates=7, seed=9)
    new.restore(tmp_path / "checkpoints" / name)
    assert (new.updates, new.stats().samples) == (12, 96)
    for _ in range(100):
        steps(old, 1)
        steps(new, 1)
    np.testing.assert_array_equal(online(old), online(new))
    np.testing.assert_array_equal(target(old), target(new))


def test_a_restored_optimizer_has_the_settings_of_the_configuration(make_learner, tmp_path):
    old, *_ = make_learner(learning_rate=1e-3)
    steps(old, 2)
    new, *_ = make_learner(learning_rate=0.5)
    new.restore(tmp_path / "checkpoints" / old.save({}))
    assert new._optimizer.param_groups[0]["lr"] == 0.5


def test_a_gradient_that_is_not_finite_changes_no_parameter(make_learner, tmp_path):
    learner, *_ = make_learner()
    before = online(learner)
    learner._update._objective._td_loss = lambda td_error: (
        (td_error - td_error.detach()).abs().sqrt()
    )  # Zero, with an infinite slope.
    with pytest.raises(NonFiniteError, match="gradient norm"):
        learner.step()
    np.testing.assert_array_equal(online(learner), before)
    assert (tmp_path / "bad_batch_0000000000.safetensors").exists()


def test_a_checkpoint_of_another_network_is_refused(make_learner, tmp_path):
    from common.config import NetworkConfig

    learner, *_ = make_learner()
    name = learner.save({})
    other, *_ = make_learner(network=NetworkConfig(hidden_sizes=(31,)))
    before = online(other)
    with pytest.raises(CheckpointError, match="another network"):
        other.restore(tmp_path / "checkpoints" / name)
    np.testing.assert_array_equal(online(other), before)


def test_run_stops_at_exactly_max_updates(make_learner):
    learner, *_ = make_learner()
    assert learner.run(60.0, max_updates=5).updates == 5


def test_asking_for_a_gpu_that_is_not_there_says_what_to_do():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(ValueError, match=r"--learner\.device"):
        pick_device("cuda")


def test_rmsprop_is_centred(make_learner):
    learner, *_ = make_learner(optimizer="rmsprop")
    assert make_optimizer(learner._config, learner._online, torch.device("cpu")).param_groups[0]["centered"]


def test_the_longest_interval_between_updates_is_told_and_that_of_a_checkpoint_once(make_learner, monkeypatch):
    """Kills: a pause before the first update of the next call, which is where a checkpoint is copied."""
    from types import SimpleNamespace

    from learner import learner as module

    learner, *_ = make_learner()
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    for _ in range(100):
        clock.now += 0.02
        steps(learner, 1)
    stats = learner.stats()
    assert stats.update_interval_p50_seconds == pytest.approx(0.02) == stats.update_interval_p99_seconds
    assert np.isnan(stats.checkpoint_pause_seconds)
    learner.begin_save({})
    for seconds in (0.5, 0.02, 0.02):
        clock.now += seconds
        steps(learner, 1)
    assert learner.saved(10.0) is not None
    assert learner.stats().checkpoint_pause_seconds == pytest.approx(0.5)
    clock.now += 3.0
    steps(learner, 1)
    assert learner.stats().update_interval_p50_seconds == pytest.approx(3.0)
    assert np.isnan(learner.stats().checkpoint_pause_seconds) and np.isnan(learner.stats().update_interval_p50_seconds)
