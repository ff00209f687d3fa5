"""TD errors and losses of Q-learning, of expectations, atoms and quantiles. Pure, batched, named as rlax names them.

B batch, A actions, N atoms or quantiles of the prediction, M of the target. Only the prediction, the online network's output in
the source state, gets a gradient; no target does.

`q_learning`, `double_q_learning` and `munchausen_q_learning` return the TD error `target - prediction`, so `0.5 * td_error**2`
has the gradient `-td_error` in the prediction. The distributional functions return losses; the TD error of the expected return,
which priorities are made of, is that of the first three on the means over atoms or quantiles.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from common.value_rescaling import IDENTITY_PAIR, TxPair


def q_learning(
    q_tm1: Tensor, a_tm1: Tensor, r_t: Tensor, discount_t: Tensor, q_t: Tensor, *, tx_pair: TxPair = IDENTITY_PAIR
) -> Tensor:
    """TD errors of Q-learning with a target network.

        target_tm1 = apply(r_t + discount_t * apply_inv(max_a q_t[a]))
        td_error   = target_tm1 - q_tm1[a_tm1]

    The target carries no gradient. A terminated transition has discount_t = 0: its target is its (rescaled) reward alone.

    Source: Mnih et al. 2015, "Human-level control through deep reinforcement learning",
    https://doi.org/10.1038/nature14236; apply: see common/value_rescaling.py.

    Args:
      q_tm1: f32[B, A] online values in the source state.
      a_tm1: i64[B] actions taken there, in [0, A).
      r_t: f32[B] n-step returns, in units of reward (clipped, if the run clips).
      discount_t: f32[B] in [0, 1].
      q_t: f32[B, A] target-network values in the destination state.
      tx_pair: the rescaling that q_tm1 and q_t are in.

    Returns:
      f32[B] TD errors, target minus prediction, rescaled.

    Raises:
      ValueError: for a wrong rank, shape or dtype, before a broadcast can hide it.
    """
    _check(q_tm1=(q_tm1, "BA"), a_tm1=(a_tm1, "B"), r_t=(r_t, "B"), discount_t=(discount_t, "B"), q_t=(q_t, "BA"))
    return double_q_learning(q_tm1, a_tm1, r_t, discount_t, q_t, q_t, tx_pair=tx_pair)


def double_q_learning(
    q_tm1: Tensor,
    a_tm1: Tensor,
    r_t: Tensor,
    discount_t: Tensor,
    q_t_value: Tensor,
    q_t_selector: Tensor,
    *,
    tx_pair: TxPair = IDENTITY_PAIR,
) -> Tensor:
    """TD errors of double Q-learning.

        target_tm1 = apply(r_t + discount_t * apply_inv(q_t_value[argmax_a q_t_selector[a]]))
        td_error   = target_tm1 - q_tm1[a_tm1]

    The target carries no gradient. A terminated transition has discount_t = 0, so what q_t_value holds there is not used.

    Source: van Hasselt, Guez, Silver 2016, "Deep Reinforcement Learning with Double Q-learning",
    https://arxiv.org/abs/1509.06461; apply: see common/value_rescaling.py.

    Args:
      q_tm1: f32[B, A] online values in the source state.
      a_tm1: i64[B] actions taken there, in [0, A).
      r_t: f32[B] n-step returns, in units of reward (clipped, if the run clips).
      discount_t: f32[B] in [0, 1].
      q_t_value: f32[B, A] target-network values in the destination state: they value the action.
      q_t_selector: f32[B, A] online values in the destination state: they pick it.
      tx_pair: the rescaling that q_tm1, q_t_value and q_t_selector are in.

    Returns:
      f32[B] TD errors, target minus prediction, rescaled.

    Raises:
      ValueError: for a wrong rank, shape or dtype, before a broadcast can hide it.
    """
    _check(
        q_tm1=(q_tm1, "BA"),
        a_tm1=(a_tm1, "B"),
        r_t=(r_t, "B"),
        discount_t=(discount_t, "B"),
        q_t_value=(q_t_value, "BA"),
        q_t_selector=(q_t_selector, "BA"),
    )
    bootstrap_t = tx_pair.apply_inv(_at_action(q_t_value, q_t_selector.argmax(dim=1), dim=1))  # [B]
    target_tm1 = tx_pair.apply(r_t + discount_t * bootstrap_t).detach()  # [B]
    return target_tm1 - _at_action(q_tm1, a_tm1, dim=1)


def munchausen_q_learning(
    q_tm1: Tensor,
    a_tm1: Tensor,
    r_t: Tensor,
    discount_t: Tensor,
    q_tm1_target: Tensor,
    q_t_target: Tensor,
    *,
    munchausen_coefficient: float,
    entropy_temperature: float,
    clip_value_min: float,
) -> Tensor:
    """TD errors of Munchausen Q-learning. alpha is munchausen_coefficient, tau entropy_temperature, l_0 clip_value_min.

        log_pi     = log_softmax(q_target / tau), in the source state (tm1) and in the destination state (t)
        bonus      = alpha * clip(tau * log_pi_tm1[a_tm1], l_0, 0)
        target_tm1 = r_t + bonus + discount_t * sum_a pi_t[a] * (q_t_target[a] - tau * log_pi_t[a])
        td_error   = target_tm1 - q_tm1[a_tm1]

    The target carries no gradient. A terminated transition has discount_t = 0: it loses the soft value, but not the bonus. Where
    r_t is over n steps, the bonus is of their first action alone, as in the paper's code.

    Source: Vieillard, Pietquin, Geist 2020, "Munchausen Reinforcement Learning", https://arxiv.org/abs/2007.14430, eq. 2.

    Args:
      q_tm1: f32[B, A] online values in the source state.
      a_tm1: i64[B] actions taken there, in [0, A).
      r_t: f32[B] n-step returns, in units of reward (clipped, if the run clips).
      discount_t: f32[B] in [0, 1].
      q_tm1_target: f32[B, A] target-network values in the source state: they make the policy that the bonus is of.
      q_t_target: f32[B, A] target-network values in the destination state: they make its policy, and value it.
      munchausen_coefficient: alpha, in [0, 1]. 0 is soft Q-learning.
      entropy_temperature: tau, above 0, in units of return.
      clip_value_min: l_0, at most 0, in units of return.

    Returns:
      f32[B] TD errors, target minus prediction.

    Raises:
      ValueError: for a wrong rank, shape or dtype, before a broadcast can hide it, and for a number out of its range.
    """
    _check(
        q_tm1=(q_tm1, "BA"),
        a_tm1=(a_tm1, "B"),
        r_t=(r_t, "B"),
        discount_t=(discount_t, "B"),
        q_tm1_target=(q_tm1_target, "BA"),
        q_t_target=(q_t_target, "BA"),
    )
    target_tm1 = _munchausen_target(  # [B, 1]
        a_tm1,
        r_t,
        discount_t,
        q_tm1_target,
        q_t_target[:, None, :],
        munchausen_coefficient=munchausen_coefficient,
        entropy_temperature=entropy_temperature,
        clip_value_min=clip_value_min,
    )
    return target_tm1[:, 0].detach() - _at_action(q_tm1, a_tm1, dim=1)


def categorical_l2_project(z_p: Tensor, probs: Tensor, z_q: Tensor) -> Tensor:
    """Projects distributions of moved atoms onto fixed atoms; of all on them, the nearest in the L2 distance of CDFs.

        projected[i] = sum_j probs[j] * triangle_i(clip(z_p[j], z_q[0], z_q[-1]))

    where triangle_i is 1 at z_q[i], 0 at its neighbours and beyond, and linear between: a mass between two atoms is divided
    among them, the nearer one gets more; one on an atom stays there; one beyond an end goes to that end. All masses together
    are kept, and so is the mean of what is within the ends. z_q need not be evenly spaced.

    Two masses are scattered for each atom of z_p, O(B (M log N + N)), with no tensor [B, N, M]. No shape depends on values and
    nothing waits for the device. On a CPU the sums have one order; on a GPU they do where deterministic algorithms are asked for.

    Source: Bellemare, Dabney, Munos 2017, "A Distributional Perspective on Reinforcement Learning",
    https://arxiv.org/abs/1707.06887, eq. 7.

    Args:
      z_p: f32[B, M] atoms to move, in any order.
      probs: f32[B, M] their masses.
      z_q: f32[N] atoms to project onto, N at least 2, strictly increasing (not checked: that would wait for the device).

    Returns:
      f32[B, N] masses.

    Raises:
      ValueError: for a wrong rank, shape or dtype, before a broadcast can hide it.
    """
    _check(z_p=(z_p, "BM"), probs=(probs, "BM"), z_q=(z_q, "N"))
    if len(z_q) < 2:
        raise ValueError(f"z_q: expected at least 2 atoms, got {len(z_q)}")
    z = z_p.clamp(z_q[0], z_q[-1]).contiguous()  # [B, M]
    # z_q[lower] <= z <= z_q[lower + 1]. On an atom the upper mass is 0, on the last one the lower mass: none is lost.
    lower = (torch.bucketize(z, z_q.contiguous(), right=True) - 1).clamp(0, len(z_q) - 2)  # [B, M]
    upper_part = (z - z_q[lower]) / z_q.diff()[lower]  # [B, M]
    projected = probs.new_zeros(len(probs), len(z_q))  # [B, N]
    projected = projected.scatter_add(1, lower, probs * (1.0 - upper_part))
    return projected.scatter_add(1, lower + 1, probs * upper_part)


def categorical_q_learning(
    q_atoms_tm1: Tensor,
    q_logits_tm1: Tensor,
    a_tm1: Tensor,
    r_t: Tensor,
    discount_t: Tensor,
    q_atoms_t: Tensor,
    q_logits_t: Tensor,
) -> Tensor:
    """Cross-entropies of categorical Q-learning (C51): the target network picks the action and values it.

        a_t  = argmax_a sum_i q_atoms_t[i] * softmax(q_logits_t[a])[i]
        loss = that of `categorical_double_q_learning` with this a_t

    The target carries no gradient.

    Source: Bellemare, Dabney, Munos 2017, "A Distributional Perspective on Reinforcement Learning",
    https://arxiv.org/abs/1707.06887, algorithm 1.

    Args:
      q_atoms_tm1: f32[N] atoms of the prediction, strictly increasing, in units of return.
      q_logits_tm1: f32[B, A, N] online logits in the source state.
      a_tm1: i64[B] actions taken there, in [0, A).
      r_t: f32[B] n-step returns, in units of reward (clipped, if the run clips).
      discount_t: f32[B] in [0, 1].
      q_atoms_t: f32[M] atoms of the target, in units of return; most often those of the prediction.
      q_logits_t: f32[B, A, M] target-network logits in the destination state.

    Returns:
      f32[B] cross-entropies, in nats.

    Raises:
      ValueError: for a wrong rank, shape or dtype, before a broadcast can hide it.
    """
    _check(
        q_atoms_tm1=(q_atoms_tm1, "N"),
        q_logits_tm1=(q_logits_tm1, "BAN"),
        a_tm1=(a_tm1, "B"),
        r_t=(r_t, "B"),
        discount_t=(discount_t, "B"),
        q_atoms_t=(q_atoms_t, "M"),
        q_logits_t=(q_logits_t, "BAM"),
    )
    q_t_selector = (q_logits_t.softmax(dim=2) * q_atoms_t).sum(dim=2)  # [B, A]
    return categorical_double_q_learning(q_atoms_tm1, q_logits_tm1, a_tm1, r_t, discount_t, q_atoms_t, q_logits_t, q_t_selector)


def categorical_double_q_learning(
    q_atoms_tm1: Tensor,
    q_logits_tm1: Tensor,
    a_tm1: Tensor,
    r_t: Tensor,
    discount_t: Tensor,
    q_atoms_t: Tensor,
    q_logits_t: Tensor,
    q_t_selector: Tensor,
) -> Tensor:
    """Cross-entropies of categorical Q-learning with double Q-learning, as in Rainbow.

        a_t        = argmax_a q_t_selector[a]
        target_tm1 = project(r_t + discount_t * q_atoms_t, softmax(q_logits_t[a_t]), q_atoms_tm1)
        loss       = -sum_i target_tm1[i] * log_softmax(q_logits_tm1[a_tm1])[i]

    The target carries no gradient. A terminated transition has discount_t = 0: all its mass is at its reward. The loss is above
    0 at its minimum too: there it is the entropy of the target.

    Source: Bellemare, Dabney, Munos 2017, "A Distributional Perspective on Reinforcement Learning",
    https://arxiv.org/abs/1707.06887; Hessel et al. 2018, "Rainbow", https://arxiv.org/abs/1710.02298.

    Args:
      q_atoms_tm1: f32[N] atoms of the prediction, strictly increasing, in units of return.
      q_logits_tm1: f32[B, A, N] online logits in the source state.
      a_tm1: i64[B] actions taken there, in [0, A).
      r_t: f32[B] n-step returns, in units of reward (clipped, if the run clips).
      discount_t: f32[B] in [0, 1].
      q_atoms_t: f32[M] atoms of the target, in units of return; most often those of the prediction.
      q_logits_t: f32[B, A, M] target-network logits in the destination state: they value the action.
      q_t_selector: f32[B, A] online mean values in the destination state: they pick it.

    Returns:
      f32[B] cross-entropies, in nats.

    Raises:
      ValueError: for a wrong rank, shape or dtype, before a broadcast can hide it.
    """
    _check(
        q_atoms_tm1=(q_atoms_tm1, "N"),
        q_logits_tm1=(q_logits_tm1, "BAN"),
        a_tm1=(a_tm1, "B"),
        r_t=(r_t, "B"),
        discount_t=(discount_t, "B"),
        q_atoms_t=(q_atoms_t, "M"),
        q_logits_t=(q_logits_t, "BAM"),
        q_t_selector=(q_t_selector, "BA"),
    )
    probs_t = _at_action(q_logits_t, q_t_selector.argmax(dim=1), dim=1).softmax(dim=1)  # [B, M]
    target_z = r_t[:, None] + discount_t[:, None] * q_atoms_t  # [B, M]
    target_tm1 = categorical_l2_project(target_z, probs_t, q_atoms_tm1).detach()  # [B, N]
    return functional.cross_entropy(_at_action(q_logits_tm1, a_tm1, dim=1), target_tm1, reduction="none")


def quantile_q_learning(
    dist_q_tm1: Tensor,
    tau_q_tm1: Tensor,
    a_tm1: Tensor,
    r_t: Tensor,
    discount_t: Tensor,
    dist_q_t_selector: Tensor,
    dist_q_t: Tensor,
    huber_param: float = 1.0,
) -> Tensor:
    """Quantile regression losses of Q-learning (QR-DQN, IQN). tau is tau_q_tm1, kappa huber_param.

        a_t        = argmax_a mean_k dist_q_t_selector[k, a]
        target_tm1 = r_t + discount_t * dist_q_t[:, a_t]
        delta_ij   = target_tm1[j] - dist_q_tm1[i, a_tm1]
        loss       = sum_i mean_j abs(tau[i] - 1{delta_ij < 0}) * huber_kappa(delta_ij) / kappa

    huber_kappa(x) is x**2 / 2 where abs(x) <= kappa, else kappa * (abs(x) - kappa / 2). kappa = 0 is plain quantile regression,
    with abs(delta_ij) in the place of the quotient, which is its limit. Both papers and rlax sum over the quantiles of the
    prediction and take the mean over those of the target. The division by kappa is IQN's; QR-DQN and rlax have none, and with
    kappa = 1, as in both papers' experiments, there is no difference. rlax's default is 0.

    The target carries no gradient. A terminated transition has discount_t = 0: all its quantiles are its reward.

    Source: Dabney et al. 2018, "Distributional Reinforcement Learning with Quantile Regression",
    https://arxiv.org/abs/1710.10044, eq. 10; Dabney et al. 2018, "Implicit Quantile Networks for Distributional Reinforcement
    Learning", https://arxiv.org/abs/1806.06923, eq. 3.

    Args:
      dist_q_tm1: f32[B, N, A] online quantiles in the source state.
      tau_q_tm1: f32[B, N] or f32[1, N] which quantiles these are, in [0, 1].
      a_tm1: i64[B] actions taken there, in [0, A).
      r_t: f32[B] n-step returns, in units of reward (clipped, if the run clips).
      discount_t: f32[B] in [0, 1].
      dist_q_t_selector: f32[B, K, A] quantiles in the destination state, whose means pick the action: of the online network in
        double Q-learning, of the target network in QR-DQN and IQN.
      dist_q_t: f32[B, M, A] target-network quantiles in the destination state: they value it.
      huber_param: kappa, at least 0, in units of return.

    Returns:
      f32[B] losses, in units of return.

    Raises:
      ValueError: for a wrong rank, shape or dtype, before a broadcast can hide it, and for a number out of its range.
    """
    _check(
        dist_q_tm1=(dist_q_tm1, "BNA"),
        tau_q_tm1=(tau_q_tm1, "1N" if tau_q_tm1.shape[:1] == (1,) else "BN"),
        a_tm1=(a_tm1, "B"),
        r_t=(r_t, "B"),
        discount_t=(discount_t, "B"),
        dist_q_t_selector=(dist_q_t_selector, "BKA"),
        dist_q_t=(dist_q_t, "BMA"),
    )
    dist_qa_t = _at_action(dist_q_t, dist_q_t_selector.mean(dim=1).argmax(dim=1), dim=2)  # [B, M]
    target_tm1 = r_t[:, None] + discount_t[:, None] * dist_qa_t  # [B, M]
    return _quantile_regression(_at_action(dist_q_tm1, a_tm1, dim=2), tau_q_tm1, target_tm1, huber_param)


def munchausen_quantile_q_learning(
    dist_q_tm1: Tensor,
    tau_q_tm1: Tensor,
    a_tm1: Tensor,
    r_t: Tensor,
    discount_t: Tensor,
    q_tm1_target: Tensor,
    dist_q_t: Tensor,
    *,
    munchausen_coefficient: float,
    entropy_temperature: float,
    clip_value_min: float,
    huber_param: float = 1.0,
) -> Tensor:
    """Quantile regression losses of Munchausen Q-learning (M-IQN). alpha, tau and l_0 as in `munchausen_q_learning`.

        log_pi_tm1 = log_softmax(q_tm1_target / tau), log_pi_t = log_softmax(mean_j dist_q_t[j] / tau)
        bonus      = alpha * clip(tau * log_pi_tm1[a_tm1], l_0, 0)
        target_tm1 = r_t + bonus + discount_t * sum_a pi_t[a] * (dist_q_t[:, a] - tau * log_pi_t[a])
        loss       = that of `quantile_q_learning` with this target

    The target carries no gradient. A terminated transition has discount_t = 0: it loses the soft value, but not the bonus. The
    mean of the target's quantiles is the target of `munchausen_q_learning` on the means. The paper's code makes the policy of
    the destination state of a second draw of quantiles; here it is of those that make the target, one pass less.

    Source: Vieillard, Pietquin, Geist 2020, "Munchausen Reinforcement Learning", https://arxiv.org/abs/2007.14430; Dabney et al.
    2018, "Implicit Quantile Networks for Distributional Reinforcement Learning", https://arxiv.org/abs/1806.06923.

    Args:
      dist_q_tm1: f32[B, N, A] online quantiles in the source state.
      tau_q_tm1: f32[B, N] or f32[1, N] which quantiles these are, in [0, 1].
      a_tm1: i64[B] actions taken there, in [0, A).
      r_t: f32[B] n-step returns, in units of reward (clipped, if the run clips).
      discount_t: f32[B] in [0, 1].
      q_tm1_target: f32[B, A] target-network mean values in the source state: they make the policy that the bonus is of.
      dist_q_t: f32[B, M, A] target-network quantiles in the destination state: their means make its policy, and they value it.
      munchausen_coefficient: alpha, in [0, 1].
      entropy_temperature: tau of the policy, above 0, in units of return. No relation to tau_q_tm1.
      clip_value_min: l_0, at most 0, in units of return.
      huber_param: kappa, at least 0, in units of return.

    Returns:
      f32[B] losses, in units of return.

    Raises:
      ValueError: for a wrong rank, shape or dtype, before a broadcast can hide it, and for a number out of its range.
    """
    _check(
        dist_q_tm1=(dist_q_tm1, "BNA"),
        tau_q_tm1=(tau_q_tm1, "1N" if tau_q_tm1.shape[:1] == (1,) else "BN"),
        a_tm1=(a_tm1, "B"),
        r_t=(r_t, "B"),
        discount_t=(discount_t, "B"),
        q_tm1_target=(q_tm1_target, "BA"),
        dist_q_t=(dist_q_t, "BMA"),
    )
    target_tm1 = _munchausen_target(  # [B, M]
        a_tm1,
        r_t,
        discount_t,
        q_tm1_target,
        dist_q_t,
        munchausen_coefficient=munchausen_coefficient,
        entropy_temperature=entropy_temperature,
        clip_value_min=clip_value_min,
    )
    return _quantile_regression(_at_action(dist_q_tm1, a_tm1, dim=2), tau_q_tm1, target_tm1, huber_param)


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


def _munchausen_target(
    a_tm1: Tensor,
    r_t: Tensor,
    discount_t: Tensor,
    q_tm1_target: Tensor,
    dist_q_t: Tensor,
    *,
    munchausen_coefficient: float,
    entropy_temperature: float,
    clip_value_min: float,
) -> Tensor:
    """Returns f32[B, M], the target of `munchausen_quantile_q_learning`. One quantile (M = 1) is an expectation."""
    if not 0.0 <= munchausen_coefficient <= 1.0:
        raise ValueError(f"munchausen_coefficient: expected a number in [0, 1], got {munchausen_coefficient}")
    if not entropy_temperature > 0.0:
        raise ValueError(f"entropy_temperature: expected a number above 0, got {entropy_temperature}")
    if not clip_value_min <= 0.0:
        raise ValueError(f"clip_value_min: expected a number of at most 0, got {clip_value_min}")
    scaled_log_pi_tm1 = _scaled_log_policy(q_tm1_target, entropy_temperature)  # [B, A]
    bonus = munchausen_coefficient * _at_action(scaled_log_pi_tm1, a_tm1, dim=1).clamp(clip_value_min, 0.0)  # [B]
    scaled_log_pi_t = _scaled_log_policy(dist_q_t.mean(dim=1), entropy_temperature)[:, None, :]  # [B, 1, A]
    pi_t = (scaled_log_pi_t / entropy_temperature).exp()  # [B, 1, A]
    soft_value_t = (pi_t * (dist_q_t - scaled_log_pi_t)).sum(dim=2)  # [B, M]
    return (r_t + bonus)[:, None] + discount_t[:, None] * soft_value_t


def _scaled_log_policy(q: Tensor, entropy_temperature: float) -> Tensor:
    """Returns f32[B, A] tau * log_softmax(q / tau). The maximum is taken off before the division, which would round it."""
    advantage = q - q.amax(dim=1, keepdim=True)
    return entropy_temperature * (advantage / entropy_temperature).log_softmax(dim=1)


def _quantile_regression(dist_src: Tensor, tau_src: Tensor, dist_target: Tensor, huber_param: float) -> Tensor:
    """Returns f32[B], the loss of `quantile_q_learning`, of f32[B, N], f32[B or 1, N] and f32[B, M]."""
    if not huber_param >= 0.0:
        raise ValueError(f"huber_param: expected a number of at least 0, got {huber_param}")
    src = dist_src[:, :, None].expand(-1, -1, dist_target.shape[1])  # [B, N, M]
    target = dist_target.detach()[:, None, :].expand(-1, dist_src.shape[1], -1)  # [B, N, M]
    if huber_param > 0.0:
        size = functional.huber_loss(src, target, reduction="none", delta=huber_param) / huber_param
    else:
        size = functional.l1_loss(src, target, reduction="none")
    is_negative = (target < src).to(size.dtype)  # delta < 0
    losses = (tau_src[:, :, None] - is_negative).abs() * size  # [B, N, M]
    return losses.mean(dim=2).sum(dim=1)


def _at_action(values: Tensor, action: Tensor, *, dim: int) -> Tensor:
    """Returns `values`, whose dimension `dim` is of actions, at the one `action` i64[B] of each transition."""
    index = action.reshape(-1, *[1] * (values.ndim - 1))
    return values.take_along_dim(index, dim).squeeze(dim)


def _check(**arguments: tuple[Tensor, str]) -> None:
    """Raises ValueError, naming the argument, unless each tensor is as its letters say: one a dimension, and f32.

    A letter stands for one size throughout, that of its first argument; "1" is 1. Actions, named a_, are i64.
    """
    sizes = {"1": (1, "")}
    for name, (tensor, letters) in arguments.items():
        dtype = torch.int64 if name.startswith("a_") else torch.float32
        shape = tuple(tensor.shape)
        wanted = f"{name}: expected {dtype} [{', '.join(letters)}]"
        got = f"got {tensor.dtype} {list(shape)}"
        if tensor.dtype != dtype or len(shape) != len(letters):
            raise ValueError(f"{wanted}, {got}")
        for letter, size in zip(letters, shape, strict=True):
            expected, first = sizes.setdefault(letter, (size, name))
            if size != expected:
                raise ValueError(f"{wanted} with {letter} = {expected} as in {first}, {got}")
