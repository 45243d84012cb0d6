"""The readings of a study, its search and its costs, on numbers made up for them."""

import math

import pytest

from llqr_lab.study.costs import seconds_at, steps_within
from llqr_lab.study.methods import METHODS, Range
from llqr_lab.study.page import in_short, section, write_page
from llqr_lab.study.plan import STUDIES
from llqr_lab.study.problems import PROBLEMS, SCALES
from llqr_lab.study.readings import gain, interaction, time_to, verdict
from llqr_lab.study.tuning import search


def entry(ends, curve=((0, 2.0, 10.0), (10, 1.0, 50.0)), length=10):
    runs = [
        {"seed": i, "ended": "finished", "metric": end, "curve": [list(p) for p in curve]}
        for i, end in enumerate(ends)
    ]
    return {
        "cost": {"steps": [length], "seconds": [5.0]},
        "lengths": {"steps": 10, "seconds": length},
        "tuned": {"settings": {"lr": 0.1}, "ends": ["lr"], "trials": [{}] * 2},
        "runs": {"steps": runs, "seconds": runs},
    }


FAST = ((0, 2.0, 10.0), (4, 1.0, 30.0), (8, 0.5, 70.0))


def made_up(**changes):
    problem = {
        "title": "made up", "metric": "accuracy", "sign": 1, "budget": 5.0,
        "size": {"train": 7, "batch": 1, "steps": 10, "source": "none"},
        "methods": {
            "SGDM": entry([80.0, 82.0, 81.0]),
            "SAM": entry([81.0, 82.5, 82.5]),
            "NG": entry([82.0, 84.0, 83.2], FAST, 8),
            "NG + SAM": entry([85.0, 86.0, 86.5]),
            "SOAP": {"error": "ValueError: no"},
        },
    }  # fmt: skip
    return {
        "study": "proof", "scale": "small", "methods": [*problem["methods"]],
        "effort": {"tuning": 2, "tuning_seeds": 1, "seeds": 3, "rounds": 1},
        "environment": {"processor": "p", "torch": "t"},
        "problems": {"cnn": problem | changes},
    }  # fmt: skip


def test_differences_are_taken_seed_by_seed():
    problem = made_up()["problems"]["cnn"]
    # NG - SAM: 1, 1.5, 0.7
    found = gain(problem, "NG", "SAM", "seconds")
    assert found["mean"] == pytest.approx(3.2 / 3)
    assert found["standard_error"] == pytest.approx(0.4041 / math.sqrt(3), abs=1e-4)
    assert verdict(found) == "better"
    losses = gain(problem | {"sign": -1}, "NG", "SAM", "seconds")
    assert verdict(losses) == "worse" and losses["mean"] == -found["mean"]
    assert gain(problem, "SOAP", "SAM", "seconds") is None
    assert verdict(gain(problem, "SAM", "SAM", "seconds")) == "level"


def test_in_short_the_better_tuned_problem_is_shown():
    results = made_up()
    problem = results["problems"]["cnn"]
    results["problems"] |= {"cnn-few": problem, "cnn-few-decay": problem}
    assert in_short(results).splitlines()[0] == "| method | cnn, % | cnn-few-decay, % |"


def test_the_interaction_is_a_difference_of_differences():
    problem = made_up()["problems"]["cnn"]
    # with U: 3, 2, 3.3; without: 1, 0.5, 1.5; minus: 2, 1.5, 1.8
    found = interaction(problem, ("SGDM", "SAM", "NG", "NG + SAM"), "steps")
    assert found["mean"] == pytest.approx(5.3 / 3)
    assert found["standard_error"] == pytest.approx(0.2517 / math.sqrt(3), abs=1e-4)


def test_time_to_where_a_baseline_ends():
    problem = made_up()["problems"]["cnn"]
    # The loss is 1.0 at step 4 of 8, the accuracy 50 at step 6; SGDM takes 10 steps and 5 seconds.
    assert time_to(problem, "NG", "SGDM", 1) == {"steps": 0.4, "seconds": 0.5}
    assert time_to(problem, "NG", "SGDM", 2) == {"steps": 0.6, "seconds": 0.75}
    assert time_to(problem, "SGDM", "NG", 1)["steps"] == math.inf
    assert time_to(problem, "SOAP", "SGDM", 1) is None


def test_tables_say_what_was_found_and_how_much_is_chance():
    text = section(made_up())
    assert "| NG | **+1.07 ± 0.23** |" in text
    assert "| SOAP | failed: ValueError: no |" in text
    assert "**+1.77 ± 0.15**" in text  # the interaction
    assert "| NG | 625.0 | 0.1 (end) |" in text and "| 0.40, 0.50 | 0.60, 0.75 |" in text
    # NG and NG + SAM, at steps and at seconds; P(t > 2) = 9.2 % with two degrees of freedom
    assert "At equal seconds, of 2 comparisons: 2 better, 0 level, 0 worse." in text
    assert "9.2 %" in text and "0.4 of these 4" in text
    assert section(None) == "The study has not been run yet."
    alone = made_up(methods={"SAM": entry([1.0])})
    assert "| SAM |" in section(alone)


def test_the_page_keeps_what_is_not_of_a_study(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- llqr study proof -->old<!-- end of llqr study proof -->\nafter\n")
    write_page(page, tmp_path / "none.json")
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "The study has not been run yet." in text


def test_a_search_widens_its_ranges_within_its_number_of_runs():
    tried = []

    def score(settings):
        tried.append(settings["lr"])
        return None if settings["lr"] > 50 else -abs(math.log(settings["lr"] / 20.0))

    found = search({"lr": Range(0.1, 0.3, 1.0)}, 12, score, seed=0)
    assert len(tried) == 12 and tried[0] == 0.3
    assert found["ranges"]["lr"][1] > 20 and found["ends"] == []
    assert 5 < found["settings"]["lr"] < 50
    again = []
    search({"lr": Range(0.1, 0.3, 1.0)}, 12, lambda s: again.append(s["lr"]) or score(s), seed=0)
    assert again == tried[:12]


def test_steps_fit_into_the_seconds():
    cost = {"steps": [2, 5, 10], "seconds": [4.0, 5.5, 8.0]}
    for budget in (3.0, 4.1, 8.0, 20.0):
        steps = steps_within(cost, budget)
        assert seconds_at(cost, steps) <= budget < seconds_at(cost, steps + 1) or steps == 1


def test_tables_fit_together():
    for study in STUDIES.values():
        for scale in SCALES:
            assert study.efforts[scale].seeds > 1
            assert all(scale in PROBLEMS[p].sizes for p in study.problems[scale])
            assert set(study.chosen.get(scale, ())) <= set(study.methods)
        assert {*study.baselines, *study.pictured, *study.claimed} <= set(study.methods)
    assert (
        METHODS["NG"].geometry().settings == STUDIES["ablation"].methods["NG"].geometry().settings
    )
