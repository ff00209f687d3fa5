"""TD errors and losses of Q-learning. Pure, batched, named as the papers name them.

B batch, A actions. Every function returns the TD error `target - prediction`, so `0.5 * td_error**2` has the gradient
`-td_error` in the prediction.
"""

from __future__ import annotations

import torch
from torch import Tensor


def q_learning(q_tm1: Tensor, a_tm1: Tensor, r_t: Tensor, discount_t: Tensor, q_t_value: Tensor) -> Tensor:
    """TD errors of Q-learning with a target network.

        target_tm1 = r_t + discount_t * max_a q_t_value[a]
        td_error   = target_tm1 - q_tm1[a_tm1]

    The target carries no gradient. A terminated transition has discount_t = 0: its target is its reward alone.

    Source: Mnih et al. 2015, "Human-level control through deep reinforcement learning",
    https://doi.org/10.1038/nature14236.

    Args:
      q_tm1: f32[B, A] online values in the source state.
      a_tm1: i64[B] actions taken there, in [0, A).
      r_t: f32[B] n-step returns, in units of clipped reward.
      discount_t: f32[B] in [0, 1].
      q_t_value: f32[B, A] target-network values in the destination state.

    Returns:
      f32[B] TD errors, target minus prediction.

    Raises:
      ValueError: for a wrong rank, shape or dtype, before a broadcast can hide it.
    """
    return double_q_learning(q_tm1, a_tm1, r_t, discount_t, q_t_value, q_t_value)


def double_q_learning(
    q_tm1: Tensor, a_tm1: Tensor, r_t: Tensor, discount_t: Tensor, q_t_value: Tensor, q_t_selector: Tensor
) -> Tensor:
    """TD errors of double Q-learning.

        target_tm1 = r_t + discount_t * q_t_value[argmax_a q_t_selector[a]]
        td_error   = target_tm1 - q_tm1[a_tm1]

    The target carries no gradient. A terminated transition has discount_t = 0, so what q_t_value holds there is not used.

    Source: van Hasselt, Guez, Silver 2016, "Deep Reinforcement Learning with Double Q-learning",
    https://arxiv.org/abs/1509.06461.

    Args:
      q_tm1: f32[B, A] online values in the source state.
      a_tm1: i64[B] actions taken there, in [0, A).
      r_t: f32[B] n-step returns, in units of clipped reward.
      discount_t: f32[B] in [0, 1].
      q_t_value: f32[B, A] target-network values in the destination state: they value the action.
      q_t_selector: f32[B, A] online values in the destination state: they pick it.

    Returns:
      f32[B] TD errors, target minus prediction.

    Raises:
      ValueError: for a wrong rank, shape or dtype, before a broadcast can hide it.
    """
    _check(q_tm1=q_tm1, q_t_value=q_t_value, q_t_selector=q_t_selector, a_tm1=a_tm1, r_t=r_t, discount_t=discount_t)
    best_a_t = q_t_selector.argmax(dim=1)  # [B]
    bootstrap_t = q_t_value.gather(1, best_a_t[:, None])[:, 0]  # [B]
    target_tm1 = (r_t + discount_t * bootstrap_t).detach()  # [B]
    qa_tm1 = q_tm1.gather(1, a_tm1[:, None])[:, 0]  # [B]
    return target_tm1 - qa_tm1


def mse(td_error: Tensor) -> Tensor:
    """Returns f32[B], `0.5 * td_error**2`."""
    return 0.5 * td_error.square()


def huber(td_error: Tensor) -> Tensor:
    """Returns f32[B]: `0.5 * td_error**2` where |td_error| <= 1, else `|td_error| - 0.5`.

    Its gradient is the TD error clipped to [-1, 1], as in Mnih et al. 2015.
    """
    size = td_error.abs()
    quadratic = size.clamp(max=1.0)
    return 0.5 * quadratic.square() + (size - quadratic)


def _check(**tensors: Tensor) -> None:
    """Raises ValueError unless matrices are f32[B, A], a_tm1 is i64[B] and the other vectors f32[B]."""
    shape = tensors["q_tm1"].shape
    for name, tensor in tensors.items():
        expected = shape if name.startswith("q_") else shape[:1]
        if len(shape) != 2 or tensor.shape != expected:
            raise ValueError(f"{name}: expected shape {tuple(expected)} beside q_tm1 {tuple(shape)}, got {tuple(tensor.shape)}")
        dtype = torch.int64 if name == "a_tm1" else torch.float32
        if tensor.dtype != dtype:
            raise ValueError(f"{name}: expected {dtype}, got {tensor.dtype}")
