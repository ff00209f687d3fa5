"""`qfleet report`: one page about some runs that needs no network, with its figures as PNG and CSV beside it."""

from __future__ import annotations

import base64
import csv
import io
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import ByteSize
from common.errors import UserError
from common.files import write_whole
from deploy import report_figures as figures
from deploy import run_dir
from deploy.report_page import Report, Video, interval_text, references, render
from deploy.report_runs import Group, Run, group_runs, protocol_warnings, read_runs, run_warnings
from deploy.report_scores import aggregate_csv, aggregate_rows, score_csv, score_rows

_MOST_VIDEO_STEPS = 2_700  # Three minutes of an Atari game.


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportFlags:
    """Writes one page about one or more runs: results as the field reports them, and how the runs went."""

    out: Path = Path("report.html")
    """The page. Figures (PNG), numbers (CSV) and videos go into a directory beside it that has its name without .html."""
    video: bool = True
    """Embed an episode of each group of runs: an mp4 of its first run's directory, or one played by its last checkpoint."""
    video_budget: ByteSize = ByteSize(16 * 2**20)
    """Of all videos in the page together; what is beyond it is named and not embedded."""

    def __post_init__(self) -> None:
        if self.out.suffix != ".html":
            raise ValueError(f"--out {self.out}: the name must end in .html")


def report(paths: Sequence[Path], flags: ReportFlags) -> int:
    """Writes the report; returns the exit status.

    Raises:
      UserError: where a path is no run, or nothing can be written; an old report stays as it was then.
    """
    runs, left_out = read_runs(paths)
    files = flags.out.with_suffix("")
    _check_writable(flags.out, files)
    groups = group_runs(runs)
    warnings = protocol_warnings(runs) + [text for run in runs for text in run_warnings(run)]
    for text in warnings:
        print(f"warning: {text}")
    try:
        files.mkdir(exist_ok=True)
        videos = _Videos(flags.video_budget, files) if flags.video else None
        page = _assemble(groups, warnings, left_out, [videos.of(group) for group in groups] if videos else [], files)
        _write_files(page, files)
        write_whole(flags.out, render(page).encode())
    except OSError as error:
        raise UserError(
            f"{error.filename or flags.out}: cannot be written ({error.strerror}); {flags.out} is as it was"
        ) from error
    _print_results(page)
    print(f"{flags.out} is written; figures and numbers are in {files}")
    return 0


def _assemble(groups: list[Group], warnings: list[str], notes: list[str], videos: list[Video], files: Path) -> Report:
    by_game = [[group for group in groups if group.game == game] for game in dict.fromkeys(group.game for group in groups)]
    return Report(
        groups=groups,
        warnings=warnings,
        notes=notes,
        scores=score_rows(groups),
        aggregates=aggregate_rows(groups),
        learning=[panel for members in by_game for panel in figures.learning_panels(members, references(members[0].game))],
        throughput=[panel for members in by_game for panel in figures.throughput_panels(members)],
        videos=videos,
        files=files.name,
        made=time.strftime("%Y-%m-%d %H:%M"),
    )


def _write_files(page: Report, files: Path) -> None:
    """Writes the files beside the page; one that there is nothing for is not left from an older report."""
    contents = {
        "learning_curve.csv": _csv(figures.csv_rows(page.learning)),
        "throughput.csv": _csv(figures.csv_rows(page.throughput)),
        "scores.csv": _csv(score_csv(page.groups)),
        "aggregates.csv": _csv(aggregate_csv(page.aggregates)),
        "learning_curve.png": figures.png(page.learning) if page.learning else b"",
        "throughput.png": figures.png(page.throughput) if page.throughput else b"",
    }
    for name, data in contents.items():
        if data:
            write_whole(files / name, data)
        else:
            (files / name).unlink(missing_ok=True)


def _csv(rows: Sequence[dict[str, Any]]) -> bytes:
    if not rows:
        return b""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def _print_results(page: Report) -> None:
    for row in page.scores:
        if row.mean_return is None:
            print(f"{row.game}  {row.letter} {row.name}: no evaluation yet")
            continue
        spread = interval_text(row.mean_return.low, row.mean_return.high, row.num_runs)
        score = "" if row.score is None else f", human-normalized {row.score:.2f}"
        print(f"{row.game}  {row.letter} {row.name}: mean return {row.mean_return.value:.4g} ({spread}){score}; {row.source}")


def _check_writable(out: Path, files: Path) -> None:
    if out.is_dir() or not out.resolve().parent.is_dir():
        raise UserError(f"--out {out}: cannot be written; name a file in a directory that is there and yours")
    if files.exists() and not files.is_dir():
        raise UserError(f"--out {out}: its files go into {files}, which is no directory; choose another name")
    if (files / "run.json").exists():
        raise UserError(f"--out {out}: its files would go into {files}, which is a run directory; choose another name")


class _Videos:
    """Gives a video of each group, as long as there is room in the page."""

    def __init__(self, budget_bytes: int, files: Path) -> None:
        self._left_bytes = budget_bytes
        self._files = files

    def of(self, group: Group) -> Video:
        from deploy.video import still

        run = group.runs[0]
        uri = poster = None
        try:
            path, note = self._find(group, run)
            data = path.read_bytes()
            if len(data) > self._left_bytes:
                note = f"{path} has {ByteSize(len(data))}, and {ByteSize(self._left_bytes)} are left in this page (--video-budget): not embedded"
            else:
                self._left_bytes -= len(data)
                uri = f"data:video/mp4;base64,{base64.b64encode(data).decode()}"
                picture = still(path)
                poster = None if picture is None else f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}"
        except UserError as error:
            note = f"no video: {error}"
        return Video(game=group.game, letter=group.letter, index=group.index, uri=uri, poster=poster, note=note)

    def _find(self, group: Group, run: Run) -> tuple[Path, str]:
        """Returns a video and what it shows: the newest in the run directory, else one recorded now."""
        found = sorted(run.path.glob("*.mp4"), key=lambda path: path.stat().st_mtime)
        if found:
            return found[-1], f"{found[-1].name}, as it lies in {run.name} (seed {run.config.seed})"
        path = self._files / f"{group.game}-{group.letter}-seed{run.config.seed}.mp4".replace("/", "-").replace(":", "-")
        print(f"recording an episode of {run.name} ...", file=sys.stderr)
        updates, episode_return = _record(run, path)
        who = f"{run.name} (seed {run.config.seed}, update {updates:,}, epsilon {run.config.evaluation.epsilon:g})"
        what = f"An episode, {_MOST_VIDEO_STEPS:,} steps of it at most: return {episode_return:g}."
        return path, f"{what} Played by the last checkpoint of {who}"


def _record(run: Run, path: Path) -> tuple[int, float]:
    """Records an episode of the run's last checkpoint; returns its updates and the return.

    Raises:
      UserError: where there is no checkpoint that can be read.
    """
    import torch

    from actors.environments import probe
    from common.networks import make_network
    from deploy.video import record
    from learner import checkpoint as checkpoints

    newest = run_dir.newest_checkpoint_path(run.path)
    if newest is None:
        raise UserError(f"{run.path} has no checkpoint yet")
    saved = checkpoints.read(newest)
    network = make_network(run.config.network, probe(run.config.env), 0)
    network.load_state_dict(
        {name: torch.from_numpy(array.copy()) for name, array in saved.tensors[run.config.learner.publish_params].items()}
    )
    aside = path.with_name(f".{path.stem}.part.mp4")
    try:
        total = record(
            run.config.env,
            network,
            aside,
            epsilon=run.config.evaluation.epsilon,
            seed=run.config.seed + 1,
            most_steps=_MOST_VIDEO_STEPS,
        )
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    return saved.meta["updates"], total
