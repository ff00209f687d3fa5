"""The command line. A user's mistake ends in one line and exit status 2.

qfleet train RECIPE [flags]      qfleet resume RUN [flags]          qfleet evaluate RUN [flags]
qfleet plan RECIPE [flags]       qfleet check-env ENV [flags]       qfleet bench replay|learner [flags]
qfleet report RUN [RUN ...] [flags]  qfleet doctor [RUN] [flags]
qfleet scale RECIPE [flags] [-- flags of train]
"""

from __future__ import annotations

import contextlib
import difflib
import io
import itertools
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from common.config import ATARI_PROTOCOLS, ByteSize, ProtocolName, RunConfig
from common.errors import UserError

_USAGE = """usage: qfleet train RECIPE [flags]     train; the same command on the same run directory continues it
       qfleet resume RUN [flags]       continue a run with its own settings; --from 0000012000 goes on from that checkpoint
       qfleet evaluate RUN [flags]     play a run's last checkpoint: --protocol, --episodes, --json, --video
       qfleet report RUN ... [flags]   one page about one or more runs: scores with intervals, curves, how they ran; --out
       qfleet doctor [RUN] [flags]     where the time of a run goes, what holds it back, and what to change; --minutes
       qfleet adjust RUN [flags]       change the limiter of a run that is under way: --samples-per-insert, --min-size
       qfleet plan RECIPE [flags]      print what a run will take of this machine, and what to change where it does not fit
       qfleet check-env ENV [flags]    say what is wrong with an environment: MyEnv-v0, module:MyEnv-v0, pong
       qfleet bench replay [flags]     measure the replay shards alone: --game, --topology, --json
       qfleet bench learner [flags]    measure the learner's update, bare and in a running system: --networks, --device, --json
       qfleet scale RECIPE [flags]     throughput over actors, shards, batch ..., and what limits it: --actors 1 2 4 --rounds 3 [-- flags of train]
       qfleet COMMAND ... --help       every flag with its meaning, unit and default

recipes: {recipes}"""

_SUBJECTS = {
    "train": "a recipe",
    "plan": "a recipe",
    "scale": "a recipe",
    "resume": "a run directory",
    "evaluate": "a run directory",
    "report": "a run directory",
    "doctor": "a run directory",
    "adjust": "a run directory",
    "check-env": "an environment",
    "bench": "what to measure (replay, learner)",
}

_KEPT = {
    "train": "; checkpoints that were written before are kept",
    "resume": "; checkpoints that were written before are kept",
    "scale": "; what was measured before is kept",
}
"""What a command leaves that someone ends at once."""

_REGISTRY = ConstructorRegistry()
T = TypeVar("T")


@_REGISTRY.primitive_rule
def _byte_size(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[ByteSize] | None:
    """Lets flags say 512MiB."""
    if info.type is not ByteSize:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="SIZE",
        instance_from_str=lambda words: ByteSize.parse(words[0]),
        is_instance=lambda value: isinstance(value, ByteSize),
        str_from_instance=lambda value: [str(value)],
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateFlags:
    """Plays the newest checkpoint of a run: environments of its own, raw returns, full episodes."""

    protocol: ProtocolName | None = None
    """Atari: the protocol to evaluate under, whatever the run was trained with. None: the run's own environment."""
    episodes: int = 10
    """Episodes to play."""
    epsilon: float | None = None
    """Chance of a random action. None: as the run's own evaluations."""
    seed: int | None = None
    """Of starts and random actions. None: as the run's final evaluation."""
    json: Path | None = None
    """Where to write the evaluation as JSON."""
    video: Path | None = None
    """Where to write one episode as video (mp4)."""

    def __post_init__(self) -> None:
        if self.episodes < 1:
            raise ValueError(f"--episodes must be positive, got {self.episodes}")
        if self.epsilon is not None and not 0 <= self.epsilon <= 1:
            raise ValueError(f"--epsilon must be in [0, 1], got {self.epsilon}")


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckEnvFlags:
    """Plays an environment alone and through actor and replay, and says what is wrong with it."""

    n_step: int = 3
    """Steps of a transition."""
    frame_stack: int | None = None
    """Observations stacked to one network input. None: 4 for an Atari game, else 1."""
    steps: int = 2_000
    """Steps to play with each environment."""
    num_envs: int = 2
    """Environments stepped together."""
    seed: int = 0
    """Of the environments and of the random actions."""

    def __post_init__(self) -> None:
        for name in ("n_step", "frame_stack", "num_envs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be positive, got {value}")
        if self.steps < 100:
            raise ValueError(f"--steps must be at least 100, got {self.steps}")
        if self.seed < 0:
            raise ValueError(f"--seed must not be negative, got {self.seed}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(words)
    except UserError as error:
        print(f"qfleet: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # Whoever read what it prints has gone (`| head`).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(f"qfleet: ended at once{_KEPT.get(next(iter(words), ''), '')}", file=sys.stderr)
        return 130


def _dispatch(words: list[str]) -> int:
    from deploy.recipes import RECIPES

    usage = _USAGE.format(recipes=", ".join(RECIPES))
    if not words or words[0] in ("-h", "--help"):
        print(usage)
        return 0 if words else 2
    command, *rest = words
    if command not in _SUBJECTS:
        raise UserError(f"unknown command {command!r}{_nearest(command, list(_SUBJECTS))}; qfleet --help lists them")
    if command == "doctor":
        from deploy.doctor import DoctorFlags, doctor, newest_run

        named = rest[:1] if rest and not rest[0].startswith("-") else []
        flags_of_doctor = _parse(DoctorFlags, DoctorFlags(), rest[len(named) :], "qfleet doctor [RUN]")
        return doctor(Path(named[0]) if named else newest_run(), flags_of_doctor)
    if not rest or rest[0].startswith("-"):
        if rest and rest[0] in ("-h", "--help"):
            print(usage)
            return 0
        raise UserError(f"qfleet {command} needs {_SUBJECTS[command]} first; qfleet --help lists them")
    subject, *flags = rest
    if command == "bench":
        if subject == "learner":
            from deploy.bench_learner import BenchLearnerFlags, bench_learner

            return bench_learner(_parse(BenchLearnerFlags, BenchLearnerFlags(), flags, "qfleet bench learner"))
        if subject != "replay":
            raise UserError(f"unknown benchmark {subject!r}; there are replay and learner")
        from deploy.bench import BenchReplayFlags, bench_replay

        return bench_replay(_parse(BenchReplayFlags, BenchReplayFlags(), flags, "qfleet bench replay"))
    if command == "report":
        from deploy.report import ReportFlags, report

        more = list(itertools.takewhile(lambda word: not word.startswith("-"), flags))
        chosen_report = _parse(ReportFlags, ReportFlags(), flags[len(more) :], "qfleet report RUN")
        return report([Path(word) for word in [subject, *more]], chosen_report)
    if command == "adjust":
        from deploy.adjust import AdjustFlags, adjust

        return adjust(Path(subject), _parse(AdjustFlags, AdjustFlags(), flags, f"qfleet adjust {subject}"))
    if command == "evaluate":
        from deploy.evaluate import evaluate

        chosen = _parse(EvaluateFlags, EvaluateFlags(), flags, "qfleet evaluate RUN")
        return evaluate(
            Path(subject),
            protocol=chosen.protocol,
            episodes=chosen.episodes,
            epsilon=chosen.epsilon,
            seed=chosen.seed,
            json_path=chosen.json,
            video=chosen.video,
        )
    if command == "check-env":
        from deploy.check_env import check_env

        asked = _parse(CheckEnvFlags, CheckEnvFlags(), flags, "qfleet check-env ENV")
        return check_env(
            subject,
            n_step=asked.n_step,
            frame_stack=asked.frame_stack,
            steps=asked.steps,
            num_envs=asked.num_envs,
            seed=asked.seed,
        )
    from deploy import run_dir
    from deploy.train import resume, train

    if command == "resume":
        words, checkpoint = _without_from(flags)
        return resume(Path(subject), lambda config: _run_config(config, words, f"qfleet resume {subject}"), checkpoint)
    if subject not in RECIPES:
        raise UserError(f"unknown recipe {subject!r}{_nearest(subject, list(RECIPES))}; there are {', '.join(RECIPES)}")
    recipe = RECIPES[subject]()
    if command == "scale":
        from deploy.scale import ScaleFlags, scale

        words, of_train = _split(flags)
        chosen_sweep = _parse(ScaleFlags, ScaleFlags(), words, f"qfleet scale {subject}")
        return scale(_run_config(recipe, of_train, f"qfleet train {subject}"), of_train, chosen_sweep)
    config = _run_config(recipe, flags, f"qfleet {command} {subject}")
    if command == "plan":
        from deploy.plan import print_plan

        return print_plan(config)
    path = Path(config.run_dir) if config.run_dir is not None else run_dir.default_path(config, recipe.env)
    return train(config, path)


def _split(flags: list[str]) -> tuple[list[str], list[str]]:
    """Returns the words before -- and those after it."""
    at = flags.index("--") if "--" in flags else len(flags)
    return flags[:at], flags[at + 1 :]


def _without_from(flags: list[str]) -> tuple[list[str], str | None]:
    """Returns the flags without --from, and what it names: it is no setting of a run."""
    words, name = [], None
    rest = iter(flags)
    for word in rest:
        if word == "--from" or word.startswith("--from="):
            name = word.partition("=")[2] or next(rest, "")
            if not name or name.startswith("-"):
                raise UserError("--from: which checkpoint? Give a name as in RUN/checkpoints, --from 0000012000")
        else:
            words.append(word)
    return words, name


def _run_config(default: RunConfig, flags: list[str], program: str) -> RunConfig:
    config = _parse(RunConfig, _with_named_protocol(default, flags), flags, program)
    if config.recipe != default.recipe:
        raise UserError("--recipe names the recipe and cannot be set: give another recipe to qfleet train")
    return config


def _with_named_protocol(default: RunConfig, flags: list[str]) -> RunConfig:
    """Lets --protocol set the environment before other flags do: what then differs from the protocol contradicts it."""
    named = re.findall(r"(?:^| )--protocol[ =](\S+)", " ".join(flags))
    if not named or named[-1] not in ATARI_PROTOCOLS:
        return default
    return replace(default, protocol=None, env=replace(default.env, **ATARI_PROTOCOLS[named[-1]]))


def _parse(kind: type[T], default: T, flags: list[str], program: str) -> T:
    """Parses flags over a default; what is wrong with them becomes one line."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(kind, default=default, args=flags, prog=program, registry=_REGISTRY)
    except SystemExit as end:
        if not end.code:
            raise
        raise UserError(f"{_condense(errors.getvalue())}; {program} --help lists the flags") from None


def _condense(box: str) -> str:
    """Makes one line of tyro's box: its message, and the nearest flag where it names one."""
    lines = [line.strip("│╭╮╰╯|+ ") for line in box.splitlines()]
    rules = [i for i, line in enumerate(lines) if not re.search(r"[^─-]", line) or line.startswith(("─", "- ", "--- "))]
    message = " ".join(lines[rules[0] + 1 : rules[1]]) if len(rules) > 1 else " ".join(lines)
    message = re.sub(r"^Error parsing ", "", message)
    message = re.sub(
        r"^(RunConfig|\w+Flags|\w+(?=: \w+\.\w)): ",
        "",
        message,
    )
    suggestions = re.findall(r"^--[a-z][\w.-]*", "\n".join(lines[rules[1] :] if len(rules) > 1 else []), re.MULTILINE)
    near = f": did you mean {suggestions[0]}" if "Perhaps" in box and suggestions else ""
    return message.rstrip("?.") + near


def _nearest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, 1, 0.4)
    return f": did you mean {close[0]!r}?" if close else ""


def entry_point() -> None:
    """The `qfleet` script."""
    sys.exit(main())
