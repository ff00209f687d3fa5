"""The configuration of a run: frozen, checked, documented under each field with unit and source.

A default lives here and nowhere else; recipes (`deploy/recipes.py`) say only where they depart from it. `None` means off.
Every section goes to its role's constructor and no further: functions get numbers.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from common.errors import UserError

_UNITS = {
    "": 1,
    "b": 1,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}


class ByteSize(int):
    """A number of bytes, written as 512MiB, 4GiB or a plain number."""

    @classmethod
    def parse(cls, text: str) -> ByteSize:
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)\s*", text.lower())
        if match is None or match.group(2) not in _UNITS:
            raise ValueError(f"{text!r} is not a size: write 512MiB or 4GiB")
        return cls(float(match.group(1)) * _UNITS[match.group(2)])

    def __str__(self) -> str:
        for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
            if self >= unit:
                return f"{self / unit:.4g}{name}"
        return f"{int(self)}B"

    __repr__ = __str__


class EnvSpec(NamedTuple):
    """What a network and a shard must know of an environment."""

    plane_shape: tuple[int, ...]
    plane_dtype: str
    """'|u1' for pixels, '<f4' for vectors."""
    frame_stack: int
    num_actions: int


def _require(ok: bool, text: str) -> None:
    if not ok:
        raise ValueError(text)


def _require_positive(section: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value is None or (value > 0 and math.isfinite(value)), f"{section}.{name} must be positive, got {value}")


def _require_fraction(section: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value is None or 0.0 <= value <= 1.0, f"{section}.{name} must be in [0, 1], got {value}")


_WORD = r"[a-zA-Z0-9](?:[\w.-]{0,61}[a-zA-Z0-9])?"  # As Ray has it, for names and for values.
_LABEL = re.compile(rf"((?:{_WORD}/)?{_WORD})=(!?in\({_WORD}(?:,{_WORD})*\)|!?{_WORD})(?:,(?=.)|$)", re.ASCII)


def parse_labels(name: str, text: str | None) -> dict[str, str]:
    """Returns the label selector that Ray takes; raises ValueError, in the name of a setting, where it is none."""
    selector, rest = {}, text or ""
    while rest:
        match = _LABEL.match(rest)
        _require(
            match is not None,
            f"{name} {text!r}: write role=env, several with commas between them; a value may be !v or in(a,b)",
        )
        assert match is not None
        selector[match.group(1)] = match.group(2)
        rest = rest[match.end() :]
    return selector


ProtocolName = Literal["legacy", "machado"]

ATARI_PROTOCOLS: dict[str, dict[str, Any]] = {
    "legacy": {
        "sticky_action_probability": 0.0,
        "noop_max": 30,
        "full_action_set": False,
        "max_episode_frames": 108_000,
        "frame_skip": 4,
    },
    "machado": {
        "sticky_action_probability": 0.25,
        "noop_max": 0,
        "full_action_set": True,
        "max_episode_frames": 108_000,
        "frame_skip": 4,
        "fire_reset": False,
        "life_loss_terminates": False,
    },
}
"""What an evaluation protocol says of EnvConfig's fields; what it does not name may be either way. legacy: Mnih et al. 2015 and
those who followed; machado: Machado et al. 2018 (arXiv:1709.06009). Both papers cut an episode after 18,000 frames; 108,000 is what
later work has (Rainbow, Dopamine, Gymnasium's ALE/*-v5)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EnvConfig:
    """The environment: an Atari game, or any Gymnasium environment with Discrete actions and a Box observation."""

    game: str
    """ALE game as its ROM is named (pong, ms_pacman), or a Gymnasium id (CartPole-v1)."""

    frame_stack: int = 1
    """Observations stacked to one network input. Mnih et al. 2015: 4 for Atari."""

    frame_skip: int = 4
    """Atari: emulator frames per step; the pixelwise maximum of the last two is seen."""

    sticky_action_probability: float = 0.0
    """Atari: chance that the emulator repeats the last action. 0 as in Mnih et al. 2015; 0.25 in Machado et al. 2018."""

    full_action_set: bool = False
    """Atari: all 18 actions, not only those that the game uses."""

    max_episode_frames: int = 108_000
    """Atari: emulator frames after which an episode is truncated (30 minutes)."""

    noop_max: int = 30
    """Atari: at most so many random no-op frames at the start of an episode. ale-py plays 0 to noop_max - 1, FIRE counted."""

    fire_reset: bool = True
    """Atari: an episode begins with a frame of FIRE, in games that have it. ale-py's own way; in neither protocol's paper."""

    life_loss_terminates: bool = False
    """Atari: training sees a lost life as a terminal state; the game goes on. Evaluation never does."""

    def __post_init__(self) -> None:
        atari_id = re.fullmatch(r"ALE/(\w+)-v\d+", self.game)
        rom = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", atari_id.group(1)).lower() if atari_id else ""
        _require(not rom, f"env.game {self.game}: Atari games are named as their ROM; did you mean {rom!r}?")
        _require_positive("env", self, "frame_stack", "frame_skip", "max_episode_frames")
        _require_fraction("env", self, "sticky_action_probability")
        _require(self.noop_max >= 0, f"env.noop_max must not be negative, got {self.noop_max}")

    @property
    def is_atari(self) -> bool:
        return not re.search(r"-v\d+$", self.game)

    @property
    def frames_per_step(self) -> int:
        return self.frame_skip if self.is_atari else 1

    @property
    def protocol_name(self) -> str:
        """legacy, machado or custom for Atari, gymnasium else."""
        if not self.is_atari:
            return "gymnasium"
        return next((name for name in ATARI_PROTOCOLS if self.with_protocol(name) == self), "custom")

    def with_protocol(self, protocol: str) -> EnvConfig:
        """Returns this environment as an Atari protocol wants it.

        Raises:
          UserError: where there is no such protocol, or the game is not of Atari.
        """
        if protocol not in ATARI_PROTOCOLS:
            raise UserError(f"unknown protocol {protocol!r}; there are {' and '.join(ATARI_PROTOCOLS)}")
        if not self.is_atari:
            raise UserError(f"protocol {protocol} is of Atari games, not of {self.game}: leave out --protocol")
        return dataclasses.replace(self, **ATARI_PROTOCOLS[protocol])


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkConfig:
    """The Q-network."""

    torso: Literal["mlp", "dqn2013", "nature", "impala"] = "mlp"
    """mlp: none, the flattened observation; dqn2013: conv 16 8x8/4, 32 4x4/2 (Mnih et al. 2013); nature: conv 32 8x8/4,
    64 4x4/2, 64 3x3/1 (Mnih et al. 2015); impala: the residual one of Espeholt et al. 2018 (arXiv:1802.01561)."""

    width: int = 1
    """impala: its 16, 32 and 32 channels times this."""

    adaptive_pool: int | None = None
    """Convolutional torsos: their output is max-pooled to so many rows and columns. None: off. Beyond the Rainbow: 6."""

    spectral_norm: bool = False
    """impala: the residual convolutions are divided by their largest singular value (Miyato et al. 2018, arXiv:1802.05957)."""

    weight_standardization: bool = False
    """Convolutional torsos: every filter of a convolution is shifted and scaled to a mean of 0 and a norm of 1 (Qiao et al. 2019,
    arXiv:1903.10520), so that a gray background is as good as a black one."""

    hidden_sizes: tuple[int, ...] = (256,)
    """Units of each hidden fully connected layer (ReLU). 256 for dqn2013, 512 for nature."""

    dueling: bool = False
    """State value and advantages in two heads (Wang et al. 2016, arXiv:1511.06581); each has its own hidden layers."""

    layer_norm: bool = False
    """Layer normalization before every ReLU, over channels and positions on convolutions (Ba et al. 2016)."""

    noisy_sigma: float | None = None
    """sigma_0 of noisy fully connected layers (Fortunato et al. 2018, arXiv:1706.10295): 0.5 in Rainbow. None: plain layers.
    Actors draw noise for every environment and step, the learner for every pass; evaluation uses none."""

    distribution: Literal["expectation", "categorical", "quantile", "implicit_quantile"] = "expectation"
    """What the heads give of the return: its expectation; categorical: logits of fixed atoms (C51, arXiv:1707.06887);
    quantile: fixed quantiles (QR-DQN, arXiv:1710.10044); implicit_quantile: any quantile asked for (IQN, arXiv:1806.06923)."""

    num_atoms: int = 51
    """categorical: atoms, evenly spaced from value_min to value_max."""

    value_min: float = -10.0
    """categorical: the least return."""

    value_max: float = 10.0
    """categorical: the greatest return."""

    num_quantiles: int = 200
    """quantile: how many, at the midpoints of as many equal parts of [0, 1]."""

    num_policy_quantiles: int = 32
    """implicit_quantile: quantiles, at midpoints, whose mean is an action's value when acting; the paper samples 32."""

    num_cosines: int = 64
    """implicit_quantile: cosines that embed a quantile."""

    value_rescaling: bool = False
    """expectation: the network learns h(return), h(x) = sign(x) (sqrt(abs(x) + 1) - 1) + 0.001 x (Pohlen et al. 2018,
    arXiv:1805.11593), so that rewards need no clipping."""

    def __post_init__(self) -> None:
        _require(all(n > 0 for n in self.hidden_sizes), f"network.hidden_sizes must be positive, got {self.hidden_sizes}")
        _require_positive("network", self, "width", "adaptive_pool", "noisy_sigma", "num_quantiles")
        _require_positive("network", self, "num_policy_quantiles", "num_cosines")
        _require(math.isfinite(self.value_max - self.value_min), "network.value_min and network.value_max must be finite")
        _require(self.num_atoms > 1, f"network.num_atoms must be at least 2, got {self.num_atoms}")
        _require(
            self.value_min < self.value_max,
            f"network.value_min {self.value_min} must be less than network.value_max {self.value_max}",
        )
        for name, needed in (("width", 1), ("spectral_norm", False)):
            _require(
                self.torso == "impala" or getattr(self, name) == needed,
                f"network.{name} is of the impala torso: set --network.torso impala, or leave it out",
            )
        _require(
            self.torso != "mlp" or self.adaptive_pool is None,
            "network.adaptive_pool is of convolutional torsos: leave it out with --network.torso mlp",
        )
        _require(
            self.torso != "mlp" or not self.weight_standardization,
            "network.weight_standardization is of convolutional torsos: leave it out with --network.torso mlp",
        )
        _require(
            not (self.spectral_norm and self.weight_standardization),
            "network.spectral_norm and network.weight_standardization both scale the convolutions: set one of them",
        )
        _require(
            self.distribution == "expectation" or not self.value_rescaling,
            f"network.value_rescaling is of expectations: leave it out with --network.distribution {self.distribution}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ExplorationConfig:
    """Epsilon of the epsilon-greedy actors."""

    kind: Literal["linear", "multiplicative", "ladder"] = "linear"
    """linear: from initial to final over decay_steps env steps of the whole fleet; multiplicative: initial times
    decay_rate at each learner update, not below final; ladder: one constant for each environment (Ape-X)."""

    initial: float = 1.0
    """Epsilon at the start."""

    final: float = 0.05
    """Epsilon at the end."""

    decay_steps: int = 100_000
    """linear: env steps from initial to final."""

    decay_rate: float = 0.995
    """multiplicative: factor per update."""

    ladder_base: float = 0.4
    """ladder: epsilon_i = base ** (1 + exponent * i / (N - 1)) (Horgan et al. 2018)."""

    ladder_exponent: float = 7.0
    """ladder: see ladder_base."""

    def __post_init__(self) -> None:
        _require_fraction("actors.exploration", self, "initial", "final", "decay_rate", "ladder_base")
        _require_positive("actors.exploration", self, "decay_steps")


@dataclass(frozen=True, kw_only=True, slots=True)
class ActorsConfig:
    """The fleet of actors, and what they make of rewards."""

    num_actors: int = 1
    """Slots of the fleet, each with its own epsilon and seeds, and a process where there is room for it."""

    max_workers: int | None = None
    """Of these slots, those that act at once at most, and so what is asked of a cluster and its autoscaler. None: all."""

    node_labels: str | None = None
    """Cluster: labels of the nodes that take actors, role=env,ray.io/market-type=spot; a value may be !v, in(a,b) or !in(a,b), as Ray has
    them. None: any node but the head."""

    on_head: bool = False
    """Cluster: actors may run on its head node too, beside driver and dashboard."""

    num_envs: int = 8
    """Environments that each actor steps together, with one batched forward pass."""

    n_step: int = 1
    """Steps over which rewards are summed before bootstrapping."""

    discount: float = 0.99
    """gamma, per step."""

    reward_clip: float | None = None
    """Training rewards are clipped to [-reward_clip, reward_clip]; returns that people see are not. None: off."""

    terminal_reward: float | None = None
    """Training reward of a terminating step, in place of the environment's. None: off."""

    exploration: ExplorationConfig = field(default_factory=ExplorationConfig)

    chunk_transitions: int = 64
    """Transitions of one environment sent together; chunk_bytes may end a chunk earlier."""

    chunk_bytes: int = 90_000
    """Encoded planes after which a chunk is sent. Ray carries up to 100 KiB inside the call, without its object store."""

    max_in_flight_chunks: int = 4
    """Chunks that an actor has sent and no shard has answered yet, over all shards: each has an equal part, at least one. At that number it
    waits."""

    pull_period_steps: int = 50
    """Vector steps between two looks for newer parameters; looking never blocks. Ape-X: 400 frames, 100 steps. A distributed
    actor also looks once a second, and while it waits."""

    params_alarm_seconds: float | None = 60.0
    """After so long with the same parameters, while newer ones are published, an event names the actor. None: off."""

    env_threads: int = 1
    """Atari: emulator threads of each actor."""

    def __post_init__(self) -> None:
        _require_positive("actors", self, "num_actors", "max_workers", "num_envs", "n_step", "chunk_transitions", "chunk_bytes")
        parse_labels("actors.node_labels", self.node_labels)
        _require(self.chunk_bytes <= 100_000, f"actors.chunk_bytes must be at most 100000, got {self.chunk_bytes}")
        _require_positive("actors", self, "max_in_flight_chunks", "pull_period_steps", "env_threads", "reward_clip")
        _require_positive("actors", self, "params_alarm_seconds")
        _require_fraction("actors", self, "discount")

    @property
    def num_workers(self) -> int:
        """How many slots act at once where there is room for all that may."""
        return min(self.num_actors, self.max_workers or self.num_actors)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayConfig:
    """All replay shards together."""

    num_shards: int = 1
    """Shards, each a process."""

    memory: ByteSize = ByteSize(2**30)
    """Hard budget of all shards, planes and index, e.g. 512MiB or 4GiB. The first of memory and capacity reached evicts."""

    capacity: int = 1_000_000
    """Transitions held by all shards together; the oldest are evicted first."""

    min_size: int = 1_000
    """Transitions, over all shards, before the learner starts."""

    samples_per_insert: float | None = 8.0
    """Times that a transition is sampled on average; each shard holds actors and learner to it. None: no ratio."""

    limiter_buffer_samples: int | None = None
    """Samples by which the ratio may be off on either side, over all shards, before one side waits. None: wide enough
    for one batch and for every chunk that may be in flight."""

    priority_exponent: float = 0.0
    """alpha of Schaul et al. 2016 (arXiv:1511.05952): 0 uniform, 1 proportional."""

    sync_seconds: float | None = 1.0
    """Seconds between two syncs of every shard's durable log: what a power failure costs at most, where a killed process costs nothing.
    None: no log; a shard that dies, and a run that is resumed, begins with an empty replay."""

    disk_budget: ByteSize | None = None
    """Of all shards' logs together; beyond it the oldest segments go, though their items are still in memory. None: no limit; a log
    takes about as much as the planes in memory."""

    send_compressed: bool = True
    """Sampled planes travel as LZ4 blocks and the learner's prefetch threads unpack them. False: the shard does."""

    def __post_init__(self) -> None:
        _require_positive("replay", self, "num_shards", "memory", "capacity", "min_size")
        _require_positive("replay", self, "samples_per_insert", "limiter_buffer_samples", "sync_seconds", "disk_budget")
        _require(
            self.sync_seconds is None or self.sync_seconds <= 86_400,
            f"replay.sync_seconds must be at most 86400, a day, got {self.sync_seconds}",
        )
        _require_fraction("replay", self, "priority_exponent")
        _require(
            self.min_size <= self.capacity,
            f"replay.min_size {self.min_size} is more than replay.capacity {self.capacity}: the learner would never start",
        )


MAX_PREFETCH_THREADS = 4  # Of a learner: unpacking is soon bound by memory.


@dataclass(frozen=True, kw_only=True, slots=True)
class LearnerConfig:
    """The learner."""

    algorithm: Literal["q_learning", "double_q_learning", "munchausen_q_learning"] = "double_q_learning"
    """How the target values the destination. q_learning: Mnih et al. 2015; double_q_learning: van Hasselt et al. 2016
    (arXiv:1509.06461); munchausen_q_learning: Vieillard et al. 2020 (arXiv:2007.14430), for expectations and quantiles.
    network.distribution says of what: expectation, atoms or quantiles."""

    loss: Literal["huber", "mse"] = "huber"
    """expectation: huber: quadratic within |td_error| <= 1, linear outside; mse: half the squared error. Quantiles always
    take huber, atoms their cross-entropy."""

    munchausen_coefficient: float = 0.9
    """munchausen_q_learning: alpha, the part of the clipped log-policy that is added to the reward."""

    entropy_temperature: float = 0.03
    """munchausen_q_learning: tau, of the softmax policy."""

    munchausen_clip: float = -1.0
    """munchausen_q_learning: the least that tau * log-policy counts for."""

    num_quantile_samples: int = 64
    """implicit_quantile: quantiles drawn for each prediction (N of the paper)."""

    num_target_quantile_samples: int = 64
    """implicit_quantile: quantiles drawn for each target (N' of the paper)."""

    batch_size: int = 32
    """Transitions per update, over all shards."""

    optimizer: Literal["adam", "rmsprop"] = "adam"
    """adam: Kingma and Ba 2015; rmsprop: centred, as in Mnih et al. 2015."""

    learning_rate: float = 2.5e-4
    """Step size of the optimizer."""

    learning_rate_final: float = 0.0
    """Where the learning rate ends, see learning_rate_anneal_updates."""

    learning_rate_anneal_updates: int | None = None
    """Updates over which the learning rate goes linearly to learning_rate_final. None: it stays."""

    learning_rate_hold_updates: int = 0
    """Updates before it begins to go there."""

    optimizer_epsilon: float = 1.5e-4
    """Added to the denominator of the optimizer."""

    rmsprop_decay: float = 0.95
    """rmsprop: decay of the running moments."""

    max_grad_norm: float | None = 10.0
    """Gradients are scaled down to this global norm. None: off."""

    target_period_updates: int | None = 1_000
    """Updates between two hard copies to the target network. None: soft updates, see target_soft_rate."""

    target_soft_rate: float | None = None
    """At every update target += rate * (online - target). None: hard copies, see target_period_updates."""

    publish_params: Literal["online", "target"] = "online"
    """Which network actors and evaluator play with. target: with target_soft_rate, an average of the last 1 / rate updates, which
    is steadier than any of them (as in D'Oro et al. 2023, SR-SPR)."""

    importance_exponent: float = 0.4
    """beta of Schaul et al. 2016. It has no effect where all items are equally probable."""

    importance_anneal_updates: int | None = None
    """Updates over which beta rises linearly from importance_exponent to 1. None: it stays (Ape-X)."""

    priority_floor: float = 1e-3
    """Added to abs(td_error), so that every transition can be drawn again."""

    random_shift_pixels: int = 0
    """s_tm1 is shifted at random by up to so many pixels, up or down and left or right (Yarats et al. 2021, DrQ, which has 4); s_t
    never, so that targets are made of what was seen (the idea of SVEA, Hansen et al. 2021). 0: off."""

    random_shift_fraction: float = 0.5
    """So much of a batch is shifted, where random_shift_pixels is not 0. The rest is learned from as it is."""

    random_shift_anneal_updates: int | None = None
    """Updates over which that fraction rises linearly from 0, as shifts are in the way of learning at first (Ko and Ok 2022, who put
    augmentation off), and nothing is known by heart yet. None: it is the same from the start."""

    prefetch_batches: int = 4
    """Batches held ready by the prefetch threads (one for each spare core, at most 4), and requests under way to each shard."""

    publish_period_updates: int = 50
    """Updates between two publications of parameters."""

    checkpoint_period_seconds: float = 60.0
    """Seconds between two checkpoints; one is also written at the end."""

    checkpoints_kept: int = 3
    """The newest checkpoints that stay on disk."""

    num_threads: int | None = None
    """Threads of the learner's arithmetic on a CPU. None: those that no other role needs, 1 in a serial run."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one, else cpu."""

    node_labels: str | None = None
    """Cluster: labels of the nodes that take learner, shards, params store and evaluator, as actors.node_labels. None: any node."""

    num_devices: int = 1
    """Learner workers, one for each GPU (or, on CPUs, process), that share every batch and average their gradients."""

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the network's matrix products; parameters and losses stay fp32. auto: bf16 for convolutional torsos where the
    device has bf16 instructions, else fp32."""

    memory_format: Literal["auto", "contiguous", "channels_last", "space_to_depth"] = "auto"
    """Of convolutional torsos. space_to_depth: channels last, and the first convolution reads 4x4 blocks of pixels as channels,
    with the same parameters. auto: what docs/benchmarks.md found best for the device."""

    compilation: Literal["auto", "off", "compile", "cuda_graph"] = "auto"
    """Of the update. compile: torch.compile; cuda_graph: the whole update is recorded once and replayed. auto: cuda_graph on a
    GPU, else off."""

    publish_precision: Literal["fp32", "bf16"] = "fp32"
    """Of published parameters: bf16 takes half the bytes on the network; actors and evaluator then act with rounded ones."""

    def __post_init__(self) -> None:
        _require_positive("learner", self, "batch_size", "learning_rate", "optimizer_epsilon", "max_grad_norm")
        parse_labels("learner.node_labels", self.node_labels)
        _require_positive("learner", self, "target_period_updates", "prefetch_batches", "publish_period_updates")
        _require_positive("learner", self, "checkpoint_period_seconds", "checkpoints_kept", "num_threads", "priority_floor")
        _require_positive("learner", self, "entropy_temperature", "num_quantile_samples", "num_target_quantile_samples")
        _require_positive("learner", self, "importance_anneal_updates", "learning_rate_anneal_updates")
        _require(
            self.learning_rate_final >= 0, f"learner.learning_rate_final must not be negative, got {self.learning_rate_final}"
        )
        _require(
            self.learning_rate_hold_updates >= 0,
            f"learner.learning_rate_hold_updates must not be negative, got {self.learning_rate_hold_updates}",
        )
        _require(
            0 <= self.random_shift_pixels <= 42,  # Half a frame.
            f"learner.random_shift_pixels must be in [0, 42], got {self.random_shift_pixels}",
        )
        _require(
            0.0 < self.random_shift_fraction <= 1.0,
            f"learner.random_shift_fraction must be in (0, 1], got {self.random_shift_fraction}",
        )
        _require_positive("learner", self, "random_shift_anneal_updates")
        _require_positive("learner", self, "num_devices")
        _require_fraction("learner", self, "importance_exponent", "target_soft_rate", "rmsprop_decay", "munchausen_coefficient")
        _require(self.munchausen_clip <= 0, f"learner.munchausen_clip must not be positive, got {self.munchausen_clip}")
        _require(
            (self.target_period_updates is None) != (self.target_soft_rate is None),
            "set exactly one of learner.target_period_updates (hard copies) and learner.target_soft_rate (soft updates)",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """The evaluator: its own environments, raw returns, full episodes whatever training does with lives."""

    episodes: int = 10
    """Episodes of an evaluation while training."""

    final_episodes: int = 10
    """Episodes of the evaluation at the end, of the parameters in the last checkpoint."""

    period_seconds: float | None = 60.0
    """Seconds from the end of one evaluation to the start of the next. None, and a serial run: it evaluates at the end only."""

    epsilon: float = 0.0
    """Chance of a random action."""

    num_envs: int = 10
    """Environments stepped together."""

    target_return: float | None = None
    """When an evaluation reaches this mean return, training pauses for the final evaluation; if that holds too, the run
    ends. None: off."""

    def __post_init__(self) -> None:
        _require_positive("evaluation", self, "episodes", "final_episodes", "period_seconds", "num_envs")
        _require_fraction("evaluation", self, "epsilon")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """One whole run."""

    recipe: str
    """Name of the recipe that this configuration came from."""

    env: EnvConfig
    network: NetworkConfig = field(default_factory=NetworkConfig)
    actors: ActorsConfig = field(default_factory=ActorsConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    protocol: ProtocolName | None = None
    """Atari: sets the environment as an evaluation protocol wants it, and refuses flags that contradict it. legacy: no sticky actions,
    no-op starts, the game's own actions (Mnih et al. 2015); machado: sticky actions 0.25, all 18 actions, neither no-op starts nor a
    signal of lost lives (Machado et al. 2018, arXiv:1709.06009). None: the environment is what its own fields say."""

    run_dir: str | None = None
    """Where the run writes; an existing run there is continued. None: runs/RECIPE, with game, protocol and seed where they differ."""

    seed: int = 0
    """Of everything random."""

    serial: bool = False
    """The whole system in one process and one thread: the same seed gives the same bits."""

    max_minutes: float | None = None
    """Wall-clock minutes of this command, start-up included, and the final evaluation as far as the last one tells how long it
    takes. None: no limit."""

    max_updates: int | None = None
    """Updates, over all commands on this run directory, after which it ends. None: no limit."""

    max_env_steps: int | None = None
    """Env steps of the fleet, over all commands on this run directory, after which it ends. None: no limit."""

    log_period_seconds: float = 10.0
    """Seconds between two lines of metrics."""

    object_store_memory: ByteSize = ByteSize(256 * 2**20)
    """Shared memory of Ray's object store on this machine: batches and parameters on their way. A cluster's nodes have their own."""

    address: str | None = None
    """Ray cluster to run on: HOST:PORT of its head, or auto for the one that this machine is a node of. None: a Ray of its own, here."""

    metrics_port: int | None = None
    """TCP port, on loopback, where a local run's metrics are for a Prometheus to scrape (docs/metrics.md). None: nowhere. A cluster's nodes
    have ports of their own for it."""

    def __post_init__(self) -> None:
        _require_positive("run", self, "max_minutes", "max_updates", "max_env_steps", "log_period_seconds")
        _require(self.seed >= 0, f"seed must not be negative, got {self.seed}")
        _require(
            self.address is None
            or self.address == "auto"
            or re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[\w.-]+):\d{1,5}", self.address) is not None,
            f"address {self.address!r}: write HOST:PORT, as 10.0.0.1:6379, or auto; what begins with ray:// or http:// is another door of Ray's: "
            f"run this command on a node of the cluster, or through ray job submit",
        )
        _require(
            not (self.serial and self.address is not None), "a serial run is one process: leave out --address, or --serial"
        )
        _require(
            self.metrics_port is None or 1 <= self.metrics_port <= 65_535,
            f"metrics_port must be in [1, 65535], got {self.metrics_port}",
        )
        _require(
            not (self.serial and self.metrics_port is not None),
            "a serial run has no Ray that exports metrics: leave out --metrics-port (or say --metrics-port None), or --serial",
        )
        _require(
            not (self.address is not None and self.metrics_port is not None),
            "a cluster's nodes export metrics themselves, where ray start --metrics-export-port says: leave out --metrics-port (or say "
            "--metrics-port None), or --address",
        )
        if self.protocol is not None:
            named = self.env.with_protocol(self.protocol)
            for name in ATARI_PROTOCOLS[self.protocol]:
                wanted, given = getattr(named, name), getattr(self.env, name)
                _require(
                    given == wanted,
                    f"protocol {self.protocol} has env.{name} {wanted}, not {given}: leave out that flag, or --protocol",
                )
        _require(
            self.learner.batch_size >= self.replay.num_shards,
            f"learner.batch_size {self.learner.batch_size} is less than replay.num_shards {self.replay.num_shards}",
        )
        _require(
            self.learner.num_devices <= self.replay.num_shards,
            f"learner.num_devices {self.learner.num_devices} needs as many shards, each its own: raise --replay.num-shards",
        )
        _require(
            not self.serial or self.learner.num_devices == 1,
            "a serial run is one process: leave out --learner.num-devices, or --serial",
        )
        _require(
            self.learner.memory_format != "space_to_depth" or self.network.torso in ("dqn2013", "nature"),
            f"learner.memory_format space_to_depth is for the 8x8/4 convolutions of dqn2013 and nature, not for torso {self.network.torso}: use auto",
        )
        categorical = self.network.distribution == "categorical"
        _require(
            not (categorical and self.learner.algorithm == "munchausen_q_learning"),
            "learner.algorithm munchausen_q_learning is for expectations and quantiles, not for network.distribution categorical",
        )
        _require(
            not (self.network.value_rescaling and self.learner.algorithm == "munchausen_q_learning"),
            "network.value_rescaling and learner.algorithm munchausen_q_learning cannot be combined: their targets differ",
        )
        _require(
            self.network.torso == "mlp" or self.env.is_atari,
            f"network.torso {self.network.torso} needs an Atari game; for {self.env.game} use --network.torso mlp",
        )
        _require(
            not self.learner.random_shift_pixels or self.env.is_atari,
            f"learner.random_shift_pixels shifts frames of Atari games, and {self.env.game} has none: leave it out",
        )
        share = self.replay.capacity // self.replay.num_shards
        longest = self.actors.chunk_transitions + self.actors.n_step
        _require(
            share >= longest,
            f"replay.capacity gives each shard {share} transitions, but a chunk has up to {longest}: raise --replay.capacity, or "
            f"lower --actors.chunk-transitions or --replay.num-shards",
        )
        given, needed = self.replay.limiter_buffer_samples, self.min_limiter_buffer_samples
        _require(
            given is None or given >= needed,
            f"replay.limiter_buffer_samples {given} holds less than a batch, or than the samples that one chunk pays for: it must be at least {needed}",
        )

    @property
    def min_limiter_buffer_samples(self) -> int:
        """The least buffer with which neither side can wait for the other for ever: one batch, and one chunk."""
        per_insert = self.replay.samples_per_insert or 0.0
        return max(self.learner.batch_size, math.ceil(per_insert * self.actors.chunk_transitions) * self.replay.num_shards)

    @property
    def limiter_buffer_samples(self) -> int:
        """The buffer in use: the given one, or what holds a batch and every chunk that may be in flight."""
        if self.replay.limiter_buffer_samples is not None:
            return self.replay.limiter_buffer_samples
        num_shards = self.replay.num_shards
        num_chunks = -(-self.actors.max_in_flight_chunks // num_shards) * num_shards
        in_flight = self.actors.num_actors * num_chunks * self.actors.chunk_transitions
        return max(self.min_limiter_buffer_samples, math.ceil((self.replay.samples_per_insert or 0.0) * in_flight))


def as_dict(config: object) -> dict[str, object]:
    """Returns the configuration as nested plain values, as run.json holds it."""
    assert dataclasses.is_dataclass(config) and not isinstance(config, type)

    def plain(value: object) -> object:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, ByteSize):
            return int(value)
        return list(value) if isinstance(value, tuple) else value

    result = plain(config)
    assert isinstance(result, dict)
    return result


def from_dict(values: dict[str, object]) -> RunConfig:
    """Rebuilds a RunConfig from `as_dict`'s values.

    Raises:
      ValueError: naming a field that this version does not know, lacks, or finds out of range.
    """
    sections = {
        "env": EnvConfig,
        "network": NetworkConfig,
        "actors": ActorsConfig,
        "replay": ReplayConfig,
        "learner": LearnerConfig,
        "evaluation": EvaluationConfig,
        "exploration": ExplorationConfig,
    }

    def build(cls: type, given: dict[str, object], where: str) -> object:
        known = {f.name for f in dataclasses.fields(cls)}
        strange = sorted(set(given) - known)
        _require(not strange, f"{where}{strange[0] if strange else ''}: a field that this version does not know")
        arguments: dict[str, object] = {}
        for name, value in given.items():
            if name in sections:
                _require(isinstance(value, dict), f"{where}{name}: expected a section")
                assert isinstance(value, dict)
                arguments[name] = build(sections[name], value, f"{where}{name}.")
            elif name in ("memory", "object_store_memory") and isinstance(value, int):
                arguments[name] = ByteSize(value)
            else:
                arguments[name] = tuple(value) if isinstance(value, list) else value
        for f in dataclasses.fields(cls):
            has_default = f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
            _require(f.name in arguments or has_default, f"{where}{f.name}: missing")
        return cls(**arguments)

    result = build(RunConfig, values, "")
    assert isinstance(result, RunConfig)
    return result
