"""One update: gradients of a batch's loss, and the optimizer's step. All of it on the device; nothing here waits for it."""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from common.config import LearnerConfig
from common.errors import UserError
from common.networks import QNetwork
from learner.batches import Batch
from learner.collective import LearnerGroup
from learner.inputs import Transfer, make_prepare
from learner.objective import Draws, Objective

_EAGER_CALLS = 3  # Before a function is recorded: libraries pick their algorithms and take their memory.


class Results(NamedTuple):
    """What an update leaves on the device; the next one may overwrite it."""

    td_error: Tensor
    """f32[B]."""
    scalars: Tensor
    """f32[3]: mean loss, mean value of the actions taken, norm of the gradient before clipping."""


class Update:
    """Owns the online and target networks and the optimizer.

    `gradients(batch)` and `apply()` make one update; between them a caller may look at the results and refuse them. With a
    group, gradients are sums over its ranks, each with its part of the batch, so that all ranks take the same step. Called from one
    thread; `transfer` is the prefetch threads'.
    """

    def __init__(
        self, *, config: LearnerConfig, network: QNetwork, device: torch.device, seed: int, group: LearnerGroup | None
    ) -> None:
        self._config, self._device, self._group = config, device, group
        dtype = pick_precision(config.precision, device, uses_convolutions=network.is_convolutional)
        self.online = network.to(device)
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        memory_format = pick_memory_format(config.memory_format, device, self.online)
        self.transfer = Transfer(device, make_prepare(self.online, device, dtype, memory_format))
        self.optimizer = make_optimizer(config, self.online, device)
        self._parameters = list(self.online.parameters())
        self._objective = Objective(config, self.online, device, dtype)
        self._generator = torch.Generator(device).manual_seed(seed)
        self._stream: Any = None
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # What was copied above is there.
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._differentiate: Callable[..., tuple[Tensor, ...]] = self._gradients
        self._step: Callable[[], tuple[Tensor, ...]] = self._optimize
        compilation = pick_compilation(config.compilation, device)
        self._has_plain_passes = compilation == "off"
        self._terms = torch.compile(self._objective.__call__) if compilation == "compile" else self._objective
        if compilation == "cuda_graph":
            self._differentiate = RecordedFunction(self._gradients)
            if group is None:  # A group's sums lie somewhere else at every update.
                self._step = RecordedFunction(self._optimize)

    def start(self) -> None:
        """On a CPU, has the target's pass done on a thread of its own from now on. The same numbers come out."""
        # Where arithmetic has several threads, two passes at once would each want all of them.
        if self._device.type == "cpu" and self._has_plain_passes and torch.get_num_threads() == 1:
            self._objective.beside = ThreadPoolExecutor(1, "target")

    def close(self) -> None:
        """Ends the thread of `start`."""
        if self._objective.beside is not None:
            self._objective.beside.shutdown()
            self._objective.beside = None

    def gradients(self, batch: Batch, weight_scale: float) -> Results:
        """Computes the gradients of the batch's mean loss, clipped, and says what they were.

        Args:
          batch: this rank's part.
          weight_scale: what the importance weights are normalized by, over all ranks: at least the batch's own.
        """
        with self.on_stream():
            if batch.ready is not None:
                self._stream.wait_event(batch.ready)
                for tensor in batch.tensors().values():
                    tensor.record_stream(self._stream)
            factor = batch.weight_scale / weight_scale / self._config.batch_size
            draws = self._objective.draw(self.online, len(batch.a_tm1), self._generator)
            td_error, sums, *gradients = self._differentiate(
                batch.s_tm1,
                batch.a_tm1,
                batch.r_t,
                batch.discount_t,
                batch.s_t,
                batch.importance_weight * factor,
                *draws,
            )
            if self._group is not None:
                sums, *gradients = self._group.sum([sums, *gradients])
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                parameter.grad = gradient
            norm, limit = nn.utils.get_total_norm(gradients), self._config.max_grad_norm
            # Where the host knows the norm without waiting, gradients that need no clipping are not passed over.
            if limit is not None and not (self._device.type == "cpu" and norm <= limit):
                nn.utils.clip_grads_with_norm_(self._parameters, limit, norm)
            return Results(td_error, torch.cat([sums, norm[None]]))

    def apply(self) -> None:
        """Takes the optimizer's step."""
        with self.on_stream():
            self._step()

    def update_target(self, updates: int) -> None:
        """Copies or moves the target network, as it is due after so many updates."""
        config = self._config
        with self.on_stream(), torch.no_grad():
            if config.target_soft_rate is not None:
                torch._foreach_lerp_([*self.target.parameters()], [*self._parameters], config.target_soft_rate)
                for target, online in zip(self.target.buffers(), self.online.buffers(), strict=True):
                    target.copy_(online)
            elif updates % (config.target_period_updates or 1) == 0:
                self.target.load_state_dict(self.online.state_dict())

    def set_learning_rate(self, learning_rate: float) -> None:
        """Sets the step size of the updates that follow."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):  # Part of what was recorded on a GPU.
                with self.on_stream():
                    group["lr"].fill_(learning_rate)
            else:
                group["lr"] = learning_rate

    def generator_state(self) -> bytes:
        """Returns the state of all that is random in updates."""
        return bytes(self._generator.get_state().numpy())

    def restore_generator(self, state: bytes) -> None:
        self._generator.set_state(torch.from_numpy(np.frombuffer(state, np.uint8).copy()))

    def report(self, results: Results) -> tuple[Tensor, torch.cuda.Event | None]:
        """Starts to bring f32[B + 3], the TD errors and the scalars, to the host; returns them and what to wait for first."""
        with self.on_stream():
            on_device = torch.cat([results.td_error, results.scalars])
            if self._stream is None:
                return on_device, None
            on_host = torch.empty(on_device.shape, pin_memory=True)
            on_host.copy_(on_device, non_blocking=True)
            return on_host, self._stream.record_event()

    def on_stream(self) -> contextlib.AbstractContextManager[Any]:
        """Returns the context in which all that touches the networks happens on a GPU."""
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def wait(self) -> None:
        """Waits until the device has done all that it was given: before anyone reads a network."""
        if self._stream is not None:
            self._stream.synchronize()

    def _gradients(
        self,
        s_tm1: Tensor,
        a_tm1: Tensor,
        r_t: Tensor,
        discount_t: Tensor,
        s_t: Tensor,
        factor: Tensor,
        *drawn: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """Returns td_error f32[B], the sums f32[2] of loss and value, and the gradients of all parameters."""
        terms = self._terms(self.online, self.target, s_tm1, a_tm1, r_t, discount_t, s_t, Draws(*drawn))
        loss = (terms.loss * factor).sum()
        # Those of convolutions come in the order of memory of their inputs, and the fused optimizer reads element by element.
        gradients = [gradient.contiguous() for gradient in torch.autograd.grad(loss, self._parameters)]
        value = terms.value.sum() / self._config.batch_size
        return terms.td_error, torch.stack([loss.detach(), value]), *gradients

    def _optimize(self) -> tuple[Tensor, ...]:
        self.optimizer.step()
        self.online.step_spectral_norms()
        return ()


class RecordedFunction:
    """Runs a function of tensors a few times, then records what it did on a GPU, and from then on replays that: one launch, not
    hundreds. The shapes stay those of the first call; outputs lie in the same memory at every call."""

    def __init__(self, function: Callable[..., tuple[Tensor, ...]]) -> None:
        self._function = function
        self._num_calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor | None] = []
        self._outputs: tuple[Tensor, ...] = ()

    def __call__(self, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        self._num_calls += 1
        if self._num_calls <= _EAGER_CALLS:
            return self._function(*inputs)
        if self._graph is None:
            self._inputs = [tensor.clone() if tensor is not None else None for tensor in inputs]
            self._graph = torch.cuda.CUDAGraph()
            # Other threads of this process copy and convert batches meanwhile.
            with torch.cuda.graph(self._graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
                self._outputs = self._function(*self._inputs)
        for mine, given in zip(self._inputs, inputs, strict=True):
            if mine is not None and given is not None:
                mine.copy_(given)
        self._graph.replay()
        return self._outputs


def pick_device(name: str) -> torch.device:
    """Returns the device that a setting means; raises UserError where it asks for a GPU that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("learner.device cuda: PyTorch sees no GPU here; use --learner.device auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def pick_precision(name: str, device: torch.device, *, uses_convolutions: bool) -> torch.dtype:
    """Returns what matrix products are computed in; see LearnerConfig.precision."""
    if name == "auto":
        on_gpu = device.type == "cuda"
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if uses_convolutions and has_bf16 else torch.float32
    return torch.bfloat16 if name == "bf16" else torch.float32


def pick_memory_format(name: str, device: torch.device, network: QNetwork) -> str:
    """Returns contiguous, channels_last or space_to_depth; see LearnerConfig.memory_format."""
    if not network.is_convolutional:
        return "contiguous"
    if name == "auto":
        return "space_to_depth" if device.type == "cuda" and network.takes_blocks else "channels_last"
    return name


def pick_compilation(name: str, device: torch.device) -> str:
    """Returns off, compile or cuda_graph; see LearnerConfig.compilation."""
    if name == "cuda_graph" and device.type != "cuda":
        raise UserError("learner.compilation cuda_graph needs a GPU; use --learner.compilation auto")
    compilers = [os.environ.get("CXX", "g++")] if device.type == "cpu" else ["gcc", "cc", "clang"]
    if name == "compile" and not any(shutil.which(compiler) for compiler in compilers):
        raise UserError(f"learner.compilation compile needs a compiler, and there is no {compilers[0]} here: use auto")
    if name == "auto":
        return "cuda_graph" if device.type == "cuda" else "off"
    return name


def make_optimizer(config: LearnerConfig, network: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """Builds the optimizer that the configuration names; on a GPU such that its step can be recorded."""
    parameters, on_gpu = network.parameters(), device.type == "cuda"
    is_annealed = config.learning_rate_anneal_updates is not None
    learning_rate = torch.tensor(config.learning_rate, device=device) if on_gpu and is_annealed else config.learning_rate
    if config.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=learning_rate, eps=config.optimizer_epsilon, fused=True, capturable=on_gpu)
    return torch.optim.RMSprop(
        parameters,
        lr=learning_rate,
        alpha=config.rmsprop_decay,
        eps=config.optimizer_epsilon,
        centered=True,
        capturable=on_gpu,
    )
