"""The bare update of `qfleet bench learner`: the product's own `Update` on batches that lie ready, and beside it the update as people
write it in PyTorch, both on the same clock and in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from common.config import EnvSpec, LearnerConfig, NetworkConfig
from common.messages import Array
from common.networks import make_network
from learner.batches import Batch
from learner.update import Results, Update

_NUM_BATCHES = 2  # That take turns, so that a batch is not still in the cache from the update before.
_WARM_UP_UPDATES = 6  # After three eager ones a GPU's update is recorded.
_MATRIX_SHAPES = {
    "cpu": ((1024, 1024, 1024), (2048, 2048, 2048), (8192, 512, 512)),
    "cuda": ((4096, 4096, 4096), (8192, 8192, 8192), (65536, 2048, 2048)),
}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Spread:
    """A quantity over the rounds."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """What is updated: the same for every row that is compared."""

    name: str
    network: NetworkConfig
    learner: LearnerConfig
    spec: EnvSpec
    device: torch.device

    @property
    def batch_size(self) -> int:
        return self.learner.batch_size


class Round(NamedTuple):
    """Updates done one after another."""

    updates: int
    seconds: float
    cpu_seconds: float
    """Of all threads of this process."""

    @property
    def by_clock(self) -> float:
        """Updates per second."""
        return self.updates / self.seconds

    @property
    def by_cpu(self) -> float:
        """Updates per second of processor time."""
        return self.updates / max(self.cpu_seconds, 1e-9)


class RawBatch(NamedTuple):
    """A batch as it lies in the host's memory."""

    stacks: Array
    """u8[2, B, K, H, W]: s_tm1 and s_t. f32 where observations are vectors."""
    a_tm1: Array
    r_t: Array
    discount_t: Array
    importance_weight: Array


def raw_batches(problem: Problem, empty: Callable[[tuple[int, ...], np.dtype[Any]], Array] = np.empty) -> list[RawBatch]:
    """Returns batches of random content, the same for every row; `empty` makes the arrays of stacks."""
    rng, spec, size = np.random.default_rng(0), problem.spec, problem.batch_size
    batches = []
    for _ in range(_NUM_BATCHES):
        stacks = empty((2, size, spec.frame_stack, *spec.plane_shape), np.dtype(spec.plane_dtype))
        is_pixels = stacks.dtype == np.uint8
        stacks[:] = rng.integers(256, size=stacks.shape, dtype=np.uint8) if is_pixels else rng.normal(size=stacks.shape)
        r_t, weight = rng.integers(-1, 2, size).astype(np.float32), (rng.random(size) * 0.5 + 0.5).astype(np.float32)
        discount_t = np.where(rng.random(size) < 0.05, 0, 0.99**3).astype(np.float32)
        batches.append(RawBatch(stacks, rng.integers(spec.num_actions, size=size), r_t, discount_t, weight))
    return batches


class ProductUpdates:
    """Updates by `Update`, as `Learner` calls it: what one tells is read after the next one has been launched on a GPU, at once on
    a CPU."""

    def __init__(self, problem: Problem) -> None:
        self._update = make_update(problem)
        self._raw = raw_batches(problem, self._update.transfer.empty)
        self._batches = [self._prepared(raw) for raw in self._raw]
        self._num_late = 1 if problem.device.type == "cuda" else 0
        self._reports: list[tuple[Tensor, torch.cuda.Event | None]] = []
        self._num = 0

    def step(self) -> None:
        batch, update = self._batches[self._num % _NUM_BATCHES], self._update
        results: Results = update.gradients(batch, batch.weight_scale)
        self._reports.append(update.report(results))
        if len(self._reports) > self._num_late:
            self._read()
        update.apply()
        self._num += 1
        update.update_target(self._num)

    def prepare(self) -> None:
        """Brings one batch's observations to the device, as a prefetch thread does."""
        transfer = self._update.transfer
        with transfer.on_stream():
            for half in self._raw[0].stacks:
                transfer.observations(half)

    def _read(self) -> None:
        values, event = self._reports.pop(0)
        if event is not None:
            event.synchronize()
        assert np.isfinite(values.numpy()[-3:]).all(), "an update gave a loss that is not finite"

    def _prepared(self, raw: RawBatch) -> Batch:
        transfer = self._update.transfer
        with transfer.on_stream():
            s_tm1, s_t = (transfer.observations(half) for half in raw.stacks)
            return Batch(
                s_tm1=s_tm1,
                s_t=s_t,
                a_tm1=transfer.scalars(raw.a_tm1),
                r_t=transfer.scalars(raw.r_t),
                discount_t=transfer.scalars(raw.discount_t),
                importance_weight=transfer.scalars(raw.importance_weight),
                weight_scale=1.0,
                shares=(),
                mean_params_version=0.0,
                ready=transfer.ready(),
                pinned=raw.stacks,
            )


class PlainUpdates:
    """Updates as people write them in PyTorch: eager, fp32, planes first, default Adam; nothing of the product but its layers.

    `is_prepared`: whether the conversion of the bytes has been done before.
    """

    def __init__(self, problem: Problem, *, is_prepared: bool) -> None:
        config, device = problem.learner, problem.device
        # Observations that are floating-point already are not scaled by the first layer.
        spec = problem.spec._replace(plane_dtype="<f4")
        self._scale = 255.0 if problem.spec.plane_dtype == "|u1" else 1.0
        self._online = make_network(problem.network, spec, 0).to(device)
        self._target = make_network(problem.network, spec, 0).to(device).requires_grad_(False)
        self._optimizer = torch.optim.Adam(self._online.parameters(), lr=config.learning_rate)
        self._config, self._device = config, device
        self._raw = raw_batches(problem)
        self._scalars = [[torch.from_numpy(part).to(device) for part in raw[1:]] for raw in self._raw]
        self._prepared = [self._convert(raw.stacks) for raw in self._raw] if is_prepared else None
        self._num = 0

    def step(self) -> None:
        index = self._num % _NUM_BATCHES
        a_tm1, r_t, discount_t, importance_weight = self._scalars[index]
        s_tm1, s_t = self._prepared[index] if self._prepared is not None else self._convert(self._raw[index].stacks)
        with torch.no_grad():
            best_a_t = self._online(s_t).argmax(dim=1, keepdim=True)
            target_tm1 = r_t + discount_t * self._target(s_t).gather(1, best_a_t)[:, 0]
        qa_tm1 = self._online(s_tm1).gather(1, a_tm1[:, None])[:, 0]
        loss = (importance_weight * functional.smooth_l1_loss(qa_tm1, target_tm1, reduction="none")).mean()
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self._online.parameters(), self._config.max_grad_norm or float("inf"))
        self._optimizer.step()
        td_error = (target_tm1 - qa_tm1.detach()).abs().cpu().numpy()
        assert np.isfinite(td_error).all(), "an update gave a loss that is not finite"
        self._num += 1
        if self._num % (self._config.target_period_updates or 1) == 0:
            self._target.load_state_dict(self._online.state_dict())

    def prepare(self) -> None:
        """Brings one batch's observations to the device and converts them."""
        self._convert(self._raw[0].stacks)

    def _convert(self, stacks: Array) -> list[Tensor]:
        return [torch.from_numpy(half).to(self._device).float() / self._scale for half in stacks]


def make_update(problem: Problem) -> Update:
    network = make_network(problem.network, problem.spec, 0)
    return Update(config=problem.learner, network=network, device=problem.device, seed=0, group=None)


def has_plain_twin(problem: Problem) -> bool:
    """Whether `PlainUpdates` computes what the problem asks for: expectations, double Q-learning, no noise."""
    network, learner = problem.network, problem.learner
    is_plain = network.distribution == "expectation" and network.noisy_sigma is None and not network.value_rescaling
    is_plain = is_plain and not network.spectral_norm
    return is_plain and (learner.algorithm, learner.loss, learner.optimizer) == ("double_q_learning", "huber", "adam")


def count_flops(problem: Problem) -> int:
    """Returns the floating-point operations of one update, forward and backward, as PyTorch counts them: matrix products and
    convolutions, a multiplication and an addition each, and nothing else."""
    uncompiled = replace(problem, learner=replace(problem.learner, compilation="off"))
    updates = ProductUpdates(uncompiled)
    with FlopCounterMode(display=False) as counter:
        updates.step()
    return int(counter.get_total_flops())


class MatrixRate:
    """The rate of matrix products that the device reaches: the best of a few shapes, which is found first."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seconds: float) -> None:
        self._device, self._seconds = device, seconds
        candidates = []
        for rows, inner, columns in _MATRIX_SHAPES[device.type]:
            a, b = torch.randn(rows, inner).to(device, dtype), torch.randn(inner, columns).to(device, dtype)
            out = torch.empty(rows, columns, dtype=dtype, device=device)
            self._operands = a, b, out
            self.measure()
            candidates.append((self.flops() * self.measure().by_clock, self._operands))
        _, self._operands = max(candidates, key=lambda candidate: candidate[0])
        self.shape = (*self._operands[0].shape, self._operands[1].shape[1])

    def flops(self) -> float:
        """Returns the floating-point operations of one product."""
        a, b, _ = self._operands
        return 2.0 * a.shape[0] * a.shape[1] * b.shape[1]

    def measure(self) -> Round:
        """Returns products done over a short time."""
        a, b, out = self._operands
        with torch.no_grad():
            return time_steps(lambda: torch.mm(a, b, out=out), self._seconds, self._device, least=2, between_syncs=20)


def time_steps(
    step: Callable[[], Any], seconds: float, device: torch.device, *, least: int = 3, between_syncs: int | None = None
) -> Round:
    """Calls `step` for about so many seconds, and at least so often; the device has nothing to do before and has done all after.

    `between_syncs`: on a GPU, how many calls are launched before the clock is looked at; for calls that wait for nothing.
    """
    _synchronize(device)
    started, cpu_started, num = time.perf_counter(), time.process_time(), 0
    while num < least or time.perf_counter() - started < seconds:
        step()
        num += 1
        if between_syncs is not None and num % between_syncs == 0:
            _synchronize(device)
    _synchronize(device)
    return Round(num, time.perf_counter() - started, time.process_time() - cpu_started)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(slots=True)
class Row:
    """One line of the bare update's table, and what it measures itself with."""

    problem: Problem
    kind: str
    """qfleet, plain (conversion of the bytes included) or plain_prepared."""
    updates: ProductUpdates | PlainUpdates
    rounds: list[Round]
    preparations: list[Round]
    """Of batches and not of updates."""

    @property
    def precision(self) -> str:
        return self.problem.learner.precision if self.kind == "qfleet" else "fp32"


def make_rows(problems: Sequence[Problem]) -> list[Row]:
    """Returns the product's rows and, once for each network and batch size, those of the plain update."""
    rows: list[Row] = []
    with_twin = set()
    for problem in problems:
        rows.append(Row(problem, "qfleet", ProductUpdates(problem), [], []))
        if has_plain_twin(problem) and (problem.name, problem.batch_size) not in with_twin:
            with_twin.add((problem.name, problem.batch_size))
            for kind in ("plain", "plain_prepared"):
                rows.append(Row(problem, kind, PlainUpdates(problem, is_prepared=kind == "plain_prepared"), [], []))
    return rows


def measure_updates(problems: Sequence[Problem], *, rounds: int, seconds: float) -> dict[str, Any]:
    """Returns the figures of the bare update: `updates`, a row each, and `matrix`, the rates that they are set against."""
    device = problems[0].device
    flops = [count_flops(problem) for problem in problems]
    rows = make_rows(problems)
    matrices = {name: MatrixRate(device, dtype, min(seconds, 0.3)) for name, dtype in _DTYPES.items()}
    peaks: dict[str, list[Round]] = {name: [] for name in matrices}
    for row in rows:
        time_steps(row.updates.step, 0.0, device, least=_WARM_UP_UPDATES)
    for _ in range(rounds):
        for name, matrix in matrices.items():
            peaks[name].append(matrix.measure())
        for row in rows:
            row.rounds.append(time_steps(row.updates.step, seconds, device))
            if row.kind != "plain_prepared":
                row.preparations.append(time_steps(row.updates.prepare, seconds / 5, device))
    counts = {id(problem): count for problem, count in zip(problems, flops, strict=True)}
    rates = {name: [matrix.flops() * done.by_clock for done in peaks[name]] for name, matrix in matrices.items()}
    return {
        "updates": [_figures(row, rows, counts[id(row.problem)], peaks["bf16"], matrices["bf16"].flops()) for row in rows],
        "matrix": {
            name: {"flops_per_second": asdict(Spread.of(rates[name])), "shape": list(matrix.shape)}
            for name, matrix in matrices.items()
        },
    }


def _figures(row: Row, rows: Sequence[Row], flops: int, peaks: Sequence[Round], peak_flops: float) -> dict[str, Any]:
    """Returns what one row gives. Ratios and the MFU are medians over the rounds, so that what slows a round down cancels; by the
    clock, and on a CPU by processor time too, from which other programs of the machine take nothing."""
    problem, rates, num = row.problem, [done.by_clock for done in row.rounds], sum(done.updates for done in row.rounds)
    on_cpu = problem.device.type == "cpu"
    figures: dict[str, Any] = {
        "kind": row.kind,
        "network": problem.name,
        "precision": row.precision,
        "batch_size": problem.batch_size,
        "updates": num,
        "samples": num * problem.batch_size,
        "updates_per_second": asdict(Spread.of(rates)),
        "samples_per_second": asdict(Spread.of([rate * problem.batch_size for rate in rates])),
        "cpu_seconds_per_update": statistics.median(1 / done.by_cpu for done in row.rounds),
        "flops_per_update": flops,
        "flops_per_second": asdict(Spread.of([rate * flops for rate in rates])),
        "mfu": flops / peak_flops * _ratio(row.rounds, peaks, "by_clock").median,
        "mfu_by_cpu": flops / peak_flops * _ratio(row.rounds, peaks, "by_cpu").median if on_cpu else None,
        "preparation_seconds": asdict(Spread.of([1 / done.by_clock for done in row.preparations]))
        if row.preparations
        else None,
        "preparation_cpu_seconds": statistics.median(1 / done.by_cpu for done in row.preparations)
        if row.preparations
        else None,
    }
    if row.kind == "qfleet":
        for twin in rows:
            if twin.kind != "qfleet" and (twin.problem.name, twin.problem.batch_size) == (problem.name, problem.batch_size):
                figures[f"ratio_to_{twin.kind}"] = asdict(_ratio(row.rounds, twin.rounds, "by_clock"))
                figures[f"cpu_ratio_to_{twin.kind}"] = asdict(_ratio(row.rounds, twin.rounds, "by_cpu")) if on_cpu else None
    return figures


def _ratio(mine: Sequence[Round], theirs: Sequence[Round], by: str) -> Spread:
    """Returns the ratio of two rates, round by round."""
    return Spread.of([getattr(one, by) / getattr(other, by) for one, other in zip(mine, theirs, strict=True)])
