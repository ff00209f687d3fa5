"""Golden values with decoys, and gradients."""

import numpy as np
import pytest
import torch

from learner import losses


def f32(values):
    return torch.tensor(values, dtype=torch.float32)


def i64(values):
    return torch.tensor(values, dtype=torch.int64)


Q_TM1 = [[1, 7, 8], [5, 2, 6]]
Q_T_VALUE = [[99, 4, 98], [91, 9, 66]]
Q_T_SELECTOR = [[2, 10, 1], [11, 20, 1]]


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
        q_t_value=f32([[3, 4, 10], [8, 9, 66]]),
    )
    torch.testing.assert_close(td_error, f32([2 + 0.5 * 10 - 7, -1 + 0.25 * 66 - 5]))


def test_only_the_prediction_carries_a_gradient():
    tensors = [f32(values).requires_grad_() for values in (Q_TM1, Q_T_VALUE, Q_T_SELECTOR)]
    q_tm1, q_t_value, q_t_selector = tensors
    td_error = losses.double_q_learning(q_tm1, i64([0, 1]), f32([1, 1]), f32([0.5, 0.9]), q_t_value, q_t_selector)
    losses.mse(td_error).sum().backward()
    expected = torch.zeros(2, 3)
    expected[0, 0], expected[1, 1] = -td_error.detach()
    torch.testing.assert_close(q_tm1.grad, expected)
    assert q_t_value.grad is None and q_t_selector.grad is None


def test_huber_is_quadratic_inside_and_linear_outside():
    """Kills: a threshold elsewhere than 1, a missing -0.5, a slope that is not clipped to [-1, 1]."""
    td_error = f32([0.5, -0.5, 1.0, 3.0, -3.0]).requires_grad_()
    loss = losses.huber(td_error)
    torch.testing.assert_close(loss, f32([0.125, 0.125, 0.5, 2.5, 2.5]))
    loss.sum().backward()
    torch.testing.assert_close(td_error.grad, f32([0.5, -0.5, 1.0, 1.0, -1.0]))


def test_mse_is_half_the_square():
    torch.testing.assert_close(losses.mse(f32([2.0, -3.0])), f32([2.0, 4.5]))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("a_tm1", i64([[0], [1]])),
        ("a_tm1", f32([0, 1])),
        ("r_t", f32([[1], [1]])),  # Would broadcast to [2, 2].
        ("discount_t", f32([0.5])),
        ("q_t_value", f32([[1, 2, 3]])),
        ("q_t_selector", torch.zeros(2, 3, dtype=torch.float64)),
    ],
)
def test_a_wrong_shape_or_dtype_raises_and_names_the_argument(name, wrong):
    arguments = {
        "q_tm1": f32(Q_TM1),
        "a_tm1": i64([0, 1]),
        "r_t": f32([1, 1]),
        "discount_t": f32([0.5, 0.5]),
        "q_t_value": f32(Q_T_VALUE),
        "q_t_selector": f32(Q_T_SELECTOR),
    }
    with pytest.raises(ValueError, match=name):
        losses.double_q_learning(**arguments | {name: wrong})


@pytest.mark.parametrize("seed", range(5))
def test_double_q_learning_agrees_with_a_literal_twin(seed):
    rng = np.random.default_rng(seed)
    batch, actions = int(rng.integers(1, 9)), int(rng.integers(2, 7))
    q_tm1, q_value, q_selector = rng.normal(size=(3, batch, actions)).astype(np.float32)
    a_tm1 = rng.integers(actions, size=batch)
    r_t, discount_t = rng.normal(size=batch).astype(np.float32), rng.random(batch).astype(np.float32)
    expected = []
    for b in range(batch):
        best = max(range(actions), key=lambda a, b=b: q_selector[b, a])
        expected.append(r_t[b] + discount_t[b] * q_value[b, best] - q_tm1[b, a_tm1[b]])
    got = losses.double_q_learning(
        *map(torch.from_numpy, (q_tm1, a_tm1, r_t, discount_t, q_value, q_selector)),
    )
    np.testing.assert_allclose(got.numpy(), np.array(expected), rtol=1e-5, atol=1e-6)
