"""`qfleet bench learner`: how fast the learner's update is, bare and in a running system, and what of the device that uses.

The bare update is the product's own on batches that lie ready (`deploy/bench_update.py`); the running system has a learner, a shard,
a store and an actor on Ray, each the product's (`deploy/bench_live.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from common.config import EnvConfig, LearnerConfig, NetworkConfig, RunConfig
from common.errors import UserError
from deploy import roles
from deploy.bench import check_json, write_json
from deploy.plan import plan_cpus
from deploy.recipes import RECIPES
from deploy.run_dir import num_cpus

if TYPE_CHECKING:
    from rich.console import Console

    from deploy.bench_update import Problem

TORSOS = {
    "dqn2013": NetworkConfig(torso="dqn2013", hidden_sizes=(256,)),
    "nature": NetworkConfig(torso="nature", hidden_sizes=(512,)),
    "impala": NetworkConfig(torso="impala", hidden_sizes=(256,)),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchLearnerFlags:
    """Measures the learner: its bare update on batches that lie ready, and beside actor and shard in a running system.

    Units: an update is one optimizer step; samples are updates times the batch; a FLOP is one addition or one multiplication of a
    matrix product or a convolution; MFU is the FLOP/s of the updates over the bf16 FLOP/s of large matrix products, measured in
    between with as many threads.
    """

    networks: tuple[str, ...] = ("dqn2013", "nature")
    """dqn2013, nature, impala, or names of recipes: those bring their own network, losses and game."""
    precisions: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    """Of the matrix products."""
    batch_sizes: tuple[int, ...] | None = None
    """Transitions of an update. None: 128; 512 on a GPU."""
    algorithm: Literal["q_learning", "double_q_learning", "munchausen_q_learning"] | None = None
    """How the target values the destination. None: double_q_learning, or what the recipe says."""
    dueling: bool = False
    """State value and advantages in two heads."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one, else cpu."""
    threads: int | None = None
    """Of the learner's arithmetic on a CPU. None: what `qfleet plan` gives it beside one shard and one actor."""
    rounds: int = 7
    """In each of which every row of the bare update has its turn."""
    seconds: float = 1.0
    """Of one row's turn in a round; its preparation of batches has a fifth of it on top."""
    live_seconds: float = 15.0
    """Of the running system, after its replay has its minimum. 0: none."""
    game: str = "pong"
    """ALE game that the running system plays, as its ROM is named. A recipe plays its own."""
    samples_per_insert: float | Literal["auto"] | None = "auto"
    """Running system: samples a transition to which the actor is held. auto: 8 on a CPU, None on a GPU, which outruns one actor. None:
    no ratio, so the actor plays as fast as it can and takes a core."""
    seed: int = 0
    """Of the running system's game and draws."""
    json: Path | None = None
    """Where to write the figures as JSON."""

    def __post_init__(self) -> None:
        for name in ("rounds", "seconds", "threads", "samples_per_insert"):
            value = getattr(self, name)
            if value is not None and value != "auto" and value <= 0:
                raise ValueError(f"--{name.replace('_', '-')} must be positive, got {value}")
        if self.live_seconds < 0 or self.seed < 0:
            raise ValueError("--live-seconds and --seed must not be negative")
        if any(size < 1 for size in self.batch_sizes or ()):
            raise ValueError(f"--batch-sizes must be positive, got {self.batch_sizes}")
        if not (self.networks and self.precisions) or self.batch_sizes == ():
            raise ValueError("--networks, --precisions and --batch-sizes must name at least one each")


def bench_learner(flags: BenchLearnerFlags) -> int:
    """Runs the benchmark, prints its figures and writes them as JSON; returns the exit status."""
    from rich.console import Console

    check_json(flags.json)
    runs = [run_config(name, flags) for name in flags.networks]  # Before anything heavy is imported.
    threads = flags.threads or plan_cpus(runs[0], num_cpus()).learner_threads
    roles.limit_threads(threads)
    from deploy.bench_update import measure_updates

    console = Console(width=180, highlight=False)
    problems = make_problems(flags, runs)
    device = problems[0].device
    console.print(
        f"on {device_name(device)}, {threads} thread{'s' if threads > 1 else ''}; median (least to greatest) of {flags.rounds} rounds"
    )
    figures = measure_updates(problems, rounds=flags.rounds, seconds=flags.seconds)
    _show_updates(console, figures)
    about = {
        "device": device.type,
        "device_name": device_name(device),
        "threads": threads,
        "rounds": flags.rounds,
        "seconds": flags.seconds,
        "live_seconds": flags.live_seconds,
    }
    if flags.json is not None:  # And again below: a Ray that does not start costs nothing that was measured before.
        write_json(flags.json, about | figures | {"live": []})
    figures["live"] = _measure_live(flags, problems, dict(zip(flags.networks, runs, strict=True)), threads, figures)
    _show_live(console, figures["live"])
    if flags.json is not None:
        write_json(flags.json, about | figures)
    return 0


def run_config(name: str, flags: BenchLearnerFlags) -> RunConfig:
    """Returns the run that a name of `--networks` means: one actor and one shard.

    Raises:
      UserError: for a name that is neither a network nor a recipe.
    """
    if name in TORSOS:
        env = EnvConfig(game=flags.game, frame_stack=4)
        base = RunConfig(recipe="bench", env=env, network=TORSOS[name], learner=LearnerConfig())
    elif name in RECIPES:
        base = RECIPES[name]()
    else:
        raise UserError(f"--networks {name}: there are {', '.join([*TORSOS, *RECIPES])}")
    learner = replace(base.learner, device=flags.device, num_devices=1, algorithm=flags.algorithm or base.learner.algorithm)
    network = replace(base.network, dueling=flags.dueling or base.network.dueling)
    try:
        return replace(
            base,
            network=network,
            learner=learner,
            actors=replace(base.actors, num_actors=1, num_envs=8),
            replay=replace(base.replay, num_shards=1),
            seed=flags.seed,
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def make_problems(flags: BenchLearnerFlags, runs: Sequence[RunConfig]) -> list[Problem]:
    """Returns the combinations of networks, batch sizes and precisions."""
    import torch

    from actors.environments import check_atari_game, probe
    from deploy.bench_update import Problem

    if flags.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU here; use --device auto or cpu")
    device = torch.device("cuda" if flags.device != "cpu" and torch.cuda.is_available() else "cpu")
    check_atari_game(flags.game)
    sizes = flags.batch_sizes or ((512,) if device.type == "cuda" else (128,))
    return [
        Problem(
            name=name,
            network=run.network,
            learner=replace(run.learner, batch_size=size, precision=precision),
            spec=probe(run.env),
            device=device,
        )
        for name, run in zip(flags.networks, runs, strict=True)
        for size in sizes
        for precision in flags.precisions
    ]


def device_name(device: Any) -> str:
    """Returns the model of the GPU or the processor."""
    import torch

    from deploy.run_dir import hardware

    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(hardware()["cpu"])


def _measure_live(
    flags: BenchLearnerFlags, problems: Sequence[Problem], runs: dict[str, RunConfig], threads: int, bare: dict[str, Any]
) -> list[dict[str, Any]]:
    """Returns a row for each network and batch size, in the precision that a run would pick, where it was measured bare."""
    if flags.live_seconds == 0:
        return []
    from deploy.bench_live import measure_live
    from learner.update import pick_precision

    chosen: dict[tuple[str, int], Problem] = {}
    for problem in problems:
        picked = pick_precision("auto", problem.device, uses_convolutions=problem.network.torso != "mlp")
        is_picked = problem.learner.precision == ("bf16" if "bfloat16" in str(picked) else "fp32")
        if is_picked or (problem.name, problem.batch_size) not in chosen:
            chosen[problem.name, problem.batch_size] = problem
    rows = []
    on_gpu = problems[0].device.type == "cuda"
    ratio = (None if on_gpu else 8.0) if flags.samples_per_insert == "auto" else flags.samples_per_insert
    configs = [live_config(runs[problem.name], problem, threads, ratio) for problem in chosen.values()]
    measured = measure_live(configs, [problem.spec for problem in chosen.values()], seconds=flags.live_seconds, on_gpu=on_gpu)
    for problem, live in zip(chosen.values(), measured, strict=True):
        about = {"network": problem.name, "precision": problem.learner.precision, "batch_size": problem.batch_size}
        row = next(row for row in bare["updates"] if row["kind"] == "qfleet" and about.items() <= row.items())
        ratio_to_bare = live["samples_per_second"] / row["samples_per_second"]["median"]
        # Processor time of an update, bare over live; with more threads that of the others is not told from Ray's.
        cpu_live = live["cpu_seconds_per_second"]["learner_updates"] / max(live["updates_per_second"], 1e-9)
        cpu_ratio = row["cpu_seconds_per_update"] / max(cpu_live, 1e-9) if threads == 1 and not on_gpu else None
        ratios = {"ratio_to_bare": ratio_to_bare, "cpu_ratio_to_bare": cpu_ratio, "mfu": row["mfu"] * ratio_to_bare}
        rows.append(about | live | ratios)
    return rows


def live_config(run: RunConfig, problem: Problem, threads: int, samples_per_insert: float | None) -> RunConfig:
    """Returns the run with a small minimum of the replay, random play and a limiter that does not hold the learner."""
    exploration = replace(run.actors.exploration, kind="linear", initial=1.0, final=1.0)
    replay = replace(
        run.replay,
        min_size=min(1_000, run.replay.capacity),
        samples_per_insert=samples_per_insert,
        limiter_buffer_samples=None,
    )
    return replace(
        run,
        actors=replace(run.actors, exploration=exploration),
        replay=replay,
        learner=replace(problem.learner, num_threads=threads),
    )


def _show_updates(console: Console, figures: dict[str, Any]) -> None:
    from rich.table import Table

    peaks = ", ".join(f"{name} {row['flops_per_second']['median'] / 1e9:,.0f}" for name, row in figures["matrix"].items())
    console.print(f"matrix products: {peaks} GFLOP/s")
    table = Table(title="bare update", box=None, title_justify="left", pad_edge=False)
    for title in (
        "network",
        "",
        "batch",
        "updates/s",
        "samples/s",
        "CPU ms",
        "GFLOP",
        "GFLOP/s",
        "MFU",
        "prepare ms",
        "x plain",
        "x prepared",
        "by CPU time: MFU",
        "x plain",
        "x prepared",
    ):
        table.add_column(title, justify="left" if title in ("network", "") else "right", no_wrap=True)
    for row in figures["updates"]:
        names = [f"{by}ratio_to_{kind}" for by in ("", "cpu_") for kind in ("plain", "plain_prepared")]
        ratios = [f"{ratio['median']:.2f}" if (ratio := row.get(name)) else "" for name in names]
        preparation = row["preparation_seconds"]
        table.add_row(
            row["network"],
            f"{row['kind']} {row['precision']}",
            str(row["batch_size"]),
            _spread(row["updates_per_second"], 1),
            f"{row['samples_per_second']['median']:,.0f}",
            f"{1e3 * row['cpu_seconds_per_update']:.1f}",
            f"{row['flops_per_update'] / 1e9:.2f}",
            f"{row['flops_per_second']['median'] / 1e9:,.0f}",
            f"{row['mfu']:.0%}",
            f"{1e3 * preparation['median']:.2f}" if preparation else "",
            *ratios[:2],
            f"{row['mfu_by_cpu']:.0%}" if row["mfu_by_cpu"] is not None else "",
            *ratios[2:],
        )
    console.print(table)


def _show_live(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        console.print(
            f"\nrunning system, {row['network']} {row['precision']}, batch {row['batch_size']}: {row['samples_per_second']:,.0f} samples/s, "
            f"{row['ratio_to_bare']:.2f} of the bare update, MFU {row['mfu']:.0%}; {row['env_steps_per_second']:,.0f} env steps/s; "
            f"learner busy {row['busy_fraction']:.0%}, waiting {row['waiting_fraction']:.0%}, held by the limiter "
            f"{row['held_fraction']:.0%}; ready batches {row['ready_batches']:.1f}"
        )
        cpu = ", ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in row["cpu_seconds_per_second"].items())
        by_cpu = (
            f"; by CPU time an update is at {row['cpu_ratio_to_bare']:.2f} of the bare one" if row["cpu_ratio_to_bare"] else ""
        )
        console.print(f"  CPU seconds a second: {cpu}{by_cpu}")


def _spread(spread: dict[str, float], digits: int) -> str:
    low, middle, high = (f"{spread[name]:,.{digits}f}" for name in ("min", "median", "max"))
    return f"{middle} ({low} to {high})"
