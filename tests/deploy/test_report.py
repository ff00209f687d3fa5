"""`qfleet report`: what is pooled and what is not, what is warned of, and what the page and its files hold."""

import base64
import csv
import errno
import fcntl
import html.parser
import json
import os
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from report_data import STEPS_PER_SECOND, write_run

from deploy import cli
from deploy import report_figures as figures
from deploy.report_page import references
from deploy.report_runs import ascending, evaluations_over, group_notes, group_runs, read_runs
from deploy.report_scores import aggregate_rows


def reporting(tmp_path, runs, *flags):
    """Writes a report; returns its page."""
    out = tmp_path / "page.html"
    words = ["report", *map(str, runs), "--out", str(out), *(flags or ["--no-video"])]
    assert cli.main(words) == 0
    return out.read_text()


def groups_of(*paths):
    return group_runs(read_runs(paths)[0])


def failing(capsys, *words):
    assert cli.main([str(word) for word in words]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 1, lines
    assert lines[0].startswith("qfleet: ") and "Traceback" not in lines[0]
    return lines[0]


def csv_of(tmp_path, name):
    with (tmp_path / "page" / name).open(newline="") as file:
        return list(csv.DictReader(file))


# What is pooled.


def test_only_runs_that_differ_in_nothing_but_the_seed_are_pooled(tmp_path):
    seeds = [write_run(tmp_path / f"s{seed}", seed=seed) for seed in (2, 0, 1)]
    other = write_run(tmp_path / "lr", learning_rate=0.25)
    elsewhere = write_run(tmp_path / "breakout", game="breakout")
    groups = groups_of(*seeds, other, elsewhere)
    assert [(g.game, g.label, [r.config.seed for r in g.runs]) for g in groups] == [
        ("pong", "pong", [0, 1, 2]),
        ("pong", "pong, learning_rate 0.25", [0]),
        ("breakout", "pong", [0]),
    ]
    assert [group.letter for group in groups] == ["A", "B", "A"]  # The same method on two games.


def test_a_label_names_three_differences_at_most_and_no_two_are_alike(tmp_path):
    paths = [write_run(tmp_path / name) for name in "abc"]
    for path, batch_size in zip(paths[1:], (7, 8), strict=True):
        info = json.loads((path / "run.json").read_text())
        info["config"]["learner"] |= {"batch_size": batch_size, "priority_floor": 0.5}
        info["config"]["actors"] |= {"n_step": 2, "discount": 0.5}
        (path / "run.json").write_text(json.dumps(info))
    labels = [group.label for group in groups_of(*paths)]
    assert labels == [
        "pong",
        "pong, n_step 2, discount 0.5, batch_size 7, and 1 more",
        "pong, n_step 2, discount 0.5, batch_size 8, and 1 more",
    ]
    info["config"]["learner"]["batch_size"], info["config"]["actors"]["reward_clip"] = 7, None
    (paths[2] / "run.json").write_text(json.dumps(info))
    labels = [group.label for group in groups_of(*paths)]
    assert len(set(labels)) == 3 and "reward_clip off" in labels[2]


def test_a_run_given_twice_or_copied_counts_once(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    copy = write_run(tmp_path / "elsewhere" / "run", seed=0)
    page = reporting(tmp_path, [run, run, copy])
    assert "Pong: 1 run<" in page and page.count("it counts once") == 2


def test_what_pooled_runs_do_not_share_is_said(tmp_path):
    paths = [
        write_run(tmp_path / "a", summary={"protocol_card": {"commit": "abc"}}),
        write_run(tmp_path / "b", summary={"protocol_card": {"commit": "def"}, "stopped_by": "target_return"}),
    ]
    (group,) = groups_of(*paths)
    notes = " ".join(group_notes(group))
    assert "seed 0 is there 2 times" in notes
    assert "different commits (abc, def)" in notes
    assert "different reasons to end (ended by max_minutes, ended by target_return)" in notes


def test_runs_with_names_alike_are_told_apart(tmp_path):
    for directory in ("x", "y"):
        (tmp_path / directory).mkdir()
        write_run(tmp_path / directory / "run", seed=0 if directory == "x" else 1)
    (tmp_path / "y" / "run" / "run.json").write_text(
        (tmp_path / "y/run/run.json").read_text().replace('"run": "run"', '"run": "2"')
    )
    runs, _ = read_runs([tmp_path / "x" / "run", tmp_path / "y" / "run"])
    assert [run.name for run in runs] == ["x/run", "y/run"]


# Scores.


def test_returns_scores_and_intervals_of_seeds(tmp_path):
    """The mean of -1, 0 and 4 is 1, the median 0; Pong's human is 14.6 and its random player -20.7."""
    runs = [write_run(tmp_path / f"s{level}", seed=level, level=level) for level in (0, 1, 5)]
    page = reporting(tmp_path, runs)
    rows = csv_of(tmp_path, "scores.csv")
    assert [float(row["mean_return"]) for row in rows] == [-1, 0, 4]
    assert [float(row["human_normalized_score"]) for row in rows] == pytest.approx([(r + 20.7) / 35.3 for r in (-1, 0, 4)])
    aggregates = {row["statistic"]: row for row in csv_of(tmp_path, "aggregates.csv")}
    assert float(aggregates["mean"]["value"]) == pytest.approx(21.7 / 35.3)
    assert float(aggregates["IQM"]["low_95"]) == pytest.approx(19.7 / 35.3)  # Three times the worst run: 1 of 27 resamples.
    assert float(aggregates["IQM"]["high_95"]) == pytest.approx(24.7 / 35.3)
    assert "of only 3 seeds" in page and "fewer than 5 seeds a game: its intervals are too narrow" in page


def test_one_seed_is_said_to_have_no_interval(tmp_path, capsys):
    page = reporting(tmp_path, [write_run(tmp_path / "run")])
    assert "one seed: no interval" in page
    assert "(one seed: no interval)" in capsys.readouterr().out
    assert {row["low_95"] for row in csv_of(tmp_path, "aggregates.csv")} == {""}


def test_a_recorded_human_normalized_score_is_taken_before_the_table(tmp_path):
    (group,) = groups_of(write_run(tmp_path / "run", summary={"human_normalized_score": 0.123}))
    assert group.scores == [0.123]


def test_references_are_of_the_games_that_the_table_has():
    assert references("pong") == [("random", -20.7), ("human", 14.6)] and references("CartPole-v1") == []


def test_only_runs_that_have_ended_are_aggregated(tmp_path):
    """The run under way has the better return, and would change the mean."""
    ended = write_run(tmp_path / "ended", level=1)
    going = write_run(tmp_path / "going", seed=1, level=9, ends=False)
    (group,) = groups_of(ended, going)
    assert group.returns == [0] and "1 of 2 runs have ended" in group_notes(group)[0]
    (alone,) = groups_of(going)
    assert alone.returns == [9 - 20 + 19] and not alone.is_final
    assert aggregate_rows([alone]) == []


# Protocols.


def test_mixed_protocols_are_warned_of_and_never_aggregated_together(tmp_path, capsys):
    card = {"protocol": "machado", "sticky_action_probability": 0.25, "noop_max": 0, "action_set": "full"}
    legacy = write_run(tmp_path / "old", level=1)
    machado = write_run(tmp_path / "new", level=5, summary={"protocol_card": card})
    page = reporting(tmp_path, [legacy, machado])
    warned = "evaluation protocols are mixed, and scores of different protocols are not comparable"
    printed = capsys.readouterr().out
    assert warned in printed and "protocol legacy (old), machado (new)" in printed
    assert page.index("Read this before the numbers") < page.index(warned) < page.index("<main>")
    rows = aggregate_rows(groups_of(legacy, machado))
    assert [(row.protocol, row.num_runs) for row in rows] == [("legacy", 1), ("machado", 1)]


@pytest.mark.parametrize("field", ["epsilon", "max_episode_frames", "frame_skip"])
def test_one_differing_rule_is_a_mixture(tmp_path, capsys, field):
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", seed=1, summary={"protocol_card": {field: 77}})]
    reporting(tmp_path, runs)
    assert f"{field} " in capsys.readouterr().out


def test_runs_of_one_protocol_give_no_warning(tmp_path, capsys):
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", seed=1, game="breakout")]
    runs.append(write_run(tmp_path / "c", game="CartPole-v1", recipe="cartpole"))
    page = reporting(tmp_path, runs)
    assert "warning" not in capsys.readouterr().out and "Read this before" not in page


def test_warnings_of_a_card_and_faults_are_at_the_top_and_in_the_terminal(tmp_path, capsys):
    summary = {"protocol_card": {"warnings": ["sticky actions differ"]}, "ledger": {"balanced": False}}
    page = reporting(tmp_path, [write_run(tmp_path / "run", fault="the learner met a NaN", summary=summary)])
    printed = capsys.readouterr().out
    for text in ("run: sticky actions differ", "ended by a fault: the learner met a NaN", "the ledger is not balanced"):
        assert f"warning: {text}" in printed or f"warning: run {text}" in printed or f"warning: run: {text}" in printed
        assert text in page[: page.index("<main>")]


def test_an_older_summary_has_a_card_of_the_settings_and_the_rest_is_not_recorded(tmp_path):
    (group,) = groups_of(write_run(tmp_path / "run"))
    card = group.runs[0].card
    assert card["protocol"] == "legacy" and card["noop_max"] == 30 and card["action_set"] == "minimal"
    assert card["epsilon"] == 0 and card["episodes"] == 2 and card["training_frames"] == 4 * 50 * 200
    assert "commit" not in card and "human_scores" not in card and card["fire_reset"] is True
    page = reporting(tmp_path, [tmp_path / "run"])
    assert re.search(r"<th>commit</th><td[^>]*>not recorded</td>", page)


def test_a_file_of_evaluate_is_a_row_of_its_own_and_not_part_of_the_score(tmp_path, capsys):
    run = write_run(tmp_path / "run", level=1)
    result = {"mean_return": 15.5, "returns": [15, 16], "protocol": "machado", "epsilon": 0.0, "episodes": 2}
    (run / "evaluation-machado.json").write_text(json.dumps(result))
    (run / "evaluation-own.json").write_text(json.dumps(result | {"mean_return": 3.0, "protocol": "legacy"}))
    (run / "evaluation-torn.json").write_text('{"mean_ret')
    (run / "evaluation-other.json").write_text("{}")
    page = reporting(tmp_path, [run])
    rows = csv_of(tmp_path, "scores.csv")
    assert [(row["source"], float(row["mean_return"])) for row in rows] == [
        ("final evaluation", 0),
        ("evaluation-machado.json", 15.5),
        ("evaluation-own.json", 3),
    ]
    printed = capsys.readouterr().out
    assert "run/evaluation-machado.json is of another protocol" in printed and "evaluation-own.json is of" not in printed
    assert float(csv_of(tmp_path, "aggregates.csv")[0]["value"]) == pytest.approx(20.7 / 35.3)
    assert "evaluation-torn.json is truncated or altered" in page and "evaluation-other.json is no result" in page


def test_a_promised_protocol_that_was_played_anyway_is_no_difference(tmp_path):
    """Two runs of one environment, one of which named its protocol: the same method."""
    paths = [write_run(tmp_path / "a"), write_run(tmp_path / "b", seed=1)]
    info = json.loads((paths[1] / "run.json").read_text())
    info["config"]["protocol"] = "legacy"
    (paths[1] / "run.json").write_text(json.dumps(info))
    (group,) = groups_of(*paths)
    assert len(group.runs) == 2


def test_what_a_card_says_has_no_meaning_is_none_and_what_it_lacks_is_not_recorded(tmp_path):
    card = {"sticky_action_probability": None, "reward_clip": None, "human_scores": None, "commit": None, "num_actions": 2}
    page = reporting(
        tmp_path, [write_run(tmp_path / "run", recipe="cartpole", game="CartPole-v1", summary={"protocol_card": card})]
    )
    shown = dict(re.findall(r"<tr><th>([a-z ]+)</th><td[^>]*>([^<]*)</td></tr>", page))
    assert (shown["sticky action probability"], shown["reward clip"], shown["human scores"]) == ("none", "off", "none")
    assert (shown["commit"], shown["noop max"], shown["num actions"]) == ("not recorded", "not recorded", "2")


# Runs that are not whole.


def test_a_run_under_way_is_shown_as_far_as_it_has_come(tmp_path):
    """It goes on from an older command, whose summary is not its result."""
    run = write_run(tmp_path / "run", level=1)
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (group,) = groups_of(run)
        assert (group.runs[0].state, group.returns, group.is_final) == ("under way", [0], False)
        page = reporting(tmp_path, [run])
    assert "under way: its latest evaluation is shown" in page and "latest, not final" in page
    (group,) = groups_of(run)
    assert group.runs[0].state == "ended by max_minutes"


@pytest.mark.parametrize("data", [b'{"stopped_by": "max_m', b"", b"\xff\xfe", b"[1]", b"null"])
def test_a_truncated_summary_is_passed_over_and_said(tmp_path, data):
    run = write_run(tmp_path / "run")
    (run / "summary.json").write_bytes(data)
    assert "summary.json is truncated or altered" in reporting(tmp_path, [run])


def test_torn_and_senseless_rows_are_passed_over_and_said(tmp_path):
    run = write_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'[1]\n{"env_steps": "many", "evaluator/return_mean": NaN, "time_seconds": null}\n\xff\n{"env_st')
    page = reporting(tmp_path, [run])
    assert "metrics.jsonl: 3 torn lines were passed over" in page


def test_a_run_without_rows_or_evaluation_is_still_a_page(tmp_path, capsys):
    run = write_run(tmp_path / "run", ends=False)
    (run / "metrics.jsonl").unlink()
    page = reporting(tmp_path, [run])
    assert "no evaluation yet" in page and "metrics.jsonl cannot be read" in page
    assert "no evaluation yet" in capsys.readouterr().out
    assert not (tmp_path / "page" / "learning_curve.png").exists()


def test_rows_that_a_resumed_run_went_back_behind_are_passed_over():
    rows = [{"t": 1}, {"t": 2}, {"t": 3}, {"t": "x"}, {"t": 2}, {"t": 4}]
    assert ascending(rows, "t") == [{"t": 1}, {"t": 2}, {"t": 4}]


# Curves.


def test_an_evaluation_is_where_its_parameters_were_taken(tmp_path):
    """Row 1: 20 s, 1,000 steps and 4,000 updates; it began a second, 50 steps and 40 updates earlier."""
    runs, _ = read_runs([write_run(tmp_path / "run", num_rows=4)])
    batch_size = runs[0].config.learner.batch_size
    firsts = {axis: evaluations_over(runs[0], axis)[0][0] for axis in ("env_steps", "samples", "minutes")}
    assert firsts == {"env_steps": 950, "samples": 3960 * batch_size, "minutes": 19 / 60}
    assert evaluations_over(runs[0], "minutes")[1].tolist() == [-19, -17]


def test_an_evaluation_that_an_older_run_repeats_in_every_row_is_one_point(tmp_path):
    runs, _ = read_runs([write_run(tmp_path / "run", num_rows=4)])
    row = runs[0].rows[1]
    again = {"env_steps": 1200.0, "time_seconds": 21.0}
    runs[0].rows.insert(2, {name: row[name] for name in ("evaluator/return_mean", "evaluator/params_version")} | again)
    assert evaluations_over(runs[0], "env_steps")[0].tolist() == [950, 1950]


def test_a_row_counts_as_long_as_it_lasted(tmp_path):
    """A last row of a millisecond, with a rate of nothing, does not change the mean."""
    runs, _ = read_runs([write_run(tmp_path / "run", num_rows=3)])
    run = runs[0]
    run.rows.append({"time_seconds": run.rows[-1]["time_seconds"] + 0.001, "actor/env_steps_per_second": 0.0})
    x, y = figures.over_minutes(run, figures.QUANTITIES[0])
    assert y == pytest.approx([STEPS_PER_SECOND], rel=1e-4) and len(x) == 1


def test_ticks_are_round_and_within():
    assert figures._ticks(-22.0, 21.0, 5) == [-20, -10, 0, 10, 20]
    assert figures._ticks(0.0, 456_340.0, 5) == [0, 100_000, 200_000, 300_000, 400_000]
    assert figures._ticks(0.011, 0.029, 4) == pytest.approx([0.015, 0.02, 0.025])
    assert [figures.compact(value) for value in (0, 999_999, 1_500_000, -20, 0.0123)] == [
        "0",
        "1M",
        "1.5M",
        "\u221220",
        "0.0123",
    ]


def drawn(page):
    """Returns {title: (circles, paths)} of the plots in a page, in the units of the SVG."""
    plots = {}
    for text in re.findall(r"<svg .*?</svg>", page, re.DOTALL):
        svg = ET.fromstring(text)
        title = svg.find("title")
        if title is None:
            continue
        circles = [(float(c.get("cx")), float(c.get("cy"))) for c in svg.iter("circle")]
        paths = [path.get("d") for path in svg.iter("path") if path.get("class") == "line"]
        bands = [path.get("d") for path in svg.iter("path") if path.get("class") == "band"]
        plots[title.text] = (circles, [points_of(path) for path in paths], [points_of(band) for band in bands])
    return plots


def points_of(path):
    return [tuple(map(float, point.split())) for point in path.strip("MZ").split(" L")]


def test_the_csv_holds_what_the_page_draws(tmp_path):
    """From the positions in the SVG and the panel's scales back to the numbers in the file, within a hundredth of a unit."""
    runs = [write_run(tmp_path / f"s{seed}", seed=seed, level=3 * seed) for seed in range(3)]
    plots = drawn(reporting(tmp_path, runs))
    groups = groups_of(*runs)
    panels = figures.learning_panels(groups, references("pong")) + figures.throughput_panels(groups)
    rows = csv_of(tmp_path, "learning_curve.csv") + csv_of(tmp_path, "throughput.csv")
    assert len(panels) == 3 + 5 and len(panels) == len(plots)
    for panel in panels:
        x_scale, y_scale = figures.scales(panel)
        _, paths, bands = plots[panel.title]
        of_panel = [row for row in rows if row["quantity"] == panel.name]
        lines = list(dict.fromkeys(row["line"] for row in of_panel))
        assert len(paths) == len(lines)
        for name, path in zip(lines, paths, strict=True):
            expected = [(x_scale(float(row["x"])), y_scale(float(row["y"]))) for row in of_panel if row["line"] == name]
            np.testing.assert_allclose(path, expected, atol=0.011)
        for band in bands:
            with_band = [row for row in of_panel if row["low_95"]]
            upper = [(x_scale(float(row["x"])), y_scale(float(row["high_95"]))) for row in with_band]
            lower = [(x_scale(float(row["x"])), y_scale(float(row["low_95"]))) for row in with_band]
            np.testing.assert_allclose(band, upper + lower[::-1], atol=0.011)
    assert sum(len(bands) for _, _, bands in plots.values()) == 3


def test_the_mean_curve_of_the_csv_by_hand(tmp_path):
    """Evaluations at levels 0, 3 and 6 above the same line: the mean is at 3, and the band from the lowest to the highest seed."""
    runs = [write_run(tmp_path / f"s{seed}", seed=seed, level=3 * seed) for seed in range(3)]
    reporting(tmp_path, runs)
    rows = csv_of(tmp_path, "learning_curve.csv")
    mean = [row for row in rows if row["quantity"] == "env_steps" and row["line"] == "pong, mean of 3 seeds"]
    assert [float(mean[0][name]) for name in ("x", "y", "low_95", "high_95")] == pytest.approx([950, -16, -19, -13])
    assert [float(mean[-1][name]) for name in ("x", "y", "low_95", "high_95")] == pytest.approx([9950, 2, -1, 5])


# The page.


class _Tags(html.parser.HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.tags = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))


def test_the_page_asks_the_network_for_nothing_and_runs_no_script(tmp_path):
    page = reporting(tmp_path, [write_run(tmp_path / "run")])
    tags = _Tags(page).tags
    assert not {tag for tag, _ in tags} & {"script", "iframe", "object", "embed", "base", "form", "img"}
    for tag, attributes in tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        assert attributes.get("src", "data:").startswith("data:")
        href = attributes.get("href", "#")
        assert href.startswith(("#", "data:")) or (
            tag == "a" and href.startswith(("https://arxiv.org/", "https://github.com/"))
        )
    assert "url(" not in page and "@import" not in page
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in tags


def test_what_a_run_says_is_text_and_never_markup(tmp_path):
    evil = "<script>alert('1')<"
    clean = [tag for tag, _ in _Tags(reporting(tmp_path, [write_run(tmp_path / "run", fault="f")])).tags]
    summary = {"stopped_by": "<img src=x onerror=alert(1)>", "protocol_card": {"commit": '"><b>x', "warnings": ["<i>w</i>"]}}
    run = write_run(tmp_path / evil, fault="<svg onload=alert(1)>", summary=summary)
    (run / "evaluation-<b>.json").write_text(json.dumps({"mean_return": 1, "protocol": "<u>"}))
    page = reporting(tmp_path, [run])
    assert "&lt;script&gt;alert(&#39;1&#39;)&lt;" in page
    assert {tag for tag, _ in _Tags(page).tags} == set(clean) and evil not in page
    assert _Tags(page).tags.count(("svg", {})) == 0


def test_settings_that_are_not_the_recipes_come_first(tmp_path):
    page = reporting(tmp_path, [write_run(tmp_path / "run", learning_rate=0.25)])
    changed = page.index("changed from the recipe pong")
    assert changed < page.index("learner.learning_rate", changed) < page.index("<details>", changed)
    reporting(tmp_path, [write_run(tmp_path / "as-it-is")])
    assert "The recipe pong as it is." in (tmp_path / "page.html").read_text()


def test_pictures_and_tables_lie_beside_the_page(tmp_path):
    reporting(tmp_path, [write_run(tmp_path / "run")])
    names = sorted(path.name for path in (tmp_path / "page").iterdir())
    assert names == [
        "aggregates.csv",
        "learning_curve.csv",
        "learning_curve.png",
        "scores.csv",
        "throughput.csv",
        "throughput.png",
    ]
    assert (tmp_path / "page" / "learning_curve.png").read_bytes().startswith(b"\x89PNG")


def test_an_odd_name_does_not_break_the_pictures(tmp_path):
    reporting(tmp_path, [write_run(tmp_path / r"_a$\frac$^{b"), write_run(tmp_path / "b", seed=1)])
    for name in ("learning_curve.png", "throughput.png"):
        assert (tmp_path / "page" / name).read_bytes().startswith(b"\x89PNG")


# Videos.


def test_a_video_of_the_run_directory_is_embedded(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "episode.mp4").write_bytes(b"moving pictures")
    page = reporting(tmp_path, [run], "--video")
    assert f'src="data:video/mp4;base64,{base64.b64encode(b"moving pictures").decode()}"' in page
    assert "episode.mp4, as it lies in run" in page
    assert "<video" not in reporting(tmp_path, [run], "--no-video")


def test_a_video_beyond_the_budget_is_named_and_not_embedded(tmp_path):
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", learning_rate=0.25)]
    for run in runs:
        (run / "episode.mp4").write_bytes(bytes(600))
    page = reporting(tmp_path, runs, "--video", "--video-budget", "1KiB")
    assert page.count("<video") == 1 and "b/episode.mp4 has 600B, and 424B are left in this page (--video-budget)" in page


def test_without_a_checkpoint_the_page_says_why_there_is_no_video(tmp_path):
    page = reporting(tmp_path, [write_run(tmp_path / "run")], "--video")
    assert "<video" not in page and "no video: " in page and "has no checkpoint yet" in page


def test_a_real_run_is_reported_with_a_video_of_its_last_checkpoint(tmp_path):
    run = tmp_path / "run"
    words = ["train", "gridworld", "--run-dir", str(run), "--serial", "--max-updates", "5", "--evaluation.final-episodes", "2"]
    assert cli.main([*words, "--log-period-seconds", "1000"]) == 0
    page = reporting(tmp_path, [run], "--video")
    (video,) = re.findall(r"data:video/mp4;base64,([^\"]+)", page)
    (poster,) = re.findall(r'poster="data:image/jpeg;base64,([^"]+)"', page)
    assert base64.b64decode(poster).startswith(b"\xff\xd8\xff")
    assert base64.b64decode(video)[4:8] == b"ftyp"
    assert "Played by the last checkpoint of run (seed 0, update 5" in page
    assert [path.name for path in (tmp_path / "page").glob("*.mp4")] == ["GridWorld-v0-A-seed0.mp4"]


# Mistakes.


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nowhere"], "nowhere is not a run directory: run.json cannot be read (No such file or directory)"),
        (["empty"], "empty is not a run directory"),
        (["torn"], "not a run's description (truncated or altered)"),
        (["run", "nowhere"], "nowhere is not a run directory"),
        (["run", "--out", "page.pdf"], "the name must end in .html"),
        (["run", "--out", "no/such/page.html"], "name a file in a directory that is there"),
        (["run", "--out", "taken.html"], "which is no directory"),
        (["run", "--out", "run.html"], "its files would go into run, which is a run directory"),
        (["run", "--out", "directory.html"], "cannot be written"),
        (["run", "--vdeo"], "--vdeo"),
        (["--out", "x.html"], "needs a run directory first"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(words, expected, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run")
    write_run(tmp_path / "torn")
    (tmp_path / "torn" / "run.json").write_text('{"format_ver')
    for name in ("empty", "directory.html"):
        (tmp_path / name).mkdir()
    (tmp_path / "taken").write_text("mine")
    before = sorted(tmp_path.iterdir())
    assert expected in failing(capsys, "report", *words)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_a_full_disk_is_one_line_and_leaves_the_old_report(tmp_path, capsys, monkeypatch, code):
    run = write_run(tmp_path / "run")
    old = reporting(tmp_path, [run])
    capsys.readouterr()

    def full(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    line = failing(capsys, "report", run, "--out", tmp_path / "page.html", "--no-video")
    assert os.strerror(code) in line and "page.html is as it was" in line
    assert (tmp_path / "page.html").read_text() == old
    assert not list(tmp_path.rglob("*.part"))
