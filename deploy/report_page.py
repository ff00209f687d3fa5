"""The page of a report: everything that `report_page.html.jinja` shows, made ready, and the page itself.

The template escapes whatever it is given. The page asks for nothing: styles, figures and videos are in it, and no script.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from deploy import report_figures as figures
from deploy.human_scores import reference_scores
from deploy.recipes import RECIPES
from deploy.report_figures import MarkPanel, Panel, compact, plain
from deploy.report_runs import CARD_FIELDS, NOT_RECORDED, Card, Group, Run, differing, flat_config, group_notes, number
from deploy.report_scores import FEW_SEEDS, AggregateRow, ScoreRow
from deploy.run_dir import versions

_TEMPLATE = "report_page.html.jinja"
_EVENT_COLUMNS = ("run", "state", "fault", "ledger", "refused", "lost", "dropped batches", "stale priorities", "notes")


@dataclass(frozen=True, kw_only=True, slots=True)
class Video:
    """One episode of a run of a group; without a `uri` the note says why."""

    game: str
    letter: str
    index: int
    uri: str | None
    poster: str | None
    """A picture of it, which the page shows before it is played; None where it cannot be decoded."""
    note: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """All that a report holds, before it is laid out."""

    groups: list[Group]
    warnings: list[str]
    notes: list[str]
    scores: list[ScoreRow]
    aggregates: list[AggregateRow]
    learning: list[Panel]
    throughput: list[Panel]
    videos: list[Video]
    files: str
    """Name of the directory beside the page."""
    made: str
    """When."""

    @property
    def games(self) -> list[str]:
        return list(dict.fromkeys(group.game for group in self.groups))

    @property
    def runs(self) -> list[Run]:
        return [run for group in self.groups for run in group.runs]


def render(report: Report) -> str:
    """Returns the page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(plain=plain, score=_score, game=game_title)
    group_rows = [row for row in report.scores if not row.is_file]
    return environment.get_template(_TEMPLATE).render(
        report=report,
        title=_title(report),
        headlines=[
            _headline(group, row, _anchor(report, group.game)) for group, row in zip(report.groups, group_rows, strict=True)
        ],
        aggregate_panels=_aggregate_panels(report.aggregates),
        aggregate_notes=_aggregate_notes(report.aggregates),
        sections=[_section(report, game) for game in report.games],
        cards=_cards(report.groups),
        event_columns=_EVENT_COLUMNS,
        events=[_event(run) for run in report.runs],
        methods=_methods(report.groups),
        configurations=[_configuration(group) for group in report.groups],
        width=figures.WIDTH,
        marks_width=figures.MARKS_WIDTH,
        few_seeds=FEW_SEEDS,
        height=figures.HEIGHT,
        versions=versions(),
        is_mixed=len(report.groups) > 1,
    )


def references(game: str) -> list[tuple[str, float]]:
    """Returns the returns to compare with, where the table has the game."""
    known = reference_scores().get(game)
    return [("random", known.random), ("human", known.human)] if known else []


def interval_text(low: float | None, high: float | None, num_runs: int) -> str:
    """Says what is known of the spread over seeds."""
    if low is None or high is None:
        return "one seed: no interval"
    few = f", of only {num_runs} seeds" if num_runs < FEW_SEEDS else ""
    return f"95\N{NARROW NO-BREAK SPACE}% interval {plain(low)} to {plain(high)}{few}"


def game_title(game: str) -> str:
    return game.replace("_", " ").title() if game in reference_scores() else game


def _title(report: Report) -> str:
    games = [game_title(game) for game in report.games]
    named = ", ".join(games[:3]) + (f" and {len(games) - 3} more games" if len(games) > 3 else "")
    return f"{named}: {_count(len(report.runs), 'run')}"


def _count(amount: int, what: str) -> str:
    return f"{amount} {what}" if amount == 1 else f"{amount} {what}s"


def _anchor(report: Report, game: str) -> str:
    return f"game-{report.games.index(game) + 1}"


def _headline(group: Group, row: ScoreRow, anchor: str) -> dict[str, Any]:
    facts = [("seeds", ", ".join(str(run.config.seed) for run in group.runs))]
    each = " a run" if len(group.runs) > 1 else ""
    for name, values in (
        ("minutes", [run.minutes for run in group.runs]),
        ("env steps", [run.total("env_steps") for run in group.runs]),
        ("frames", [run.total("frames") for run in group.runs]),
        ("gradient samples", [run.total("samples") for run in group.runs]),
    ):
        known = [value for value in values if value is not None]
        facts.append((name + each, compact(float(np.mean(known))) if known else NOT_RECORDED))
    estimate = row.mean_return
    return {
        "group": group,
        "anchor": anchor,
        "value": plain(round(estimate.value, 2)) if estimate else "no evaluation yet",
        "is_number": estimate is not None,
        "caption": "mean return" if group.is_final else "mean return so far: latest evaluation, not final",
        "interval": interval_text(estimate.low, estimate.high, row.num_runs) if estimate else "",
        "episodes": f"{row.episodes} episodes" if row.episodes else "",
        "score": row.score,
        "facts": facts,
        "state": ", ".join(dict.fromkeys(run.state for run in group.runs)),
        "notes": group_notes(group) + [f"{run.name}: {note}" for run in group.runs for note in run.notes],
    }


def _aggregate_panels(rows: Sequence[AggregateRow]) -> list[MarkPanel]:
    if len(rows) < 2 and not any(row.estimates["mean"].low is not None for row in rows):
        return []  # One point in each: the table is enough.
    names = list(rows[0].estimates)
    return [
        figures.draw_marks(
            f"{name[0].upper()}{name[1:]}{', less is better' if name == 'optimality gap' else ''}",
            [(r.letter, r.index, r.estimates[name].value, r.estimates[name].low, r.estimates[name].high) for r in rows],
        )
        for name in names
    ]


def _aggregate_notes(rows: Sequence[AggregateRow]) -> list[str]:
    notes = []
    for row in rows:
        if row.estimates["mean"].low is None:
            notes.append(f"{row.letter}: one seed a game: no interval")
        elif row.num_runs < FEW_SEEDS * row.num_games:
            notes.append(f"{row.letter}: fewer than {FEW_SEEDS} seeds a game: its intervals are too narrow")
        if not row.is_balanced:
            notes.append(f"{row.letter}: games have different numbers of runs; IQM and optimality gap count runs, not games")
    return notes


def _section(report: Report, game: str) -> dict[str, Any]:
    groups = [group for group in report.groups if group.game == game]
    return {
        "game": game,
        "anchor": _anchor(report, game),
        "groups": groups,
        "learning_text": _learning_text(groups),
        "learning": [figures.draw(panel) for panel in report.learning if panel.game == game],
        "throughput": [figures.draw(panel) for panel in report.throughput if panel.game == game],
        "scores": [row for row in report.scores if row.game == game],
        "references": references(game),
        "videos": [video for video in report.videos if video.game == game],
    }


def _learning_text(groups: Sequence[Group]) -> str:
    """Says what the lines of the learning curves are."""
    single = [group for group in groups if len(group.runs) == 1]
    text = "Evaluations, raw returns. "
    if len(single) < len(groups):
        text += "Thick: mean over seeds, as far as all have come; shaded: its 95\N{NARROW NO-BREAK SPACE}% bootstrap interval; thin: each seed. "
    if single:
        who = "One" if len(groups) == 1 else f"{', '.join(group.letter for group in single)}: one"
        text += f"{who} seed{' each' if len(single) > 1 else ''}: no interval."
    return text


def _cards(groups: Sequence[Group]) -> dict[str, Any]:
    """Returns the protocol cards as columns: one a group, one an evaluation file."""
    columns: list[tuple[str, str, list[Card]]] = []
    for group in groups:
        columns.append((group.letter, game_title(group.game), [run.card for run in group.runs]))
        for run in group.runs:
            columns += [(group.letter, f"{run.name}/{evaluation.name}", [evaluation.card]) for evaluation in run.evaluations]
    rows = [(name.replace("_", " "), [_merged(cards, name) for _, _, cards in columns]) for name in CARD_FIELDS]
    return {"columns": [(letter, name) for letter, name, _ in columns], "rows": rows}


def _merged(cards: Sequence[Card], name: str) -> str:
    values = [_card_value(card, name) for card in cards]
    return ", ".join(dict.fromkeys(values))


def _card_value(card: Card, name: str) -> str:
    if name not in card or (name == "commit" and card[name] is None):
        return NOT_RECORDED
    return "none" if card[name] is None and name != "reward_clip" else _value(card[name])


def _event(run: Run) -> list[str]:
    ledger = run.ledger
    lost = ledger.get("lost")
    last = run.rows[-1] if run.rows else {}
    is_balanced = ledger.get("balanced")
    balanced = NOT_RECORDED if is_balanced is None else "balanced" if is_balanced is True else "NOT balanced"
    return [
        run.name,
        run.state,
        run.fault or ("none" if run.summary and not run.is_under_way else NOT_RECORDED),
        balanced,
        _value(ledger.get("refused", NOT_RECORDED)),
        (", ".join(f"{cause}: {_value(count)}" for cause, count in lost.items()) or "0")
        if isinstance(lost, dict)
        else NOT_RECORDED,
        _count_in(last, "learner/dropped_batches"),
        _count_in(last, "shard/stale_priority_updates"),
        "; ".join(run.notes),
    ]


def _count_in(row: dict[str, Any], name: str) -> str:
    value = number(row, name)
    return NOT_RECORDED if value is None else plain(value)


def _methods(groups: Sequence[Group]) -> dict[str, Any]:
    """Returns the settings in which the methods of the report differ."""
    first = {group.index: group for group in reversed(groups)}
    ordered = [first[index] for index in sorted(first)]
    settings = [flat_config(group.runs[0].config) for group in ordered]
    names = [name for name in differing(settings) if name not in ("seed", "run_dir", "env.game")]
    rows = [(name, [_value(values.get(name)) for values in settings]) for name in names]
    return {"groups": ordered, "rows": rows}


def _configuration(group: Group) -> dict[str, Any]:
    """Returns all settings of a group, those that are not the recipe's first."""
    run = group.runs[0]
    settings = flat_config(run.config) | {"seed": ", ".join(str(member.config.seed) for member in group.runs)}
    recipe = RECIPES.get(run.config.recipe)
    usual = flat_config(recipe()) if recipe else {}
    changed = [
        (name, _value(value), _value(usual[name]))
        for name, value in settings.items()
        if name in usual and value != usual[name] and name not in ("seed", "run_dir")
    ]
    hardware = run.info.get("hardware")
    package_versions = run.info.get("versions")
    return {
        "group": group,
        "recipe": run.config.recipe if recipe else None,
        "changed": changed,
        "settings": [(name, _value(value)) for name, value in settings.items() if name != "run_dir"],
        "directories": [str(member.path) for member in group.runs],
        "environment": [
            (name, _value(value))
            for part in (hardware, package_versions)
            if isinstance(part, dict)
            for name, value in part.items()
        ],
    }


def _value(value: Any) -> str:
    """Writes a setting or a count."""
    if value is None:
        return "off"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) >= 1_000 else f"{value:g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_value(item) for item in value) or "none"
    return str(value)


def _score(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}".replace("-", "\N{MINUS SIGN}")
