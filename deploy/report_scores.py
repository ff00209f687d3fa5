"""The tables of scores of a report: a row a group of runs, a row a file of `qfleet evaluate`, aggregates over games."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deploy.aggregates import STATISTICS, Estimate, estimate, mean
from deploy.report_runs import Evaluation, Group, Run

FEW_SEEDS = 5
FINAL, NOT_FINAL = "final evaluation", "latest, not final"


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreRow:
    """Raw returns of one group, or of one evaluation of one run."""

    game: str
    letter: str
    index: int
    name: str
    source: str
    is_file: bool
    """Whether it is of a file that `qfleet evaluate` left."""
    protocol: str
    num_runs: int
    episodes: int
    """Of all runs; 0 where they were not recorded."""
    mean_return: Estimate | None
    """Over runs; None where there is no evaluation yet."""
    median: float | None
    least: float | None
    greatest: float | None
    """Of the runs' mean returns; of the episodes for one run."""
    score: float | None
    """Human-normalized, mean over runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AggregateRow:
    """Human-normalized scores of one method over all of its runs and games that ended."""

    letter: str
    index: int
    label: str
    protocol: str
    num_runs: int
    num_games: int
    estimates: dict[str, Estimate]
    is_balanced: bool
    """Whether every game has as many runs."""


def score_rows(groups: Sequence[Group]) -> list[ScoreRow]:
    """Returns a row a group, each followed by the evaluations that lie in its runs' directories."""
    rows = []
    for group in groups:
        rows.append(_group_row(group))
        rows += [_evaluation_row(group, run, evaluation) for run in group.runs for evaluation in run.evaluations]
    return rows


def aggregate_rows(groups: Sequence[Group]) -> list[AggregateRow]:
    """Returns a row a method. A method has one protocol, so scores of two protocols never meet."""
    methods: dict[int, list[Group]] = {}
    for group in groups:
        if group.is_final and group.scores:
            methods.setdefault(group.index, []).append(group)
    return [_aggregate(members) for _, members in sorted(methods.items())]


def _group_row(group: Group) -> ScoreRow:
    returns = group.returns
    episodes = [value for run in group.scored for value in run.returns]
    spread = returns if len(returns) > 1 else episodes
    return ScoreRow(
        game=group.game,
        letter=group.letter,
        index=group.index,
        name=group.label,
        source=FINAL if group.is_final else NOT_FINAL,
        is_file=False,
        protocol=group.protocol,
        num_runs=len(returns),
        episodes=len(episodes),
        mean_return=estimate([returns], mean, np.random.default_rng(0)) if returns else None,
        median=float(np.median(returns)) if returns else None,
        least=min(spread, default=None),
        greatest=max(spread, default=None),
        score=float(np.mean(group.scores)) if group.scores else None,
    )


def _evaluation_row(group: Group, run: Run, evaluation: Evaluation) -> ScoreRow:
    returns = evaluation.returns
    return ScoreRow(
        game=group.game,
        letter=group.letter,
        index=group.index,
        name=f"{run.name} (seed {run.config.seed})",
        source=evaluation.name,
        is_file=True,
        protocol=str(evaluation.card.get("protocol")),
        num_runs=1,
        episodes=len(returns),
        mean_return=Estimate(value=evaluation.mean_return, low=None, high=None),
        median=float(np.median(returns)) if returns else None,
        least=min(returns, default=None),
        greatest=max(returns, default=None),
        score=evaluation.score,
    )


def _aggregate(groups: Sequence[Group]) -> AggregateRow:
    scores = [group.scores for group in groups]
    return AggregateRow(
        letter=groups[0].letter,
        index=groups[0].index,
        label=groups[0].label,
        protocol=groups[0].protocol,
        num_runs=sum(map(len, scores)),
        num_games=len(groups),
        estimates={name: estimate(scores, statistic, np.random.default_rng(0)) for name, statistic in STATISTICS.items()},
        is_balanced=len(set(map(len, scores))) == 1,
    )


def score_csv(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Returns a row a run and a row an evaluation file."""
    rows = []
    for group in groups:
        for run in group.runs:
            row: dict[str, Any] = {"game": run.game, "method": group.label, "run": run.name, "seed": run.config.seed}
            totals = {name: run.total(name) for name in ("env_steps", "frames", "updates", "samples")}
            minutes = {"minutes": run.minutes, "state": run.state}
            source = FINAL if run.is_final else NOT_FINAL
            result = {"source": source, "protocol": run.card["protocol"], "mean_return": run.mean_return}
            rows.append(row | result | {"human_normalized_score": run.score} | totals | minutes)
            for evaluation in run.evaluations:
                result = {"source": evaluation.name, "protocol": evaluation.card.get("protocol")}
                result |= {"mean_return": evaluation.mean_return, "human_normalized_score": evaluation.score}
                rows.append(row | result | totals | minutes)
    return rows


def aggregate_csv(rows: Sequence[AggregateRow]) -> list[dict[str, Any]]:
    """Returns a row a method and statistic."""
    return [
        {
            "method": row.label,
            "protocol": row.protocol,
            "num_games": row.num_games,
            "num_runs": row.num_runs,
            "statistic": name,
            "value": value.value,
            "low_95": value.low,
            "high_95": value.high,
        }
        for row in rows
        for name, value in row.estimates.items()
    ]
