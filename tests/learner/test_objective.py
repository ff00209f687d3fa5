"""Which network values what: the objective against the losses, called by hand with the passes that each method names."""

import pytest
import torch

from common.config import EnvSpec, LearnerConfig, NetworkConfig
from common.networks import make_network
from common.value_rescaling import SIGNED_HYPERBOLIC_PAIR
from learner import losses
from learner.objective import Objective

CPU = torch.device("cpu")
SPEC = EnvSpec((3,), "<f4", 2, 4)
BATCH = 6
BONUS = {"munchausen_coefficient": 0.7, "entropy_temperature": 0.1, "clip_value_min": -0.5}


class Setup:
    """Two networks that differ, and a batch."""

    def __init__(self, algorithm, distribution, *, noisy=False, rescaled=False, loss="huber"):
        sizes = {"num_atoms": 11, "num_quantiles": 5, "num_policy_quantiles": 3, "num_cosines": 4}
        network = NetworkConfig(
            hidden_sizes=(8,),
            distribution=distribution,
            dueling=True,
            noisy_sigma=0.5 if noisy else None,
            value_rescaling=rescaled,
            **sizes,
        )
        self.config = LearnerConfig(
            algorithm=algorithm,
            loss=loss,
            munchausen_coefficient=0.7,
            entropy_temperature=0.1,
            munchausen_clip=-0.5,
            num_quantile_samples=7,
            num_target_quantile_samples=9,
        )
        self.online, self.target = make_network(network, SPEC, 0), make_network(network, SPEC, 1)
        generator = torch.Generator().manual_seed(0)
        self.s_tm1, self.s_t = torch.randn(2, BATCH, 2, 3, generator=generator)
        self.a_tm1 = torch.tensor([0, 1, 2, 3, 0, 1])
        self.r_t = torch.randn(BATCH, generator=generator)
        self.discount_t = torch.tensor([0.9, 0.9, 0.0, 0.8, 0.9, 0.5])
        self.objective = Objective(self.config, self.online, CPU, torch.float32)
        self.draws = self.objective.draw(self.online, BATCH, generator)

    def terms(self):
        batch = (self.s_tm1, self.a_tm1, self.r_t, self.discount_t, self.s_t)
        return self.objective(self.online, self.target, *batch, self.draws)

    def outputs(self, network, state, row, taus=None):
        noise = self.draws.noise[row] if network.num_noise else None
        return network.distribution(state, noise=noise, taus=taus)

    def values(self, network, state, row):
        return network.values(state, noise=self.draws.noise[row] if network.num_noise else None)

    def expected(self):
        """Returns (loss, td_error), written out for each of the methods."""
        online, target, draws = self.online, self.target, self.draws
        rest = (self.a_tm1, self.r_t, self.discount_t)
        prediction = self.outputs(online, self.s_tm1, 0, draws.taus_tm1)
        outcome = self.outputs(target, self.s_t, 3, draws.taus_t)
        q_tm1, q_t = online.mean(prediction), target.mean(outcome)
        selector = self.values(online, self.s_t, 2) if self.config.algorithm == "double_q_learning" else q_t
        pair = {"tx_pair": SIGNED_HYPERBOLIC_PAIR} if online.value_rescaling else {}
        if self.config.algorithm == "munchausen_q_learning":
            before = self.values(target, self.s_tm1, 1)
            td_error = losses.munchausen_q_learning(q_tm1, *rest, before, q_t, **BONUS)
        else:
            td_error = losses.double_q_learning(q_tm1, *rest, q_t, selector, **pair)
        if online.atoms is not None:
            atoms = online.atoms
            loss = losses.categorical_double_q_learning(atoms, prediction, *rest, atoms, outcome, selector)
        elif online.taus is None:
            loss = (losses.huber if self.config.loss == "huber" else losses.mse)(td_error)
        else:
            taus = online.taus if draws.taus_tm1 is None else draws.taus_tm1
            if self.config.algorithm == "munchausen_q_learning":
                loss = losses.munchausen_quantile_q_learning(prediction, taus, *rest, before, outcome, **BONUS)
            else:
                loss = losses.quantile_q_learning(prediction, taus, *rest, selector[:, None], outcome)
        return loss, td_error


COMBINATIONS = [
    (algorithm, distribution)
    for algorithm in ("q_learning", "double_q_learning", "munchausen_q_learning")
    for distribution in ("expectation", "categorical", "quantile", "implicit_quantile")
    if (algorithm, distribution) != ("munchausen_q_learning", "categorical")
]


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize(("algorithm", "distribution"), COMBINATIONS)
def test_every_combination_is_the_loss_that_its_names_say(algorithm, distribution, noisy):
    """Kills: online and target swapped anywhere, a selector of the wrong network, one noise for all passes, swapped taus."""
    setup = Setup(algorithm, distribution, noisy=noisy)
    terms, (loss, td_error) = setup.terms(), setup.expected()
    torch.testing.assert_close(terms.loss, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(terms.td_error, td_error.detach(), rtol=1e-5, atol=1e-6)
    assert terms.loss.requires_grad and not terms.td_error.requires_grad and not terms.value.requires_grad
    parameters = list(setup.online.parameters())
    mine, theirs = (torch.autograd.grad(value.sum(), parameters) for value in (terms.loss, loss))
    for gradient, expected in zip(mine, theirs, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    assert all(parameter.grad is None for parameter in setup.target.parameters())


@pytest.mark.parametrize(("algorithm", "distribution"), COMBINATIONS)
def test_the_combinations_differ_in_this_test(algorithm, distribution):
    """The test above has power only where another wiring gives other numbers."""
    setup = Setup(algorithm, distribution, noisy=True)
    right = setup.terms()
    setup.online, setup.target = setup.target, setup.online
    assert (setup.terms().loss - right.loss).abs().max() > 1e-3
    setup.online, setup.target = setup.target, setup.online
    setup.draws = setup.draws._replace(noise=setup.draws.noise.flip(0))
    assert (setup.terms().loss - right.loss).abs().max() > 1e-3


@pytest.mark.parametrize("loss", ["huber", "mse"])
def test_rescaled_values_are_compared_with_rescaled_targets(loss):
    setup = Setup("double_q_learning", "expectation", rescaled=True, loss=loss)
    setup.r_t = 20.0 * setup.r_t
    terms, (expected, _) = setup.terms(), setup.expected()
    torch.testing.assert_close(terms.loss, expected)
    plain = Setup("double_q_learning", "expectation", loss=loss)
    plain.r_t = setup.r_t
    assert (plain.terms().loss - terms.loss).abs().max() > 1.0


def test_the_passes_have_noise_of_their_own_and_every_update_has_new():
    setup = Setup("double_q_learning", "expectation", noisy=True)
    rows = setup.draws.noise[:, 0]
    assert all((rows[i] != rows[j]).all() for i in range(4) for j in range(i))
    again = setup.objective.draw(setup.online, BATCH, torch.Generator().manual_seed(1))
    assert (again.noise != setup.draws.noise).all()
    same = setup.objective.draw(setup.online, BATCH, torch.Generator().manual_seed(1))
    assert torch.equal(same.noise, again.noise)


def test_quantiles_are_drawn_for_every_transition():
    setup = Setup("q_learning", "implicit_quantile")
    assert setup.draws.taus_tm1.shape == (BATCH, 7) and setup.draws.taus_t.shape == (BATCH, 9)
    assert setup.draws.taus_tm1.unique().numel() == BATCH * 7
