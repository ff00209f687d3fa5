"""Expectations: golden values with decoys, literal twins. The whole family: gradients, checks at the door, no waiting."""

import inspect
import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from common.value_rescaling import SIGNED_HYPERBOLIC_PAIR, TxPair, signed_hyperbolic, signed_parabolic
from learner import losses


def f32(values):
    return torch.tensor(values, dtype=torch.float32)


def i64(values):
    return torch.tensor(values, dtype=torch.int64)


Q_TM1 = [[1, 7, 8], [5, 2, 6]]
Q_T_VALUE = [[99, 4, 98], [91, 9, 66]]
Q_T_SELECTOR = [[2, 10, 1], [11, 20, 1]]
SQUARE_PAIR = TxPair(torch.sqrt, torch.square)
MUNCHAUSEN = {"munchausen_coefficient": 0.9, "entropy_temperature": 0.5, "clip_value_min": -0.4}


def test_double_q_learning_selects_online_and_values_with_target():
    """Kills: max over the target network (99), max over the online network (10), no discount, terminal that bootstraps."""
    td_error = losses.double_q_learning(
        q_tm1=f32(Q_TM1),
        a_tm1=i64([0, 1]),
        r_t=f32([1, 1]),
        discount_t=f32([0.5, 0.0]),  # The second transition is terminal.
        q_t_value=f32(Q_T_VALUE),
        q_t_selector=f32(Q_T_SELECTOR),
    )
    torch.testing.assert_close(td_error, f32([1 + 0.5 * 4 - 1, 1 - 2]))


def test_q_learning_takes_the_maximum_of_the_target_network():
    """Kills: the value of the action taken (99 is at 0, the maximum of the second row at 2), the mean, a wrong sign."""
    td_error = losses.q_learning(
        q_tm1=f32(Q_TM1),
        a_tm1=i64([1, 0]),
        r_t=f32([2, -1]),
        discount_t=f32([0.5, 0.25]),
        q_t=f32([[3, 4, 10], [8, 9, 66]]),
    )
    torch.testing.assert_close(td_error, f32([2 + 0.5 * 10 - 7, -1 + 0.25 * 66 - 5]))


@pytest.mark.parametrize("double", [False, True])
def test_a_pair_rescales_the_target_and_nothing_else(double):
    """Kills: no inverse (14 - 5), the inverse after the discount (10), the target left as it is (22), the inverse twice, the
    prediction rescaled too, apply where apply_inv belongs."""
    q_t = f32([[6, 2], [1, 3]])
    extra = {"q_t_value": q_t, "q_t_selector": f32([[9, 8], [8, 9]])} if double else {"q_t": q_t}
    td_error = (losses.double_q_learning if double else losses.q_learning)(
        q_tm1=f32([[5, 77], [66, 4]]),
        a_tm1=i64([0, 1]),
        r_t=f32([7, 25]),
        discount_t=f32([0.25, 0.0]),  # The second transition is terminal.
        tx_pair=SQUARE_PAIR,
        **extra,
    )
    torch.testing.assert_close(td_error, f32([math.sqrt(7 + 0.25 * 6**2) - 5, math.sqrt(25) - 4]))


def test_munchausen_q_learning_adds_the_clipped_log_policy_and_the_soft_value():
    """Kills: no clip (0.5 ln 0.25 = -0.69), a clip of log pi before tau, the log-policy of the online network (-ln 2 / 2) or of
    the destination (0.2), entropy with the wrong sign (2 + 2 sum pi log pi / 2), the maximum for the soft value (1.89), no tau,
    a bonus that the discount removes, a terminal that bootstraps (99), no alpha."""
    td_error = losses.munchausen_q_learning(
        q_tm1=f32([[3, 3], [5, 5], [4, 4]]),  # Online policy: a half each.
        a_tm1=i64([0, 1, 1]),
        r_t=f32([1, -1, 2]),
        discount_t=f32([0.5, 0.25, 0.0]),  # The third transition is terminal.
        # tau log pi = [0.5 ln 0.25, 0.5 ln 0.75] = [-0.69, -0.14], whatever the 8.
        q_tm1_target=8 + 0.5 * f32([[0.25, 0.75]] * 3).log(),
        # q - tau log pi = 2 for each action, so their mean under any policy is.
        q_t_target=f32([[2], [-3], [99]]) + 0.5 * f32([[0.2, 0.8]] * 3).log(),
        **MUNCHAUSEN,
    )
    unclipped = 0.9 * 0.5 * math.log(0.75)
    expected = [1 + 0.9 * -0.4 + 0.5 * 2 - 3, -1 + unclipped + 0.25 * -3 - 5, 2 + unclipped - 4]
    torch.testing.assert_close(td_error, f32(expected))


def test_munchausen_q_learning_stays_exact_where_values_are_large_and_the_policy_is_sharp():
    """Kills: log(softmax), which is -inf here, and pi * log pi as 0 * inf."""
    td_error = losses.munchausen_q_learning(
        f32([[0, 0]]), i64([1]), f32([1]), f32([1]), f32([[5000, 0]]), f32([[-5000, 4000]]), **MUNCHAUSEN
    )
    torch.testing.assert_close(td_error, f32([1 + 0.9 * -0.4 + 4000]))


def test_huber_is_quadratic_inside_and_linear_outside():
    """Kills: a threshold elsewhere than 1, a missing -0.5, a slope that is not clipped to [-1, 1]."""
    td_error = f32([0.5, -0.5, 1.0, 3.0, -3.0]).requires_grad_()
    loss = losses.huber(td_error)
    torch.testing.assert_close(loss, f32([0.125, 0.125, 0.5, 2.5, 2.5]))
    loss.sum().backward()
    torch.testing.assert_close(td_error.grad, f32([0.5, -0.5, 1.0, 1.0, -1.0]))


def test_mse_is_half_the_square():
    torch.testing.assert_close(losses.mse(f32([2.0, -3.0])), f32([2.0, 4.5]))


def random_transitions(seed):
    """Returns the generator, B (1 among them), A, and a_tm1, r_t, discount_t, where some transitions are terminal."""
    rng = np.random.default_rng(seed)
    batch, actions = int(rng.integers(1, 9)) if seed else 1, int(rng.integers(2, 7))
    a_tm1 = rng.integers(actions, size=batch)
    r_t = rng.normal(size=batch).astype(np.float32)
    discount_t = (rng.random(batch) * (rng.random(batch) < 0.8)).astype(np.float32)
    return rng, batch, actions, a_tm1, r_t, discount_t


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_q_learning_and_double_q_learning_agree_with_a_literal_twin(seed, rescaled):
    rng, batch, actions, a_tm1, r_t, discount_t = random_transitions(seed)
    q_tm1, q_value, q_selector = 3 * rng.normal(size=(3, batch, actions)).astype(np.float32)
    eps = 1e-3

    def apply(x):
        return math.copysign(math.sqrt(abs(x) + 1) - 1, x) + eps * x if rescaled else x

    def apply_inv(x):
        root = math.sqrt(1 + 4 * eps * (abs(x) + 1 + eps))
        return math.copysign(((root - 1) / (2 * eps)) ** 2 - 1, x) if rescaled else x

    def twin(selector):
        for b in range(batch):
            best = max(range(actions), key=lambda a: selector[b, a])
            yield apply(r_t[b] + discount_t[b] * apply_inv(float(q_value[b, best]))) - q_tm1[b, a_tm1[b]]

    arguments = list(map(torch.from_numpy, (q_tm1, a_tm1, r_t, discount_t, q_value)))
    pair = {"tx_pair": TxPair(signed_hyperbolic, signed_parabolic)} if rescaled else {}
    close = {"rtol": 1e-5, "atol": 1e-5}
    np.testing.assert_allclose(losses.q_learning(*arguments, **pair).numpy(), list(twin(q_value)), **close)
    got = losses.double_q_learning(*arguments, torch.from_numpy(q_selector), **pair)
    np.testing.assert_allclose(got.numpy(), list(twin(q_selector)), **close)


@pytest.mark.parametrize("seed", range(8))
def test_munchausen_q_learning_agrees_with_a_literal_twin(seed):
    rng, batch, actions, a_tm1, r_t, discount_t = random_transitions(seed)
    q_tm1, q_tm1_target, q_t_target = rng.normal(size=(3, batch, actions)).astype(np.float32)
    alpha, tau, clip = float(rng.uniform(0.1, 1)), float(rng.uniform(0.1, 2)), float(-rng.uniform(0.1, 2))

    def policy(q):
        exponentials = [math.exp(float(value) / tau) for value in q]
        return [e / sum(exponentials) for e in exponentials]

    expected = []
    for b in range(batch):
        bonus = alpha * min(max(tau * math.log(policy(q_tm1_target[b])[a_tm1[b]]), clip), 0.0)
        pi_t = policy(q_t_target[b])
        soft_value = sum(pi_t[a] * (q_t_target[b, a] - tau * math.log(pi_t[a])) for a in range(actions))
        expected.append(r_t[b] + bonus + discount_t[b] * soft_value - q_tm1[b, a_tm1[b]])
    got = losses.munchausen_q_learning(
        *map(torch.from_numpy, (q_tm1, a_tm1, r_t, discount_t, q_tm1_target, q_t_target)),
        munchausen_coefficient=alpha,
        entropy_temperature=tau,
        clip_value_min=clip,
    )
    np.testing.assert_allclose(got.numpy(), np.array(expected), rtol=1e-5, atol=1e-5)


# The whole family, on random tensors. Letters as in the docstrings; B 4, A 3, N 5, M 6, K 2.
SIZES = {"B": 4, "A": 3, "N": 5, "M": 6, "K": 2, "1": 1}
SCALARS = {"a_tm1": "B", "r_t": "B", "discount_t": "B"}
CATEGORICAL = {"q_atoms_tm1": "N", "q_logits_tm1": "BAN", **SCALARS, "q_atoms_t": "M", "q_logits_t": "BAM"}
LAYOUTS = {
    "q_learning": {"q_tm1": "BA", **SCALARS, "q_t": "BA"},
    "double_q_learning": {"q_tm1": "BA", **SCALARS, "q_t_value": "BA", "q_t_selector": "BA"},
    "munchausen_q_learning": {"q_tm1": "BA", **SCALARS, "q_tm1_target": "BA", "q_t_target": "BA"},
    "categorical_q_learning": CATEGORICAL,
    "categorical_double_q_learning": {**CATEGORICAL, "q_t_selector": "BA"},
    "quantile_q_learning": {
        "dist_q_tm1": "BNA",
        "tau_q_tm1": "BN",
        **SCALARS,
        "dist_q_t_selector": "BKA",
        "dist_q_t": "BMA",
    },
    "munchausen_quantile_q_learning": {
        "dist_q_tm1": "BNA",
        "tau_q_tm1": "1N",
        **SCALARS,
        "q_tm1_target": "BA",
        "dist_q_t": "BMA",
    },
}
FAMILY = list(LAYOUTS)
PREDICTIONS = {"q_tm1", "q_logits_tm1", "dist_q_tm1"}
ACTION_DIM = {"q_tm1": 1, "q_logits_tm1": 1, "dist_q_tm1": 2}


def arguments_of(name):
    generator = torch.Generator().manual_seed(0)

    def tensor(argument, letters):
        shape = [SIZES[letter] for letter in letters]
        if argument == "a_tm1":
            return torch.randint(SIZES["A"], shape, generator=generator)
        values = torch.rand(shape, generator=generator)
        return values.cumsum(0) if "atoms" in argument else values

    return {argument: tensor(argument, letters) for argument, letters in LAYOUTS[name].items()}


def call(name, arguments):
    return getattr(losses, name)(**arguments, **(MUNCHAUSEN if "munchausen" in name else {}))


def test_the_family_is_complete():
    public = {
        name for name, function in inspect.getmembers(losses, inspect.isfunction) if function.__module__ == losses.__name__
    }
    assert {name for name in public if not name.startswith("_")} == {*FAMILY, "huber", "mse", "categorical_l2_project"}


@pytest.mark.parametrize("name", FAMILY)
def test_only_the_prediction_at_the_action_taken_gets_a_gradient(name):
    arguments = arguments_of(name)
    for tensor in arguments.values():
        if tensor.is_floating_point() and tensor is not arguments.get("tau_q_tm1"):
            tensor.requires_grad_()
    result = call(name, arguments)
    assert result.shape == (SIZES["B"],) and result.dtype == torch.float32
    result.sum().backward()
    for argument, tensor in arguments.items():
        if argument in PREDICTIONS:
            at_action = tensor.grad.movedim(ACTION_DIM[argument], 1)  # [B, A, ...]
            is_taken = torch.arange(SIZES["A"]) == arguments["a_tm1"][:, None]  # [B, A]
            assert (at_action[is_taken] != 0).all() and (at_action[~is_taken] == 0).all()
        else:
            assert tensor.grad is None, argument


@pytest.mark.parametrize("seed", range(3))
def test_td_errors_have_minus_one_for_their_gradient(seed):
    """So that 0.5 * td_error**2 has the gradient -td_error."""
    for name in ("q_learning", "double_q_learning", "munchausen_q_learning"):
        arguments = arguments_of(name)
        arguments["q_tm1"].requires_grad_()
        call(name, arguments).sum().backward()
        expected = torch.zeros(SIZES["B"], SIZES["A"]).scatter(1, arguments["a_tm1"][:, None], -1.0)
        torch.testing.assert_close(arguments["q_tm1"].grad, expected, rtol=0.0, atol=0.0)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda tensor: tensor[None],
        lambda tensor: tensor.sum(),
        lambda tensor: tensor.to(torch.int32 if tensor.dtype == torch.int64 else torch.float64),
        lambda tensor: tensor.repeat(3, *[1] * (tensor.ndim - 1)),  # Another B, or another number of atoms.
        lambda tensor: torch.cat([tensor, tensor[..., :1]], dim=-1),
    ],
    ids=["rank", "scalar", "dtype", "first_size", "last_size"],
)
@pytest.mark.parametrize(("name", "argument"), [(name, argument) for name in FAMILY for argument in LAYOUTS[name]])
def test_a_wrong_rank_shape_or_dtype_raises_and_names_the_argument(name, argument, spoil):
    arguments = arguments_of(name)
    arguments[argument] = spoil(arguments[argument])
    with pytest.raises(ValueError, match=rf"\b{argument}\b.*got torch"):
        call(name, arguments)


def test_a_vector_that_would_broadcast_to_a_matrix_raises():
    arguments = arguments_of("double_q_learning")
    with pytest.raises(ValueError, match=r"^r_t: expected torch.float32 \[B\], got torch.float32 \[4, 1\]$"):
        call("double_q_learning", {**arguments, "r_t": arguments["r_t"][:, None]})
    with pytest.raises(
        ValueError, match=r"^q_t_value: expected torch.float32 \[B, A\] with A = 3 as in q_tm1, got torch.float32"
    ):
        call("double_q_learning", {**arguments, "q_t_value": arguments["q_t_value"][:, :1]})


@pytest.mark.parametrize(
    ("name", "number", "wrong"),
    [
        ("munchausen_q_learning", "munchausen_coefficient", 1.5),
        ("munchausen_q_learning", "entropy_temperature", 0.0),
        ("munchausen_quantile_q_learning", "clip_value_min", 1.0),
        ("munchausen_quantile_q_learning", "huber_param", float("nan")),
        ("quantile_q_learning", "huber_param", -1.0),
    ],
)
def test_a_number_out_of_its_range_raises_and_is_named(name, number, wrong):
    with pytest.raises(ValueError, match=f"^{number}: "):
        getattr(losses, name)(**arguments_of(name), **(MUNCHAUSEN if "munchausen" in name else {}) | {number: wrong})


class Recorder(TorchDispatchMode):
    """Notes the largest result."""

    def __init__(self):
        super().__init__()
        self.max_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.max_elements = max(self.max_elements, result.numel())
        return result


def test_the_projection_makes_no_tensor_of_pairs_of_atoms():
    batch, num_atoms = 3, 40
    with Recorder() as recorder:
        z = torch.rand(batch, num_atoms)
        losses.categorical_l2_project(z, z.softmax(1), torch.arange(num_atoms).float())
    assert batch * num_atoms <= recorder.max_elements <= 2 * batch * num_atoms


@pytest.mark.parametrize("name", FAMILY)
def test_no_shape_depends_on_a_value_and_nothing_waits_for_the_device(name):
    """Meta tensors have no values: whoever asks for one raises."""
    arguments = {argument: tensor.to("meta") for argument, tensor in arguments_of(name).items()}
    with pytest.raises(RuntimeError, match="meta"):
        arguments["r_t"].max().item()  # The test has power.
    assert call(name, arguments).shape == (SIZES["B"],)


@pytest.mark.parametrize("name", FAMILY)
def test_deterministic_algorithms_give_the_same_bits(name):
    def run():
        arguments = arguments_of(name)
        prediction = next(arguments[argument].requires_grad_() for argument in arguments if argument in PREDICTIONS)
        result = call(name, arguments)
        result.sum().backward()
        return result.detach(), prediction.grad

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        for first, second in zip(run(), run(), strict=True):
            assert torch.equal(first, second)
    finally:
        torch.use_deterministic_algorithms(before)


def test_a_pair_reaches_both_functions():
    for name in ("q_learning", "double_q_learning"):
        arguments = arguments_of(name)
        assert (getattr(losses, name)(**arguments, tx_pair=SIGNED_HYPERBOLIC_PAIR) != call(name, arguments)).any()
