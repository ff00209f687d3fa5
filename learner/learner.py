"""The learner: draws batches, takes target-network TD steps, sends priorities back, publishes parameters, checkpoints."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from common import params as params_module
from common import wire
from common.config import MAX_PREFETCH_THREADS, LearnerConfig
from common.errors import CheckpointError, NonFiniteError, UserError
from common.messages import Array, ParamsSnapshot
from common.metrics import LearnerStats
from common.networks import QNetwork
from common.priorities import priority
from common.protocols import ParamsWriter, ReplayReader
from learner import checkpoint as checkpoints
from learner import losses
from learner.batches import Batch, BatchSource


class Learner:
    """Owns the online and target networks and the optimizer.

    `step()` takes one batch and does one update, or returns False where there is no batch; `run(seconds)` loops. Called from
    one thread; the prefetch threads that `start()` begins are the batch source's, and share only its queue and fault counters.
    Parameters are published at version 0, then every `publish_period_updates`.
    """

    def __init__(
        self,
        *,
        config: LearnerConfig,
        network: QNetwork,
        uses_convolutions: bool,
        is_prioritized: bool,
        readers: Sequence[ReplayReader],
        params: ParamsWriter,
        run: str,
        epoch: int,
        run_dir: Path,
    ) -> None:
        self._config = config
        self._device = pick_device(config.device)
        self._compute_dtype = pick_precision(config.precision, self._device, uses_convolutions=uses_convolutions)
        self._online = network.to(self._device)
        if uses_convolutions:
            self._online = self._online.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._target = copy.deepcopy(self._online).requires_grad_(False)
        self._optimizer = make_optimizer(config, self._online)
        self._td_loss: Callable[[Tensor], Tensor] = losses.huber if config.loss == "huber" else losses.mse
        self._is_prioritized = is_prioritized
        self._params, self._run, self._epoch, self._run_dir = params, run, epoch, run_dir
        self._source = BatchSource(
            readers,
            batch_size=config.batch_size,
            importance_exponent=config.importance_exponent,
            prefetch_batches=config.prefetch_batches,
            prefetch_threads=min(torch.get_num_threads(), MAX_PREFETCH_THREADS),
            prepare=lambda observations: self._online.prepare(observations, self._compute_dtype),
            device=self._device,
        )
        self._stats = LearnerStats(
            updates=0,
            samples=0,
            published_version=0,
            loss=float("nan"),
            mean_value=0.0,
            grad_norm=0.0,
            params_lag_updates=0.0,
            busy_seconds=0.0,
            waiting_seconds=0.0,
            num_ready_batches=0,
            num_dropped_batches=0,
            waits_for=None,
            last_fault=None,
        )
        self._losses: list[float] = []

    @property
    def updates(self) -> int:
        return self._stats.updates

    def start(self) -> None:
        """Begins to prefetch, on threads."""
        self._source.start()

    def close(self) -> None:
        self._source.close()

    def publish(self) -> None:
        """Publishes the online parameters as version `updates`."""
        snapshot = ParamsSnapshot(
            run=self._run,
            epoch=self._epoch,
            version=self._stats.updates,
            layout=params_module.layout(self._online),
            params=params_module.flatten(self._online, bf16=self._config.publish_precision == "bf16"),
        )
        self._params.publish(wire.pack(snapshot))
        self._stats.published_version = self._stats.updates

    def run(self, seconds: float, max_updates: int | None) -> LearnerStats:
        """Updates for about so many seconds, or until there are `max_updates` in all; returns the statistics."""
        deadline = time.monotonic() + seconds
        while (rest := deadline - time.monotonic()) > 0 and (max_updates is None or self._stats.updates < max_updates):
            self.step(min(rest, 0.5))
        return self.stats()

    def step(self, timeout_seconds: float = 0.0) -> bool:
        """Does one update; returns whether there was a batch for it.

        Raises:
          NonFiniteError: for a loss or gradient that is NaN or infinite. The batch is saved in the run directory; no parameter was
            changed by it, and the last checkpoint stays the last.
        """
        stats, started = self._stats, time.monotonic()
        batch = self._source.next_batch(timeout_seconds)
        if batch is None:
            stats.waits_for = self._source.waits_for
            stats.waiting_seconds += time.monotonic() - started
            return False
        fetched = time.monotonic()
        stats.waits_for = None
        stats.waiting_seconds += fetched - started
        td_error = self._update(batch)
        if self._is_prioritized:
            self._source.update_priorities(batch, priority(td_error.cpu().numpy(), floor=self._config.priority_floor))
        stats.updates += 1
        stats.samples += len(batch.a_tm1)
        stats.params_lag_updates = stats.updates - batch.mean_params_version
        self._update_target()
        if stats.updates % self._config.publish_period_updates == 0:
            self.publish()
        stats.busy_seconds += time.monotonic() - fetched
        return True

    def stats(self) -> LearnerStats:
        """Returns the statistics; the mean loss is of the updates since the last call."""
        stats = self._stats
        stats.loss = float(np.mean(self._losses)) if self._losses else float("nan")
        self._losses.clear()
        stats.num_ready_batches = self._source.num_ready()
        stats.num_dropped_batches, stats.last_fault = self._source.num_dropped_batches, self._source.last_fault
        return stats

    def save(self, run_counters: dict[str, Any]) -> str:
        """Writes a checkpoint and returns its name. `run_counters` are the supervisor's, kept as they are."""
        for name, parameter in self._online.named_parameters():
            if not torch.isfinite(parameter).all():
                raise NonFiniteError(f"parameter {name} is not finite after update {self.updates}: no checkpoint is written")
        meta = {
            "run": self._run,
            "epoch": self._epoch,
            "updates": self._stats.updates,
            "samples": self._stats.samples,
            "layout": params_module.layout(self._online),
            "digest": self.digest(),
            "run_counters": run_counters,
        }
        state = {
            "online": self._online.state_dict(),
            "target": self._target.state_dict(),
            "optimizer": _optimizer_tensors(self._optimizer),
        }
        saved = checkpoints.Checkpoint(tensors={name: _to_numpy(part) for name, part in state.items()}, meta=meta)
        directory = self._run_dir / "checkpoints"
        return checkpoints.write(directory, self.updates, saved, kept=self._config.checkpoints_kept).name

    def restore(self, path: Path) -> None:
        """Takes networks, optimizer and counters from a checkpoint; raises CheckpointError where it does not fit."""
        saved = checkpoints.read(path)
        if saved.meta["layout"] != params_module.layout(self._online):
            raise CheckpointError(f"checkpoint {path}: it is of another network than this run's configuration describes")
        self._online.load_state_dict(_to_torch(saved.tensors["online"]))
        self._target.load_state_dict(_to_torch(saved.tensors["target"]))
        _restore_optimizer(self._optimizer, _to_torch(saved.tensors["optimizer"]))
        self._stats.updates, self._stats.samples = saved.meta["updates"], saved.meta["samples"]

    def digest(self) -> str:
        """Returns the digest of the online parameters."""
        return params_module.digest(self._online)

    def _update(self, batch: Batch) -> Tensor:
        """Takes one optimizer step; returns the TD errors f32[B]."""
        double = self._config.algorithm == "double_q_learning"
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._compute_dtype == torch.bfloat16):
            q_tm1 = self._online.values(batch.s_tm1)
            with torch.no_grad():
                q_t_value = self._target.values(batch.s_t)
                q_t_selector = self._online.values(batch.s_t) if double else q_t_value
        td_error = losses.double_q_learning(q_tm1, batch.a_tm1, batch.r_t, batch.discount_t, q_t_value, q_t_selector)
        loss = (self._td_loss(td_error) * batch.importance_weight).mean()
        loss_value = float(loss.detach())
        if not np.isfinite(loss_value):
            self._save_bad_batch(batch, f"the loss is {loss_value}")
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        limit = self._config.max_grad_norm
        grad_norm = float(nn.utils.clip_grad_norm_(self._online.parameters(), limit if limit is not None else float("inf")))
        if not np.isfinite(grad_norm):
            self._save_bad_batch(batch, f"the gradient norm is {grad_norm}")
        self._optimizer.step()
        self._losses.append(loss_value)
        self._stats.grad_norm = grad_norm
        self._stats.mean_value = float(q_tm1.detach().gather(1, batch.a_tm1[:, None]).mean())
        return td_error.detach()

    def _update_target(self) -> None:
        config = self._config
        with torch.no_grad():
            if config.target_soft_rate is not None:
                for target, online in zip(self._target.parameters(), self._online.parameters(), strict=True):
                    target.lerp_(online, config.target_soft_rate)
            elif self._stats.updates % (config.target_period_updates or 1) == 0:
                self._target.load_state_dict(self._online.state_dict())

    def _save_bad_batch(self, batch: Batch, what: str) -> None:
        path = self._run_dir / f"bad_batch_{self._stats.updates:010d}.safetensors"
        tensors = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
        save_file({name: value.contiguous() for name, value in tensors.items() if isinstance(value, Tensor)}, path)
        raise NonFiniteError(
            f"{what} at update {self._stats.updates}; its batch is saved in {path}, and the last checkpoint is kept"
        )


def pick_device(name: str) -> torch.device:
    """Returns the device that a setting means; raises UserError where it asks for a GPU that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("learner.device cuda: PyTorch sees no GPU here; use --learner.device auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def pick_precision(name: str, device: torch.device, *, uses_convolutions: bool) -> torch.dtype:
    """Returns what matrix products are computed in; see LearnerConfig.precision."""
    if name == "auto":
        has_bf16 = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if uses_convolutions and has_bf16 else torch.float32
    return torch.bfloat16 if name == "bf16" else torch.float32


def make_optimizer(config: LearnerConfig, network: nn.Module) -> torch.optim.Optimizer:
    """Builds the optimizer that the configuration names."""
    if config.optimizer == "adam":
        return torch.optim.Adam(network.parameters(), lr=config.learning_rate, eps=config.optimizer_epsilon, fused=True)
    return torch.optim.RMSprop(
        network.parameters(),
        lr=config.learning_rate,
        alpha=config.rmsprop_decay,
        eps=config.optimizer_epsilon,
        centered=True,
    )


def _to_numpy(tensors: Mapping[str, Tensor]) -> dict[str, Array]:
    return {name: np.ascontiguousarray(tensor.detach().cpu().numpy()) for name, tensor in tensors.items()}


def _to_torch(arrays: Mapping[str, Array]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Returns the optimizer's state under `<parameter index>.<name>`; its settings are the configuration's."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": value for i, entry in state.items() for name, value in entry.items()}


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
