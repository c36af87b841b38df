from __future__ import annotations

import copy
import json
import re

import pytest

from shodh_moe.audit.page import markdown, write_page
from shodh_moe.audit.summary import summarise
from shodh_moe.audit.verdict import MARGIN
from shodh_moe.base.errors import UserError
from tests.audit.synthetic_results import HARD, MAIN, all_results, diverge, main_results, result, tuning


def rows(summary: dict, table: str, **conditions: object) -> list[dict]:
    return [row for row in summary[table] if all(row[key] == value for key, value in conditions.items())]


def test_numbers_and_verdict_of_made_up_results() -> None:
    summary = summarise(all_results(), tuning())
    verdicts = summary["verdicts"]
    assert {name: one["answer"] for name, one in verdicts["ends_negative_transfer"].items()} == {
        "main": "shown",
        "hard": "shown",
    }
    assert verdicts["dense_joint_training"]["main"] == dict.fromkeys(MAIN, "harms")
    answers = {key: verdicts[key]["answer"] for key in ("dense_total", "random", "oracle", "splits", "reads_mask")}
    assert answers == {
        "dense_total": "better",
        "random": "better",
        "oracle": "as good",
        "splits": "splits",
        "reads_mask": "reads more than the mask",
    }
    (moe,) = rows(summary, "transfer", set="main", arm="moe", domain=MAIN[0])
    assert moe["latent_mse"]["value"] == pytest.approx(-0.03, abs=0.01)
    assert moe["latent_mse"]["high"] < MARGIN
    assert list(moe["latent_mse"]["by_seed"]) == ["0", "1", "2"]
    assert not rows(summary, "transfer", set="four")  # no model of one domain there
    assert {row["arm"] for row in rows(summary, "pairs", set="four")} == {"moe_2", "moe_4", "moe_8"}
    assert {row["domain"] for row in rows(summary, "transfer", set="hard")} == set(HARD)
    (arm,) = rows(summary, "arms", set="main", arm="dense_total")
    assert arm["at_edge"] is True
    (edge,) = rows(summary, "arms", set="hard", arm="single:open_channel")
    assert edge["at_edge"] is False


def test_means_by_hand() -> None:
    results = main_results(3)
    for run in results:
        if run["arm"] in ("moe", "single"):
            run["errors"][run["domains"][0]]["latent_mse"] = {"moe": 1.1, "single": 1.0}[run["arm"]] + run["seed"]
            run["gradients"] = run["gradients"][:1]
        if run["arm"] == "moe":
            for number, one in enumerate(run["gradients"][0]["groups"].values()):
                one["cosine"] = {"a|b": -0.1 * number}
                one["ratio"] = {"a|b": 0.5}
            run["swap"][MAIN[0]] = {"layers": [2.0, None], "all": None}
            run["relearning"] = {
                "domain": "obstacle_wake",
                "steps": [0, 10, 20],
                "from_checkpoint": [1.0, 0.4, 0.3],
                "from_scratch": [2.0, 1.0, 0.4],
            }
    summary = summarise(results, {})
    (moe,) = rows(summary, "transfer", arm="moe", domain=MAIN[0])
    assert moe["latent_mse"]["value"] == pytest.approx((0.1 / 1 + 0.1 / 2 + 0.1 / 3) / 3)
    # Groups: attention, shared, rest, router, expert 0, expert 1; experts count together.
    (experts,) = rows(summary, "gradients", arm="moe", group="experts")
    assert experts["first"]["between"]["value"] == pytest.approx(-0.45)
    assert experts["norm_ratio"]["value"] == pytest.approx(2.0)
    assert experts["conflicting"] == 1.0
    (swap,) = rows(summary, "swap", arm="moe", domain=MAIN[0])
    assert (swap["layers"][0]["value"], swap["layers"][1]["value"], swap["all"]["value"]) == (2.0, None, None)
    assert swap["not_split"] == [0, 1, 2]
    (relearning,) = rows(summary, "relearning", arm="moe")
    assert relearning["difference"]["value"] == pytest.approx(-0.25)
    assert relearning["steps_to_scratch"] == {"0": 10, "1": 10, "2": 10}


def test_too_few_seeds_print_no_interval() -> None:
    summary = summarise(main_results(2), tuning())
    assert summary["verdicts"]["ends_negative_transfer"]["main"]["answer"] == "not shown"
    text = markdown(summary)
    assert "(2 seeds)" in text
    assert not re.search(r"\[[-+.\d]+(e-\d+)?, ", text)


def test_an_arm_that_diverged_is_shown_everywhere(tmp_path) -> None:
    results = all_results()
    for run in results:
        if run["arm"] == "no_shared" or (run["arm"], run["seed"], run["set"]) == ("moe", 1, "main"):
            diverge(run, "loss is not finite | step 7")
    summary = summarise(results, tuning())
    assert summary["verdicts"]["ends_negative_transfer"]["main"]["answer"] == "not shown"
    assert "seed 1 diverged" in summary["verdicts"]["ends_negative_transfer"]["main"]["reason"]
    assert summary["verdicts"]["no_shared"]["answer"] == "no difference shown"
    assert [(row["arm"], row["seed"]) for row in summary["diverged"]] == [
        ("moe", 1),
        *(("no_shared", s) for s in range(3)),
    ]
    for table in ("arms", "errors", "transfer", "pairs", "bifurcation", "unseen", "plasticity", "relearning"):
        assert rows(summary, table, set="main", **{"base" if table == "pairs" else "arm": "no_shared"}), table
    text = markdown(summary)
    assert "3 of 3 seeds diverged" in text
    assert "0.400, 0.200, diverged" in text
    assert "loss is not finite / step 7" in text  # a bar would start another column
    assert "1 of 3 seeds diverged" in write_page(summary, [], tmp_path).read_text()


def test_the_verdict_comes_first_and_tables_are_rectangular() -> None:
    summary = summarise(all_results(), tuning())
    text = markdown(summary)
    assert text.startswith("## Verdict\n\nDoes the mixture of experts end negative transfer")
    assert "**shown**" in text.splitlines()[2]
    for block in text.split("\n\n"):
        if block.startswith("|"):
            assert len({len(re.findall(r" \| |^\||\|$", line)) for line in block.splitlines()}) == 1, block
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_order_of_results_does_not_matter() -> None:
    results = all_results()
    assert summarise(results, tuning()) == summarise(results[::-1], tuning())


def test_a_single_set_is_enough() -> None:
    summary = summarise([result("four", "moe", MAIN, 0, 4)], {})
    assert "runs are missing" in markdown(summary)


def test_results_that_do_not_match_are_refused() -> None:
    with pytest.raises(UserError, match="no results"):
        summarise([], {})
    results = main_results(1)
    with pytest.raises(UserError, match=r"two results of main, moe, seed 0"):
        summarise([*results, copy.deepcopy(results[0])], {})
    results[0]["arm"] = "sparse"
    with pytest.raises(UserError, match="unknown arm"):
        summarise(results, {})


def test_quoted_text_is_escaped_on_the_page(tmp_path) -> None:
    results = all_results()
    diverge(results[0], """<script>alert("1")</script> & 'x'""")
    page = write_page(summarise(results, tuning()), [], tmp_path).read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(&#34;1&#34;)&lt;/script&gt; &amp; &#39;x&#39;" in page
