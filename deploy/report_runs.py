"""What run directories tell a report: each run as it stands, runs that may be pooled, and what must be warned of.

Only run.json must be there and whole. What else is missing or torn is told by a run's `notes`, and the rest is shown.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common import config as configs
from common.config import ByteSize, RunConfig
from deploy import locks, run_dir
from deploy.aggregates import Floats
from deploy.human_scores import human_normalized_score
from deploy.recipes import RECIPES

Row = dict[str, Any]
Card = dict[str, Any]

CARD_FIELDS = (
    "protocol",
    "sticky_action_probability",
    "noop_max",
    "fire_reset",
    "max_episode_frames",
    "frame_skip",
    "action_set",
    "num_actions",
    "life_loss_signal",
    "reward_clip",
    "epsilon",
    "episodes",
    "training_frames",
    "human_scores",
    "commit",
)
_MUST_AGREE = (  # Scores of runs that differ in one of these are not comparable.
    "protocol",
    "sticky_action_probability",
    "noop_max",
    "max_episode_frames",
    "frame_skip",
    "action_set",
    "epsilon",
)
_OF_THE_PROTOCOL = (
    "env.sticky_action_probability",
    "env.noop_max",
    "env.fire_reset",
    "env.life_loss_terminates",
    "env.max_episode_frames",
    "env.frame_skip",
    "env.full_action_set",
)
_NOT_COMPARED = ("env.game", "seed", "run_dir", "protocol")  # The protocol that was played is, not the promise.
_MOST_DIFFERENCES = 3
_MOST_NAMES = 5
NOT_RECORDED = "not recorded"


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What `qfleet evaluate --json` left in a run directory."""

    name: str
    mean_return: float
    returns: list[float]
    score: float | None
    """Human-normalized."""
    card: Card


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One run directory."""

    path: Path
    name: str
    """Its last part, or more of it where two would be alike."""
    identity: str
    config: RunConfig
    info: dict[str, Any]
    """run.json."""
    rows: list[Row]
    """metrics.jsonl."""
    summary: dict[str, Any] | None
    is_under_way: bool
    evaluations: list[Evaluation]
    notes: list[str]

    @property
    def game(self) -> str:
        return self.config.env.game

    @property
    def is_final(self) -> bool:
        """Whether `mean_return` is of the evaluation at the end."""
        return self._final_evaluation is not None

    @property
    def mean_return(self) -> float | None:
        """Of the evaluation at the end; of the latest one where the run has not ended; None where there is none."""
        if self._final_evaluation is not None:
            return number(self._final_evaluation, "mean_return")
        latest = [row for row in self.rows if number(row, "evaluator/return_mean") is not None]
        return number(latest[-1], "evaluator/return_mean") if latest else None

    @property
    def returns(self) -> list[float]:
        """Of each episode of the evaluation at the end."""
        return _finite((self._final_evaluation or {}).get("returns"))

    @property
    def score(self) -> float | None:
        """`mean_return`, human-normalized; None where there is none, or no table has the game."""
        recorded = number(self.summary or {}, "human_normalized_score") if self.is_final else None
        if recorded is not None or self.mean_return is None:
            return recorded
        return human_normalized_score(self.game, self.mean_return)

    @property
    def minutes(self) -> float | None:
        seconds = self.total("total_wall_seconds")
        seconds = self.total("time_seconds") if seconds is None else seconds
        return None if seconds is None else seconds / 60

    @property
    def state(self) -> str:
        if self.is_under_way:
            return "under way"
        if not self.summary:
            return "ended without a summary"
        reason = str(self.summary.get("stopped_by", NOT_RECORDED))
        return reason if reason == "interrupted" else f"ended by {reason}"

    @property
    def fault(self) -> str | None:
        return self.summary.get("fault") if self.summary and not self.is_under_way else None

    @property
    def ledger(self) -> dict[str, Any]:
        ledger = (self.summary or {}).get("ledger")
        return ledger if isinstance(ledger, dict) and not self.is_under_way else {}

    @property
    def card(self) -> Card:
        """The protocol card; what an older summary does not hold is derived from the settings, or lacks."""
        recorded = (self.summary or {}).get("protocol_card")
        evaluation = {name: (self._final_evaluation or {}).get(name) for name in ("protocol", "epsilon", "episodes")}
        derived = _card_of(self.config) | {name: value for name, value in evaluation.items() if value is not None}
        frames = self.total("frames")
        derived |= {} if frames is None else {"training_frames": int(frames)}
        return derived | (recorded if isinstance(recorded, dict) else {})

    def total(self, name: str) -> float | None:
        """A count of the whole run, as far as it has come."""
        if self.summary is not None and not self.is_under_way and number(self.summary, name) is not None:
            return number(self.summary, name)
        known = [number(row, name) for row in self.rows[-1:]]
        return known[0] if known else None

    @property
    def _final_evaluation(self) -> dict[str, Any] | None:
        evaluation = (self.summary or {}).get("evaluation")
        has_return = isinstance(evaluation, dict) and number(evaluation, "mean_return") is not None
        return evaluation if has_return and not self.is_under_way else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Runs of one game that differ in nothing but the seed."""

    game: str
    label: str
    """The recipe, and what tells it from other settings of that recipe in the report."""
    index: int
    """The same for groups whose settings differ in nothing but game and seed: one method, on several games."""
    runs: list[Run]

    @property
    def letter(self) -> str:
        """Stands for the method in figures."""
        return chr(ord("A") + self.index) if self.index < 26 else str(self.index + 1)

    @property
    def protocol(self) -> str:
        return str(self.runs[0].card["protocol"])

    @property
    def is_final(self) -> bool:
        return any(run.is_final for run in self.runs)

    @property
    def scored(self) -> list[Run]:
        """Runs whose return counts: those that have ended, or, where none has, all that were evaluated."""
        ended = [run for run in self.runs if run.is_final]
        return ended or [run for run in self.runs if run.mean_return is not None]

    @property
    def returns(self) -> list[float]:
        return [run.mean_return for run in self.scored if run.mean_return is not None]

    @property
    def scores(self) -> list[float]:
        return [run.score for run in self.scored if run.score is not None]


def read_runs(paths: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """Returns the runs, each once, and a sentence for each path that was left out because its run was there already.

    Raises:
      UserError: where a path is no run directory.
    """
    names = _short_names(paths)
    runs: dict[str, Run] = {}
    left_out = []
    for path in paths:
        run = _read_run(path, names[path])
        if run.identity in runs:
            left_out.append(f"{path} is the same run as {runs[run.identity].path}, or a copy of it: it counts once")
        runs.setdefault(run.identity, run)
    return list(runs.values()), left_out


def _read_run(path: Path, name: str) -> Run:
    info = run_dir.read_run_json(path)
    config = run_dir.read_config(path)
    is_under_way = locks.is_held(path)
    notes: list[str] = []
    rows = _read_rows(path / "metrics.jsonl", notes)
    summary = _read_json(path / "summary.json", notes)
    run = Run(
        path=path,
        name=name,
        identity=info["run"],
        config=config,
        info=info,
        rows=rows,
        summary=summary,
        is_under_way=is_under_way,
        evaluations=_read_evaluations(path, config, notes),
        notes=notes,
    )
    if is_under_way:
        notes.append("under way: its latest evaluation is shown")
    if run.mean_return is None:
        notes.append("no evaluation yet")
    return run


def number(values: Mapping[str, Any], name: str) -> float | None:
    """Returns values[name] where that is a finite number."""
    value = values.get(name)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number and value is not None else None


def ascending(rows: Sequence[Row], name: str) -> list[Row]:
    """Returns the rows over which `name` only rises.

    A run that goes on from a checkpoint counts on from there: rows after that checkpoint, which were made before, are
    passed over.
    """
    kept: list[Row] = []
    least = math.inf
    for row in reversed(rows):
        value = number(row, name)
        if value is not None and value < least:
            kept.append(row)
            least = value
    return kept[::-1]


def evaluations_over(run: Run, axis: str) -> tuple[Floats, Floats]:
    """Returns when the run was evaluated, in `axis` (env_steps, samples or minutes), and the mean returns."""
    samples_at = _samples_by_update(run.rows) if axis == "samples" else None
    points = []
    before: tuple[float | None, float | None] = (None, None)
    for row in run.rows:
        value, version = number(row, "evaluator/return_mean"), number(row, "evaluator/params_version")
        at = _evaluated_at(row, axis, samples_at)
        if value is None or at is None or (version is not None and (value, version) == before):
            continue  # Older runs repeat the latest evaluation in every row.
        before = (value, version)
        points.append({"at": at, "value": value})
    kept = ascending(points, "at")
    return np.array([point["at"] for point in kept]), np.array([point["value"] for point in kept])


def _evaluated_at(row: Row, axis: str, samples_at: tuple[Floats, Floats] | None) -> float | None:
    """Returns when the parameters were taken; rows of older runs tell only when the evaluation ended."""
    if samples_at is not None:
        version = number(row, "evaluator/params_version")
        return None if version is None or not len(samples_at[0]) else float(np.interp(version, *samples_at))
    if axis == "env_steps":
        began = number(row, "evaluator/began_env_steps")
        return number(row, "env_steps") if began is None else began
    began = number(row, "evaluator/began_seconds")
    seconds = number(row, "time_seconds") if began is None else began
    return None if seconds is None else seconds / 60


def _samples_by_update(rows: Sequence[Row]) -> tuple[Floats, Floats]:
    kept = [row for row in ascending(rows, "updates") if number(row, "samples") is not None]
    return np.array([row["updates"] for row in kept], float), np.array([row["samples"] for row in kept], float)


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Returns the runs by game and by all settings but the seed, in the order of the command line, runs by seed."""
    by_settings: dict[tuple[str, str], list[Run]] = {}
    methods: dict[str, dict[str, Any]] = {}
    for run in runs:
        method = _settings(run)
        methods.setdefault(_key(method), method)
        by_settings.setdefault((run.game, _key(method)), []).append(run)
    order = list(methods)
    labels = _labels(list(methods.values()))
    games = dict.fromkeys(run.game for run in runs)
    return [
        Group(
            game=game,
            label=labels[order.index(key)],
            index=order.index(key),
            runs=sorted(by_settings[game, key], key=lambda run: run.config.seed),
        )
        for game in games
        for key in order
        if (game, key) in by_settings
    ]


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the names whose values are not the same in all."""
    names = dict.fromkeys(name for values in settings for name in values)
    return [name for name in names if len({_key(values.get(name)) for values in settings}) > 1]


def flat_config(config: RunConfig) -> dict[str, Any]:
    """Returns {"learner.batch_size": 32, ...}, with sizes as people write them."""

    def flatten(values: dict[str, Any], prefix: str) -> Iterable[tuple[str, Any]]:
        for name, value in values.items():
            if isinstance(value, dict):
                yield from flatten(value, f"{prefix}{name}.")
            else:
                yield prefix + name, str(ByteSize(value)) if name in ("memory", "object_store_memory") else value

    return dict(flatten(configs.as_dict(config), ""))


def protocol_warnings(runs: Sequence[Run]) -> list[str]:
    """Returns what makes scores unsafe to compare: the cards' own warnings, cards that differ, files of another protocol."""
    sentences = []
    for run in runs:
        sentences += [f"{run.name}: {text}" for text in _card_warnings(run.card)]
        for evaluation in run.evaluations:
            where = f"{run.name}/{evaluation.name}"
            sentences += [f"{where}: {text}" for text in _card_warnings(evaluation.card)]
            unlike = [name for name in _MUST_AGREE if _disagree([run.card, evaluation.card], name)]
            if unlike:
                details = "; ".join(f"{name} {evaluation.card.get(name)}, not {run.card.get(name)}" for name in unlike)
                sentences.append(f"{where} is of another protocol than the run's own evaluation: {details}")
    atari = [run for run in runs if run.config.env.is_atari]
    unlike = [name for name in _MUST_AGREE if _disagree([run.card for run in atari], name)]
    if unlike:
        sentences.append(
            f"evaluation protocols are mixed, and scores of different protocols are not comparable and not aggregated together: "
            f"{'; '.join(f'{name} {_who_has_what(atari, name)}' for name in unlike)}"
        )
    return sentences


def run_warnings(run: Run) -> list[str]:
    """Returns what went wrong in a run."""
    sentences = [f"{run.name} ended by a fault: {run.fault}"] if run.fault else []
    if run.ledger.get("balanced") is False:
        sentences.append(f"{run.name}: the ledger is not balanced, transitions are unaccounted for")
    return sentences


def group_notes(group: Group) -> list[str]:
    """Returns what a reader must know of the pooled runs of a group."""
    notes = []
    if group.is_final and len(group.scored) < len(group.runs):
        notes.append(f"{len(group.scored)} of {len(group.runs)} runs have ended; only their returns count")
    for seed, times in Counter(run.config.seed for run in group.runs).items():
        if times > 1:
            notes.append(f"seed {seed} is there {times} times: those runs are not independent")
    for what, values in (
        ("commits", {str(run.card["commit"]) for run in group.runs if run.card.get("commit")}),
        ("package versions", {_key(run.info.get("versions")) for run in group.runs}),
        ("hardware", {_key(run.info.get("hardware")) for run in group.runs}),
        ("reasons to end", {run.state for run in group.runs}),
    ):
        if len(values) > 1:
            named = f" ({', '.join(sorted(values))})" if what in ("commits", "reasons to end") else ""
            notes.append(f"the runs have different {what}{named}")
    return notes


def _settings(run: Run) -> dict[str, Any]:
    """Returns what makes the method: everything but game and seed."""
    values = {name: value for name, value in flat_config(run.config).items() if name not in _NOT_COMPARED}
    return {"protocol": run.card["protocol"]} | values


def _labels(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the recipe of each, followed by what it changes of the recipe, where others of that recipe do not."""
    labels = []
    for values in settings:
        names = differing([other for other in settings if other["recipe"] == values["recipe"]])
        usual = _recipe_settings(str(values["recipe"]))
        names = [name for name in names if name not in usual or usual[name] != values.get(name)]
        if "protocol" in names:
            names = [name for name in names if name not in _OF_THE_PROTOCOL]
        shown = [f"{name.rpartition('.')[2]} {_plain(values.get(name))}" for name in names[:_MOST_DIFFERENCES]]
        shown += [f"and {len(names) - _MOST_DIFFERENCES} more"] if len(names) > _MOST_DIFFERENCES else []
        labels.append(", ".join([str(values["recipe"]), *shown]))
    return [f"{label} ({labels[: i + 1].count(label)})" if labels.count(label) > 1 else label for i, label in enumerate(labels)]


def _recipe_settings(name: str) -> dict[str, Any]:
    recipe = RECIPES.get(name)
    if recipe is None:
        return {}
    config = recipe()
    return {"protocol": config.env.protocol_name} | flat_config(config)


def _plain(value: Any) -> str:
    return "off" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _card_of(config: RunConfig) -> Card:
    """Returns as much of a protocol card as the settings tell."""
    card: Card = {"protocol": config.env.protocol_name, "reward_clip": config.actors.reward_clip}
    card |= {"epsilon": config.evaluation.epsilon, "episodes": config.evaluation.final_episodes, "warnings": []}
    if config.env.is_atari:
        card |= {name: getattr(config.env, name) for name in CARD_FIELDS[1:6]}
        card["action_set"] = "full" if config.env.full_action_set else "minimal"
        card["life_loss_signal"] = config.env.life_loss_terminates
    return card


def _card_warnings(card: Card) -> list[str]:
    warnings = card.get("warnings")
    return [str(text) for text in warnings] if isinstance(warnings, list) else []


def _disagree(cards: Sequence[Card], name: str) -> bool:
    """Whether two cards that both tell `name` differ in it."""
    return len({_key(card[name]) for card in cards if card.get(name) is not None}) > 1


def _who_has_what(runs: Sequence[Run], name: str) -> str:
    holders: dict[str, list[str]] = {}
    for run in runs:
        holders.setdefault(str(run.card.get(name, NOT_RECORDED)), []).append(run.name)
    return ", ".join(f"{value} ({_listed(names)})" for value, names in holders.items())


def _listed(names: Sequence[str]) -> str:
    rest = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {rest} more" if rest > 0 else "")


def _read_rows(file: Path, notes: list[str]) -> list[Row]:
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        notes.append(f"{file.name} cannot be read ({error.strerror}): no curves")
        return []
    rows = [row for line in lines if isinstance(row := _loads(line), dict)]
    if len(rows) < len(lines):
        notes.append(f"{file.name}: {len(lines) - len(rows)} torn lines were passed over")
    return rows


def _read_json(file: Path, notes: list[str]) -> dict[str, Any] | None:
    try:
        value = _loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        notes.append(f"{file.name} cannot be read ({error.strerror})")
        return None
    if not isinstance(value, dict):
        notes.append(f"{file.name} is truncated or altered: it is passed over")
        return None
    return value


def _read_evaluations(path: Path, config: RunConfig, notes: list[str]) -> list[Evaluation]:
    found = []
    for file in sorted(path.glob("evaluation*.json")):
        value = _read_json(file, notes)
        if value is None:
            continue
        mean_return = number(value, "mean_return")
        if mean_return is None:
            notes.append(f"{file.name} is no result of qfleet evaluate: it is passed over")
            continue
        own = _card_of(config)
        protocol = value.get("protocol", own["protocol"])
        card = own if protocol == own["protocol"] else {name: own[name] for name in ("reward_clip",)}
        card |= {name: value[name] for name in ("protocol", "epsilon", "episodes") if name in value}
        card |= value["protocol_card"] if isinstance(value.get("protocol_card"), dict) else {}
        score = number(value, "human_normalized_score")
        found.append(
            Evaluation(
                name=file.name,
                mean_return=mean_return,
                returns=_finite(value.get("returns")),
                score=human_normalized_score(config.env.game, mean_return) if score is None else score,
                card=card,
            )
        )
    return found


def _loads(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:  # UnicodeDecodeError is one.
        return None


def _finite(values: Any) -> list[float]:
    listed = values if isinstance(values, list) else []
    return [value for item in listed if (value := number({"value": item}, "value")) is not None]


def _short_names(paths: Sequence[Path]) -> dict[Path, str]:
    """Returns as few last parts of each path as tell it from the others."""
    parts = {path: path.resolve().parts for path in paths}
    names = {}
    for path, own in parts.items():
        length = 1
        others = {other for other in parts.values() if other != own}
        while length < len(own) and any(other[-length:] == own[-length:] for other in others):
            length += 1
        names[path] = "/".join(own[-length:])
    return names
