"""Atoms and quantiles: golden values with decoys, literal twins, and what ties them to the losses of expectations."""

import math

import numpy as np
import pytest
import torch

from learner import losses


def f32(values):
    return torch.tensor(values, dtype=torch.float32)


def i64(values):
    return torch.tensor(values, dtype=torch.int64)


def random_transitions(seed):
    """Returns the generator, B (1 among them), A, and a_tm1, r_t, discount_t; whole and halves, so that atoms are exactly hit."""
    rng = np.random.default_rng(seed)
    batch, actions = int(rng.integers(1, 9)) if seed else 1, int(rng.integers(2, 6))
    a_tm1 = rng.integers(actions, size=batch)
    r_t = rng.integers(-12, 13, size=batch) / rng.choice([1, 2, 3], size=batch)
    discount_t = rng.choice([0.0, 0.5, 0.9, 1.0], size=batch)
    return rng, batch, actions, a_tm1, r_t.astype(np.float32), discount_t.astype(np.float32)


def call(function, *arrays, **numbers):
    return function(*(torch.from_numpy(np.asarray(array)) for array in arrays), **numbers).numpy()


# Atoms.


def test_categorical_l2_project_divides_clips_and_keeps_every_mass():
    """Kills: floor and ceil that both miss a mass on an atom (0.2 and 0.25 lost), the parts swapped, masses beyond the ends
    dropped, an even spacing taken for granted, masses at one place that overwrite one another."""
    projected = losses.categorical_l2_project(
        z_p=f32([[1, 2, 8, -3, 4], [0, 4, 4, 1, 2.5]]),
        probs=f32([[0.2, 0.1, 0.3, 0.15, 0.25], [0.1, 0.2, 0.3, 0.15, 0.25]]),
        z_q=f32([0, 1, 4]),
    )
    first = [0.15, 0.2 + 0.1 * 2 / 3, 0.1 / 3 + 0.3 + 0.25]  # 2 is a third of the way from 1 to 4.
    second = [0.1, 0.15 + 0.25 / 2, 0.2 + 0.3 + 0.25 / 2]
    torch.testing.assert_close(projected, f32([first, second]))


@pytest.mark.parametrize("name", ["categorical_q_learning", "categorical_double_q_learning"])
def test_categorical_losses_are_the_cross_entropy_of_the_projected_target(name):
    """Kills: the action of the other network, the probabilities of the action taken, no discount, atoms discounted twice, a
    terminal that bootstraps, the cross-entropy turned around, probabilities where logits belong, a KL divergence."""
    atoms = f32([0, 1, 2])
    a_0, a_1 = [0.5, 0.25, 0.25], [0.125, 0.125, 0.75]  # Means 0.75 and 1.625.
    taken, decoy = [0.2, 0.3, 0.5], [0.9, 0.05, 0.05]
    double = name == "categorical_double_q_learning"
    loss = getattr(losses, name)(
        q_atoms_tm1=atoms,
        q_logits_tm1=7 + f32([[taken, decoy], [decoy, taken], [decoy, taken]]).log(),
        a_tm1=i64([0, 1, 1]),
        r_t=f32([0.25, 1, -5]),
        discount_t=f32([0.5, 0.0, 1.0]),  # The second transition is terminal; its reward is on an atom. The third is beyond.
        q_atoms_t=atoms,
        q_logits_t=f32([a_0, a_1]).log().expand(3, 2, 3) - 9,
        **({"q_t_selector": f32([[9, 1]] * 3)} if double else {}),  # Picks action 0, the target network action 1.
    )
    p = a_0 if double else a_1
    # The atoms move to 0.25, 0.75 and 1.25.
    target = [0.75 * p[0] + 0.25 * p[1], 0.25 * p[0] + 0.75 * p[1] + 0.75 * p[2], 0.25 * p[2]]
    first = -sum(mass * math.log(probability) for mass, probability in zip(target, taken, strict=True))
    torch.testing.assert_close(loss, f32([first, -math.log(0.3), -math.log(0.2)]))


def atoms_of(rng, num_atoms, even):
    """Returns whole-numbered atoms around 0, of even spacing or not."""
    gaps = np.ones(num_atoms) if even else rng.integers(1, 4, size=num_atoms)
    return (np.cumsum(gaps) - gaps.sum() // 2).astype(np.float32)


def triangle(i, z, atoms):
    """The kernel of atom i at z: 1 on the atom, 0 at its neighbours, linear between; 1 beyond it at either end."""
    left = (z - atoms[i - 1]) / (atoms[i] - atoms[i - 1]) if i > 0 else 1.0
    right = (atoms[i + 1] - z) / (atoms[i + 1] - atoms[i]) if i < len(atoms) - 1 else 1.0
    return max(0.0, min(left, right, 1.0))


def project_twin(z_p, probs, atoms):
    return [sum(p * triangle(i, float(z), atoms) for z, p in zip(z_p, probs, strict=True)) for i in range(len(atoms))]


def softmax(logits):
    exponentials = [math.exp(float(value)) for value in logits]
    return [e / sum(exponentials) for e in exponentials]


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("seed", range(10))
def test_categorical_l2_project_agrees_with_the_triangular_kernel(seed, even):
    rng = np.random.default_rng(seed)
    batch, num_from = int(rng.integers(1, 6)), int(rng.integers(1, 12))
    atoms = atoms_of(rng, int(rng.integers(2, 10)), even)
    z_p = (rng.integers(-20, 21, size=(batch, num_from)) / rng.choice([1, 2, 3], size=(batch, num_from))).astype(np.float32)
    probs = rng.dirichlet(np.ones(num_from), size=batch).astype(np.float32)
    got = call(losses.categorical_l2_project, z_p, probs, atoms)
    expected = [project_twin(z_p[b], probs[b], atoms) for b in range(batch)]
    np.testing.assert_allclose(got, np.array(expected), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got.sum(1), np.ones(batch), rtol=1e-5)
    inside = np.clip(z_p, atoms[0], atoms[-1])
    np.testing.assert_allclose(got @ atoms, (probs * inside).sum(1), rtol=1e-4, atol=1e-5)  # The mean is kept.


def test_categorical_l2_project_onto_its_own_atoms_changes_nothing():
    """At atoms that fp32 cannot hold exactly, as 51 between -10 and 10 are."""
    atoms = torch.linspace(-10, 10, 51)
    probs = torch.rand(4, 51, generator=torch.Generator().manual_seed(0)).softmax(dim=1)
    torch.testing.assert_close(losses.categorical_l2_project(atoms.expand(4, 51), probs, atoms), probs, rtol=0.0, atol=0.0)


def test_categorical_l2_project_takes_any_memory_layout():
    z_p, probs, z_q = f32([[1, 2, 8], [0, 4, 2.5]]), f32([[0.2, 0.5, 0.3], [0.1, 0.2, 0.7]]), f32([0, 9, 1, 9, 4, 9])[::2]
    expected = losses.categorical_l2_project(z_p, probs, z_q.clone())
    torch.testing.assert_close(losses.categorical_l2_project(z_p.T.contiguous().T, probs.T.contiguous().T, z_q), expected)


def test_a_projection_onto_one_atom_raises():
    with pytest.raises(ValueError, match="z_q"):
        losses.categorical_l2_project(f32([[1, 2]]), f32([[0.5, 0.5]]), f32([0]))


@pytest.mark.parametrize("wrong", [{"z_p": f32([1, 2])}, {"probs": f32([[1, 2, 3]])}, {"z_q": i64([0, 1])}])
def test_the_projection_names_a_wrong_argument(wrong):
    arguments = {"z_p": f32([[1, 2]]), "probs": f32([[0.5, 0.5]]), "z_q": f32([0, 1])}
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}: "):
        losses.categorical_l2_project(**arguments | wrong)


def test_a_reward_that_is_not_a_number_makes_a_loss_that_is_none():
    """And no index out of range: the learner then names the batch."""
    projected = losses.categorical_l2_project(f32([[math.nan, 1.0]]), f32([[0.5, 0.5]]), f32([0, 1, 2]))
    assert projected.isnan().any()


@pytest.mark.parametrize("seed", range(10))
def test_categorical_losses_agree_with_a_literal_twin(seed):
    rng, batch, actions, a_tm1, r_t, discount_t = random_transitions(seed)
    atoms_tm1 = atoms_of(rng, int(rng.integers(2, 9)), even=seed % 2 == 0)
    atoms_t = atoms_tm1 if seed % 3 else atoms_of(rng, int(rng.integers(2, 9)), even=True)
    logits_tm1 = rng.normal(size=(batch, actions, len(atoms_tm1))).astype(np.float32)
    logits_t = rng.normal(size=(batch, actions, len(atoms_t))).astype(np.float32)
    selector = rng.normal(size=(batch, actions)).astype(np.float32)

    def mean(b, a):
        return sum(p * z for p, z in zip(softmax(logits_t[b, a]), atoms_t, strict=True))

    def twin(value):
        for b in range(batch):
            best = max(range(actions), key=lambda a: value(b, a))
            moved = [float(r_t[b]) + float(discount_t[b]) * float(z) for z in atoms_t]
            target = project_twin(moved, softmax(logits_t[b, best]), atoms_tm1)
            predicted = softmax(logits_tm1[b, a_tm1[b]])
            yield -sum(m * math.log(p) for m, p in zip(target, predicted, strict=True))

    arrays = (atoms_tm1, logits_tm1, a_tm1, r_t, discount_t, atoms_t, logits_t)
    close = {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(call(losses.categorical_q_learning, *arrays), list(twin(mean)), **close)
    got = call(losses.categorical_double_q_learning, *arrays, selector)
    np.testing.assert_allclose(got, list(twin(lambda b, a: selector[b, a])), **close)


# Quantiles.


def test_quantile_q_learning_sums_over_the_prediction_and_averages_over_the_target():
    """Kills: the indicator the other way, tau of the target, sums or means over both or the wrong way round, the online network
    as target (decoys 50, 60), the target network as selector (it prefers action 1), the wrong action of the prediction (77),
    Huber without its linear part, a missing discount, a terminal that bootstraps."""
    loss = losses.quantile_q_learning(
        dist_q_tm1=f32([[[1, 77], [2, 77]], [[77, 3], [77, 4]]]),  # Two quantiles, two actions.
        tau_q_tm1=f32([[0.25, 0.875], [0.125, 0.5]]),
        a_tm1=i64([0, 1]),
        r_t=f32([0.5, 3.5]),
        discount_t=f32([0.5, 0.0]),  # The second transition is terminal.
        dist_q_t_selector=f32([[[60, 50]], [[60, 50]]]),  # One quantile.
        dist_q_t=f32([[[-1, 99], [2, 99], [8, 99]], [[99, 99]] * 3]),  # Three.
    )
    # The targets are 0, 1.5 and 4.5; delta of the quantile at 1 is -1, 0.5, 3.5, of that at 2 it is -2, -0.5, 2.5.
    quantile_25 = ((1 - 0.25) * 0.5 * 1**2 + 0.25 * 0.5 * 0.5**2 + 0.25 * (3.5 - 0.5)) / 3
    quantile_87 = ((1 - 0.875) * (2 - 0.5) + (1 - 0.875) * 0.5 * 0.5**2 + 0.875 * (2.5 - 0.5)) / 3
    terminal = 0.125 * 0.5 * 0.5**2 + (1 - 0.5) * 0.5 * 0.5**2  # All quantiles of the target are 3.5.
    torch.testing.assert_close(loss, f32([quantile_25 + quantile_87, terminal]))


@pytest.mark.parametrize(
    ("huber_param", "of_1", "of_minus_3"),
    [(2.0, 0.5 * 1**2 / 2, 2 * (3 - 1) / 2), (0.5, 0.5 * (1 - 0.25) / 0.5, 0.5 * (3 - 0.25) / 0.5), (0.0, 1.0, 3.0)],
)
def test_huber_param_is_the_bend_and_divides(huber_param, of_1, of_minus_3):
    """Kills: no division, a bend at 1 always, 0 that divides by 0."""
    one = f32([[[0]]]), f32([[0.25]]), i64([0])
    positive = losses.quantile_q_learning(*one, f32([1]), f32([0]), f32([[[0]]]), f32([[[0]]]), huber_param)
    negative = losses.quantile_q_learning(*one, f32([-3]), f32([0]), f32([[[0]]]), f32([[[0]]]), huber_param)
    torch.testing.assert_close(torch.cat([positive, negative]), f32([0.25 * of_1, 0.75 * of_minus_3]))


def test_plain_quantile_regression_has_its_minimum_at_the_quantile():
    """Of targets 0 to 9 the gradient changes its sign at the tau-quantile: below it pulls up, above it down."""
    targets = torch.arange(10.0).reshape(1, 10, 1)
    for tau, below, above in ((0.25, 1.9, 2.1), (0.75, 6.9, 7.1)):
        slopes = []
        for prediction in (below, above):
            dist = f32([[[prediction]]]).requires_grad_()
            losses.quantile_q_learning(dist, f32([[tau]]), i64([0]), f32([0]), f32([1]), targets, targets, 0.0).backward()
            slopes.append(float(dist.grad))
        assert slopes[0] < 0 < slopes[1]


def test_munchausen_quantile_q_learning_moves_every_quantile_of_the_target():
    """Kills: no clip, entropy with the wrong sign, no entropy, the greedy action's quantiles in place of the policy's mixture,
    a bonus that the discount removes or applies to, the policies of the two states swapped, a terminal that bootstraps (99)."""
    # Means of the destination are 2 + 0.5 ln p with p = 0.2, 0.8; of the two quantiles one is 1 or 2 off to either side.
    mean_t = 2 + 0.5 * f32([0.2, 0.8]).log()
    dist_t = torch.stack([mean_t + f32([-1, 2]), mean_t + f32([1, -2])])
    loss = losses.munchausen_quantile_q_learning(
        dist_q_tm1=f32([[[1, 77]], [[77, 5]]]),
        tau_q_tm1=f32([[0.25]]),
        a_tm1=i64([0, 1]),
        r_t=f32([1, -1]),
        discount_t=f32([0.5, 0.0]),  # The second transition is terminal.
        q_tm1_target=8 + 0.5 * f32([[0.25, 0.75]] * 2).log(),
        dist_q_t=torch.stack([dist_t, f32([[99, 99]] * 2)]),
        munchausen_coefficient=0.9,
        entropy_temperature=0.5,
        clip_value_min=-0.4,
    )
    # Of each action q - tau log pi is 2 in the mean, so 2 +- (0.2 * -1 + 0.8 * 2) under the policy: 3.4 and 0.6.
    high = 1 + 0.9 * -0.4 + 0.5 * 3.4 - 1
    low = 1 + 0.9 * -0.4 + 0.5 * 0.6 - 1
    terminal = -1 + 0.9 * 0.5 * math.log(0.75) - 5
    assert high > 1 and -1 < low < 0 and terminal < -1
    expected = [(0.25 * (high - 0.5) + 0.75 * 0.5 * low**2) / 2, 0.75 * (-terminal - 0.5)]
    torch.testing.assert_close(loss, f32(expected))


def quantile_loss_twin(predicted, taus, targets, kappa):
    """Equation 3 of the IQN paper."""
    total = 0.0
    for theta, tau in zip(predicted, taus, strict=True):
        for target in targets:
            delta = float(target) - float(theta)
            if kappa == 0:
                size = abs(delta)
            elif abs(delta) <= kappa:
                size = 0.5 * delta**2 / kappa
            else:
                size = (abs(delta) - 0.5 * kappa) * kappa / kappa
            total += ((1 - float(tau)) if delta < 0 else float(tau)) * size / len(targets)
    return total


def random_quantiles(rng, batch, actions):
    """Returns quantiles of prediction, target and selector, each of its own number, and the prediction's tau."""
    dists = [2 * rng.normal(size=(batch, int(rng.integers(1, 7)), actions)) for _ in range(3)]
    tau = rng.random((batch if rng.random() < 0.5 else 1, dists[0].shape[1]))
    return [array.astype(np.float32) for array in (*dists, tau)]


@pytest.mark.parametrize("kappa", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("seed", range(8))
def test_quantile_q_learning_agrees_with_a_literal_twin(seed, kappa):
    rng, batch, actions, a_tm1, r_t, discount_t = random_transitions(seed)
    dist_tm1, dist_t, selector, tau = random_quantiles(rng, batch, actions)
    expected = []
    for b in range(batch):
        best = max(range(actions), key=lambda a, b=b: sum(map(float, selector[b, :, a])))
        targets = [r_t[b] + discount_t[b] * value for value in dist_t[b, :, best]]
        expected.append(quantile_loss_twin(dist_tm1[b, :, a_tm1[b]], tau[b % len(tau)], targets, kappa))
    got = call(losses.quantile_q_learning, dist_tm1, tau, a_tm1, r_t, discount_t, selector, dist_t, huber_param=kappa)
    np.testing.assert_allclose(got, np.array(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_munchausen_quantile_q_learning_agrees_with_a_literal_twin(seed):
    rng, batch, actions, a_tm1, r_t, discount_t = random_transitions(seed)
    dist_tm1, dist_t, source, tau = random_quantiles(rng, batch, actions)
    alpha, temperature, clip = float(rng.uniform(0.1, 1)), float(rng.uniform(0.2, 2)), float(-rng.uniform(0.1, 2))
    kappa = float(rng.uniform(0.1, 2))
    q_tm1_target = source.mean(axis=1)
    expected = []
    for b in range(batch):
        pi_tm1 = softmax(q_tm1_target[b] / temperature)
        bonus = alpha * min(max(temperature * math.log(pi_tm1[a_tm1[b]]), clip), 0.0)
        pi_t = softmax([sum(map(float, dist_t[b, :, a])) / dist_t.shape[1] / temperature for a in range(actions)])
        targets = []
        for j in range(dist_t.shape[1]):
            soft_value = sum(pi_t[a] * (dist_t[b, j, a] - temperature * math.log(pi_t[a])) for a in range(actions))
            targets.append(r_t[b] + bonus + discount_t[b] * soft_value)
        expected.append(quantile_loss_twin(dist_tm1[b, :, a_tm1[b]], tau[b % len(tau)], targets, kappa))
    got = call(
        losses.munchausen_quantile_q_learning,
        *(dist_tm1, tau, a_tm1, r_t, discount_t, q_tm1_target, dist_t),
        munchausen_coefficient=alpha,
        entropy_temperature=temperature,
        clip_value_min=clip,
        huber_param=kappa,
    )
    np.testing.assert_allclose(got, np.array(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_one_median_is_half_the_huber_loss_of_the_expectation(seed):
    """With one quantile of tau 0.5 the losses of quantiles are half `huber` of the TD errors of the means."""
    rng, batch, actions, a_tm1, r_t, discount_t = random_transitions(seed)
    q_tm1, q_source, q_t, q_selector = torch.from_numpy(rng.normal(size=(4, batch, actions)).astype(np.float32))
    transitions = [torch.from_numpy(array) for array in (a_tm1, r_t, discount_t)]
    prediction = (q_tm1[:, None], f32([[0.5]]), *transitions)
    td_error = losses.double_q_learning(q_tm1, *transitions, q_t, q_selector)
    loss = losses.quantile_q_learning(*prediction, q_selector[:, None], q_t[:, None])
    torch.testing.assert_close(loss, 0.5 * losses.huber(td_error))
    numbers = {"munchausen_coefficient": 0.9, "entropy_temperature": 0.5, "clip_value_min": -0.4}
    td_error = losses.munchausen_q_learning(q_tm1, *transitions, q_source, q_t, **numbers)
    loss = losses.munchausen_quantile_q_learning(*prediction, q_source, q_t[:, None], **numbers)
    torch.testing.assert_close(loss, 0.5 * losses.huber(td_error))
