"""The loss of a batch: which heads the network has and how the target values the destination, composed by configuration."""

from __future__ import annotations

from concurrent.futures import Executor
from typing import NamedTuple

import torch
from torch import Tensor

from common.config import LearnerConfig
from common.networks import QNetwork
from common.value_rescaling import IDENTITY_PAIR, SIGNED_HYPERBOLIC_PAIR
from learner import losses


class Draws(NamedTuple):
    """All that is random in one update. Drawn outside of it, so that the update itself can be recorded and replayed."""

    noise: Tensor | None
    """Noisy layers: f32[4, 1, num_noise] for the four passes: online and target at the source, online and target at the
    destination."""
    taus_tm1: Tensor | None
    """implicit_quantile: f32[B, N] of the predictions."""
    taus_t: Tensor | None
    """implicit_quantile: f32[B, N'] of the targets."""


class Terms(NamedTuple):
    """What one batch gives, transition by transition."""

    loss: Tensor
    """f32[B], with the gradient."""
    td_error: Tensor
    """f32[B] of the expected returns, whatever the loss is: what priorities are made of, by actors as by the learner."""
    value: Tensor
    """f32[B], the expected return of the action taken."""


class Objective:
    """Computes the loss of a batch from both networks.

    Passes are separate: one pass over source and destination together saves launches and costs a backward pass over rows that
    need none (docs/benchmarks.md). Network passes run in `dtype`, losses in float32. The target's pass over the destination needs nothing
    of the others: with `beside`, it runs there meanwhile.

    Attributes:
      beside: where the target's pass runs; None: in the caller's thread, after the others.
    """

    beside: Executor | None = None

    def __init__(self, config: LearnerConfig, network: QNetwork, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._is_double = config.algorithm == "double_q_learning"
        self._is_munchausen = config.algorithm == "munchausen_q_learning"
        self._tx_pair = SIGNED_HYPERBOLIC_PAIR if network.value_rescaling else IDENTITY_PAIR
        self._td_loss = losses.huber if config.loss == "huber" else losses.mse
        self._num_taus = (config.num_quantile_samples, config.num_target_quantile_samples)
        self._bonus = {
            "munchausen_coefficient": config.munchausen_coefficient,
            "entropy_temperature": config.entropy_temperature,
            "clip_value_min": config.munchausen_clip,
        }

    def draw(self, network: QNetwork, batch_size: int, generator: torch.Generator) -> Draws:
        """Draws what one update needs, on the generator's device."""
        noise = network.draw_noise(4, generator)[:, None] if network.num_noise else None
        if not network.takes_taus:
            return Draws(noise, None, None)
        taus_tm1, taus_t = (torch.rand(batch_size, num, generator=generator, device=generator.device) for num in self._num_taus)
        return Draws(noise, taus_tm1, taus_t)

    def __call__(
        self,
        online: QNetwork,
        target: QNetwork,
        s_tm1: Tensor,
        a_tm1: Tensor,
        r_t: Tensor,
        discount_t: Tensor,
        s_t: Tensor,
        draws: Draws,
    ) -> Terms:
        """Returns the terms of a batch; s_tm1 and s_t are what `QNetwork.prepare` made."""
        noise = draws.noise if draws.noise is not None else [None] * 4

        def target_pass() -> Tensor:
            with torch.no_grad(), self._autocast():  # Of this thread: both are a thread's own.
                return target.distribution(s_t, noise=noise[3], taus=draws.taus_t)

        beside = None if self.beside is None else self.beside.submit(target_pass)
        with self._autocast():
            outputs_tm1 = online.distribution(s_tm1, noise=noise[0], taus=draws.taus_tm1)
            with torch.no_grad():
                q_tm1_target = target.values(s_tm1, noise=noise[1]) if self._is_munchausen else None
                online_q_t = online.values(s_t, noise=noise[2]) if self._is_double else None
        outputs_t = target_pass() if beside is None else beside.result()
        is_expectation = online.taus is None and online.atoms is None
        q_tm1 = outputs_tm1 if is_expectation else online.mean(outputs_tm1.detach())
        q_t_value = target.mean(outputs_t)
        q_t_selector = q_t_value if online_q_t is None else online_q_t
        if q_tm1_target is not None:
            td_error = losses.munchausen_q_learning(q_tm1, a_tm1, r_t, discount_t, q_tm1_target, q_t_value, **self._bonus)
        else:
            td_error = losses.double_q_learning(q_tm1, a_tm1, r_t, discount_t, q_t_value, q_t_selector, tx_pair=self._tx_pair)
        if online.atoms is not None:
            atoms = online.atoms
            loss = losses.categorical_double_q_learning(
                atoms, outputs_tm1, a_tm1, r_t, discount_t, atoms, outputs_t, q_t_selector
            )
        elif online.taus is not None:
            taus = online.taus if draws.taus_tm1 is None else draws.taus_tm1
            if q_tm1_target is not None:
                loss = losses.munchausen_quantile_q_learning(
                    outputs_tm1, taus, a_tm1, r_t, discount_t, q_tm1_target, outputs_t, **self._bonus
                )
            else:
                loss = losses.quantile_q_learning(outputs_tm1, taus, a_tm1, r_t, discount_t, q_t_selector[:, None], outputs_t)
        else:
            loss = self._td_loss(td_error)
        value = q_tm1.gather(1, a_tm1[:, None])[:, 0]
        return Terms(loss, td_error.detach(), value.detach())

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._dtype == torch.bfloat16)
