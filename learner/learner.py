"""The learner: draws batches, learns from them, sends priorities back, publishes parameters, writes checkpoints."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from common import params as params_module
from common import schedules, wire
from common.config import MAX_PREFETCH_THREADS, LearnerConfig
from common.errors import CheckpointError, NonFiniteError
from common.messages import Array, ParamsSnapshot
from common.metrics import LearnerStats
from common.networks import QNetwork
from common.priorities import priority
from common.protocols import ParamsWriter, ReplayReader
from common.timing import PhaseClock, usage
from learner import checkpoint as checkpoints
from learner.batches import Batch, BatchSource
from learner.collective import Agreement, LearnerGroup
from learner.update import Update, pick_device


class _Report(NamedTuple):
    """What an update will have told once the device is so far."""

    batch: Batch
    values: Tensor
    """f32[B + 3] on the host: TD errors, mean loss, mean value, norm of the gradient."""
    event: torch.cuda.Event | None
    """After which `values` can be read; None: at once."""


class Learner:
    """Draws batches, has `Update` learn from them, sends priorities back, publishes and writes checkpoints.

    `step()` takes one batch and does one update, or returns False where there is no batch; `run(seconds)` loops. Called from
    one thread; the prefetch threads that `start()` begins are the batch source's, and share only its queue and fault counters.
    Parameters are published at version 0, then every `publish_period_updates`.

    Nothing waits for a GPU on the way, but publishing and saving: what an update tells (TD errors, loss) is read after the next one has been launched. On a
    CPU it is read at once. With a group, every rank is a Learner with shards of its own; only rank 0 publishes and saves.
    """

    def __init__(
        self,
        *,
        config: LearnerConfig,
        network: QNetwork,
        is_prioritized: bool,
        readers: Sequence[ReplayReader],
        num_items: Sequence[int],
        params: ParamsWriter,
        run: str,
        epoch: int,
        run_dir: Path,
        seed: int,
        group: LearnerGroup | None = None,
    ) -> None:
        """`num_items` is how many each reader's shard is asked for: this rank's part of `config.batch_size`."""
        self._config, self._group = config, group
        device = pick_device(config.device)
        self._update = Update(config=config, network=network, device=device, seed=seed, group=group)
        self._online, self._target, self._optimizer = self._update.online, self._update.target, self._update.optimizer
        self._is_prioritized = is_prioritized
        self._params, self._run, self._epoch, self._run_dir = params, run, epoch, run_dir
        self._source = BatchSource(
            readers,
            num_items=num_items,
            importance_exponent=config.importance_exponent,
            prefetch_batches=config.prefetch_batches,
            prefetch_threads=min(torch.get_num_threads(), MAX_PREFETCH_THREADS),
            transfer=self._update.transfer,
            random_shift_pixels=config.random_shift_pixels,
            random_shift_fraction=config.random_shift_fraction,
        )
        self._clock = PhaseClock()
        self._batch: Batch | None = None  # Fetched, and not learned from yet: another rank had none.
        self._reports: deque[_Report] = deque()
        self._num_late = 1 if device.type == "cuda" else 0
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
        self._intervals: list[float] = []  # Between the ends of updates.
        self._last_end: float | None = None
        self._pause: float | None = None  # The longest of them since a checkpoint was begun; None while there is none.
        self._saver = ThreadPoolExecutor(1, "checkpoint")
        self._saving: Future[Path] | None = None
        self._anneal()

    @property
    def updates(self) -> int:
        return self._stats.updates

    def start(self) -> None:
        """Begins to prefetch, on threads, and on a CPU to do what an update can do at once on two."""
        self._source.start()
        self._update.start()

    def close(self) -> None:
        self._source.close()
        self._update.close()
        self._saver.shutdown()
        if self._group is not None:
            self._group.close()

    def publish(self) -> None:
        """Publishes the parameters of `config.publish_params` as version `updates`."""
        with self._clock("publish"):
            self._publish()

    def _publish(self) -> None:
        self._settle()
        network = self._target if self._config.publish_params == "target" else self._online
        snapshot = ParamsSnapshot(
            run=self._run,
            epoch=self._epoch,
            version=self._stats.updates,
            layout=params_module.layout(network),
            params=params_module.flatten(network, bf16=self._config.publish_precision == "bf16"),
        )
        self._params.publish(wire.pack(snapshot))
        self._stats.published_version = self._stats.updates

    def run(self, seconds: float, max_updates: int | None) -> LearnerStats:
        """Updates for about so many seconds, or until there are `max_updates` in all; returns the statistics.

        All ranks of a group leave it after the same update: as soon as one of them wants to.
        """
        deadline = time.monotonic() + seconds
        while True:
            rest = deadline - time.monotonic()
            wants = rest > 0 and (max_updates is None or self._stats.updates < max_updates)
            batch = self._fetch(min(rest, 0.5)) if wants else None
            agreed = self._agree(wants, batch)
            if not agreed.goes_on:
                break
            if batch is not None and agreed.weight_scale is not None:
                self._learn(batch, agreed.weight_scale)
        return self.stats()

    def step(self, timeout_seconds: float = 0.0) -> bool:
        """Does one update; returns whether there was a batch for it. Without a group.

        Raises:
          NonFiniteError: for a loss or gradient that is NaN or infinite. The batch is saved in the run directory, and nothing
            that came of it leaves the learner: no parameters, priorities or checkpoint. On a CPU no parameter was changed by it either.
        """
        batch = self._fetch(timeout_seconds)
        if batch is None:
            return False
        self._learn(batch, batch.weight_scale)
        return True

    def stats(self) -> LearnerStats:
        """Returns the statistics; the mean loss is of the updates since the last call."""
        stats = self._stats
        self._read_reports(0)
        stats.loss = float(np.mean(self._losses)) if self._losses else float("nan")
        self._losses.clear()
        stats.update_interval_p50_seconds, stats.update_interval_p99_seconds = (
            np.percentile(self._intervals, (50, 99)).tolist() if self._intervals else (float("nan"), float("nan"))
        )
        self._intervals.clear()
        stats.checkpoint_pause_seconds = float("nan")
        if self._pause is not None and self._saving is not None and self._saving.done():
            stats.checkpoint_pause_seconds, self._pause = self._pause, None
        stats.num_ready_batches = self._source.num_ready()
        stats.num_dropped_batches, stats.last_fault = self._source.num_dropped_batches, self._source.last_fault
        stats.answer_p95_seconds = self._source.answer_p95_seconds()
        stats.usage, stats.prefetch_usage = usage([self._clock]), self._source.usage()
        if self._saving is not None and self._saving.done():
            error = self._saving.exception()
            fault = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
            stats.checkpoint_fault = fault if error is not None else None
        return stats

    def save(self, run: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Array]] = MappingProxyType({})) -> str:
        """Writes a checkpoint and returns its name, when it is on the disk; see `begin_save`."""
        if self._saving is not None:
            wait([self._saving])
        self.begin_save(run, tensors)
        name = self.saved(timeout_seconds=None)
        assert name is not None
        return name

    def begin_save(self, run: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Array]] = MappingProxyType({})) -> None:
        """Copies what a checkpoint holds, and has it written on a thread while updates go on; not while one before it is being written.

        Args:
          run: what others than the learner want to find again, plain values: a part of `meta` for each name.
          tensors: the same, arrays: a file for each name.

        Raises:
          NonFiniteError: for a parameter that is not finite; nothing is written then.
        """
        if self._saving is not None and not self._saving.done():
            return
        with self._clock("save"):
            self._begin_save(run, tensors)

    def _begin_save(self, run: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Array]]) -> None:
        self._settle()
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
            "generator": self._update.generator_state(),
            **run,
        }
        state = {
            "online": self._online.state_dict(),
            "target": self._target.state_dict(),
            "optimizer": _optimizer_tensors(self._optimizer),
        }
        saved = checkpoints.Checkpoint(
            tensors={name: _to_numpy(part) for name, part in state.items()} | dict(tensors), meta=meta
        )
        self._pause = 0.0
        directory, kept = self._run_dir / "checkpoints", self._config.checkpoints_kept
        self._saving = self._saver.submit(checkpoints.write, directory, self.updates, saved, kept=kept)

    def saved(self, timeout_seconds: float | None = 0.0) -> str | None:
        """Returns the name of the checkpoint that was begun last, or None where it is not on the disk within the timeout.

        Raises:
          OSError: where it could not be written; those before it are as they were.
        """
        assert self._saving is not None, "none was begun"
        try:
            return self._saving.result(timeout_seconds).name
        except TimeoutError:
            return None

    def batch_parts(self) -> list[Array | None]:
        """Returns what is drawn and not learned from yet, of a learner without threads; for `restore_draws`."""
        return self._source.state()

    def restore_draws(self, generator: bytes, parts: Sequence[Array | None]) -> None:
        """After `restore`, takes what is random of a checkpoint (its `generator`), and what `batch_parts` returned."""
        self._update.restore_generator(generator)
        self._source.restore(parts)

    def restore(self, path: Path) -> None:
        """Takes networks, optimizer and counters from a checkpoint; raises CheckpointError where it does not fit."""
        saved = checkpoints.read(path)
        if saved.meta["layout"] != params_module.layout(self._online):
            raise CheckpointError(f"checkpoint {path}: it is of another network than this run's configuration describes")
        with self._update.on_stream():
            self._online.load_state_dict(_to_torch(saved.tensors["online"]))
            self._target.load_state_dict(_to_torch(saved.tensors["target"]))
            _restore_optimizer(self._optimizer, _to_torch(saved.tensors["optimizer"]))
        self._stats.updates, self._stats.samples = saved.meta["updates"], saved.meta["samples"]
        self._anneal()

    def digest(self) -> str:
        """Returns the digest of the online parameters."""
        return params_module.digest(self._online)

    def _fetch(self, timeout_seconds: float) -> Batch | None:
        """Returns the batch that is at hand, or waits for one."""
        stats, started = self._stats, time.monotonic()
        if self._batch is None:
            with self._clock("wait"):
                self._batch = self._source.next_batch(timeout_seconds)
            stats.waits_for = self._source.waits_for if self._batch is None else None
        if self._batch is None:
            self._read_reports(0)  # The shards need not wait for priorities that are there.
        stats.waiting_seconds += time.monotonic() - started
        return self._batch

    def _agree(self, wants: bool, batch: Batch | None) -> Agreement:
        """Returns what all ranks do next: whether they go on, and how this batch is weighed against theirs."""
        weight_scale = batch.weight_scale if batch is not None else None
        if self._group is None:
            return Agreement(wants, weight_scale)
        started = time.monotonic()
        with self._clock("agree"):
            agreed = self._group.agree(wants, weight_scale)
        self._stats.waiting_seconds += time.monotonic() - started
        if batch is not None:
            self._stats.waits_for = None if agreed.weight_scale is not None else "the learner waits for a batch of another rank"
        return agreed

    def _learn(self, batch: Batch, weight_scale: float) -> None:
        """Does one update with the batch that was fetched."""
        stats, started = self._stats, time.monotonic()
        self._batch = None
        with self._clock("update"):
            results = self._update.gradients(batch, weight_scale)
            self._reports.append(_Report(batch, *self._update.report(results)))
            self._read_reports(self._num_late)
            self._update.apply()
        stats.updates += 1
        stats.samples += self._config.batch_size
        # Not below 0: after a restart from a checkpoint, actors have acted with versions that are yet to come.
        stats.params_lag_updates = max(stats.updates - batch.mean_params_version, 0.0)
        with self._clock("update"):
            self._update.update_target(stats.updates)
        self._anneal()
        if stats.updates % self._config.publish_period_updates == 0 and self._is_first:
            self.publish()
        now = time.monotonic()
        stats.busy_seconds += now - started
        if self._last_end is not None:
            self._intervals.append(now - self._last_end)
            if self._pause is not None:
                self._pause = max(self._pause, now - self._last_end)
        self._last_end = now

    def _anneal(self) -> None:
        """Sets what changes over the run: of batches drawn from now on importance exponent and shifted fraction; the learning rate."""
        config = self._config
        if config.random_shift_anneal_updates is not None:
            self._source.random_shift_fraction = schedules.linear(
                self.updates, initial=0.0, final=config.random_shift_fraction, num=config.random_shift_anneal_updates
            )
        if config.importance_anneal_updates is not None:
            self._source.importance_exponent = schedules.linear(
                self.updates, initial=config.importance_exponent, final=1.0, num=config.importance_anneal_updates
            )
        if config.learning_rate_anneal_updates is not None:
            self._update.set_learning_rate(
                schedules.linear(
                    self.updates - config.learning_rate_hold_updates,
                    initial=config.learning_rate,
                    final=config.learning_rate_final,
                    num=config.learning_rate_anneal_updates,
                )
            )

    @property
    def _is_first(self) -> bool:
        return self._group is None or self._group.rank == 0

    def _read_reports(self, num_left: int) -> None:
        """Takes in what updates have told, but for the newest `num_left`; raises NonFiniteError."""
        while len(self._reports) > num_left:
            with self._clock("report"):
                self._read_report()

    def _read_report(self) -> None:
        batch, values, event = self._reports.popleft()
        if event is not None:
            event.synchronize()
        *td_error, loss, value, grad_norm = values.numpy()
        if not (np.isfinite(loss) and np.isfinite(grad_norm)):
            what = f"the loss is {loss}" if not np.isfinite(loss) else f"the gradient norm is {grad_norm}"
            self._save_bad_batch(batch, what)
        self._losses.append(float(loss))
        self._stats.mean_value, self._stats.grad_norm = float(value), float(grad_norm)
        if self._is_prioritized:
            priorities = priority(np.asarray(td_error), floor=self._config.priority_floor)
            self._source.update_priorities(batch, priorities)

    def _settle(self) -> None:
        """Waits until all updates are done and found right: before parameters leave the learner."""
        self._read_reports(0)
        self._update.wait()

    def _save_bad_batch(self, batch: Batch, what: str) -> None:
        part = "" if self._group is None else f"-rank{self._group.rank}"
        path = self._run_dir / f"bad_batch_{self._stats.updates:010d}{part}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in batch.tensors().items()}, path)
        raise NonFiniteError(
            f"{what} at update {self._stats.updates}; its batch is saved in {path}, and the last checkpoint is kept"
        )


def _to_numpy(tensors: Mapping[str, Tensor]) -> dict[str, Array]:
    """Returns copies on the host: updates go on while they are written."""
    return {name: np.array(tensor.detach().cpu().numpy(), order="C") for name, tensor in tensors.items()}


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
