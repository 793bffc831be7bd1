"""Running experiments: what is kept, what is continued, what a claim needs in order to hold."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import toy_experiment
from command_line import refused, run
from memlm.errors import ConfigError, MemlmError
from memlm.recipes import Claim, Measured, Place, Row, experiments, find_experiment, run_experiment
from memlm.recipes._claims import judge, t_interval
from toy_experiment import TOY, toy


def quietly(experiment, folder, **settings):
    return run_experiment(experiment, folder, show_progress=False, **settings)


def log(folder):
    return (folder / "log").read_text().splitlines()


def measured(sums, counts=(1, 1, 2)):
    return Measured(counts=list(counts), groups="pages", rows={"row": Row(list(sums))}, facts={})


def verdict(low, high, by=0.0):
    """Judge "low is lower than high" by so many seeds, given as sums over three pages."""
    claim = Claim(text="", lower=Place("low", "row"), higher=Place("high", "row"), by=by)
    return judge(claim, {"low": [measured(sums) for sums in low], "high": [measured(sums) for sums in high]})


def test_the_interval_over_seeds_is_students():
    values = np.array([1.0, 2.0, 4.0])
    found = t_interval(values)
    half = 4.302653 * np.std(values, ddof=1) / 3**0.5  # R: qt(.975, 2)
    assert found == pytest.approx((values.mean() - half, values.mean() + half), rel=1e-3)
    assert t_interval(values[:1]) is None
    for count, point in ((2, 12.7062), (10, 2.262157), (11, 2.228139), (31, 2.042272)):
        values = np.resize([0.0, 1.0], count)
        half = point * values.std(ddof=1) / count**0.5
        assert t_interval(values).high - values.mean() == pytest.approx(half, rel=2e-3)


def test_a_difference_is_of_means_over_targets_seed_by_seed():
    found = verdict(low=[[1, 2, 3], [1, 2, 3]], high=[[2, 3, 7], [2, 3, 9]])
    assert found.difference == pytest.approx((6 / 4 + 8 / 4) / 2)
    assert found.over_seeds == pytest.approx(t_interval(np.array([6 / 4, 8 / 4])))
    assert found.groups == "pages"
    # of three pages with differences 1, 1 (one target each) and 5 (two targets), some resamples lack the last
    assert found.over_groups == pytest.approx((1.0, 2.5))


@pytest.mark.parametrize(
    ("high", "by", "holds"),
    [
        ([[1, 1, 2], [1, 1, 2]], 0.0, True),
        ([[1, 1, 2], [1, 1, 2]], 0.999, True),
        ([[1, 1, 2], [1, 1, 2]], 1.0, False),  # not more than claimed
        ([[1, 1, 2], [2, 2, 4]], 0.0, False),  # seeds do not agree: the t interval reaches below 0
        ([[4, 4, -2], [4, 4, -2]], 0.0, False),  # pages do not agree
        ([[-1, -1, -2], [-1, -1, -2]], -1.1, True),  # at most so much higher
    ],
)
def test_a_claim_holds_where_all_intervals_lie_beyond_it(high, by, holds):
    assert verdict(low=[[0, 0, 0]] * len(high), high=high, by=by).holds is holds


def test_one_seed_and_one_page_have_no_interval():
    claim = Claim(text="", lower=Place("low", "row"), higher=Place("high", "row"))
    found = judge(claim, {"low": [measured([0.0], [4])], "high": [measured([2.0], [4])]})
    assert (found.difference, found.over_seeds, found.over_groups, found.holds) == (0.5, None, None, True)
    assert found.to_dict()["over_seeds"] is None


def test_what_is_finished_is_not_run_again(tmp_path):
    folder = tmp_path / "run"
    said = []
    first = quietly(TOY, folder, seeds=2, say=said.append)
    assert log(folder) == ["prepared", "low 0", "high 0", "low 1", "high 1"]
    assert [line.split(":")[0] for line in said] == ["low, seed 0", "high, seed 0", "low, seed 1", "high, seed 1"]
    assert "1 of 4 done, about 0:00:00 left" in said[0]
    again = quietly(TOY, folder, seeds=2)
    assert log(folder) == ["prepared", "low 0", "high 0", "low 1", "high 1"]
    assert again.to_dict() == first.to_dict()
    more = quietly(TOY, folder, seeds=3)
    assert log(folder)[5:] == ["low 2", "high 2"]
    assert (more.seeds, more.holds) == (3, True)
    fewer = quietly(TOY, folder, seeds=1)  # what there is more is left, and left out
    assert (fewer.seeds, len(log(folder))) == (1, 7)


def test_an_interrupted_run_continues(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        quietly(toy(measure=toy_experiment.interrupt), folder, seeds=1)
    assert log(folder) == ["prepared", "low 0"]
    assert not (folder / "result.json").exists()
    quietly(TOY, folder, seeds=1)
    assert log(folder) == ["prepared", "low 0", "high 0"]


def test_the_result_as_json_markdown_and_table(tmp_path):
    folder = tmp_path / "run"
    outcome = quietly(TOY, folder, seeds=2)
    values = json.loads((folder / "result.json").read_text())
    assert values == json.loads(json.dumps(outcome.to_dict()))
    seeds = ["seed 0", "seed 1"]
    assert values["table"] == [
        {
            "row": "row",
            "arm": "low",
            "mean": 1.0,
            "points": 10.0,
            "by_seed": [10.0, 10.0],
            "settings": seeds,
        },
        {
            "row": "row",
            "arm": "high",
            "mean": pytest.approx(2.005),
            "points": pytest.approx(20.05),
            "by_seed": [20.0, pytest.approx(20.1)],
            "settings": seeds,
        },
        {"row": "other row", "arm": "high", "mean": 0.0, "points": 0.0, "by_seed": [0.0, 0.0], "settings": ["", ""]},
    ]
    assert values["claims"][0]["holds"] is True
    assert values["claims"][0]["difference"] == pytest.approx(1.005)
    assert (values["targets"], values["seeds"], values["facts"]) == (6, 2, {"text": "made up"})
    page, table = (folder / "result.md").read_text(), str(outcome)
    assert "| row | 10.00 ± 0.00 | 20.05 ± 0.64 |" in page
    assert "| other row |  | 0.00 ± 0.00 |" in page
    assert "nobody has" not in page
    assert (
        "| low is lower | yes | 10.00 | 20.05 | -1.00 points (claimed -0.50 points) | -1.07 points to -0.94 points |"
        in page
    )
    assert "holds: low is lower" in table
    assert "\nrow        10.00 ± 0.00  20.05 ± 0.64\n" in table
    failing = quietly(
        toy(claims=(Claim(text="high is lower", lower=toy_experiment.HIGH, higher=toy_experiment.LOW),)), folder
    )
    assert not failing.holds
    assert "DOES NOT HOLD: high is lower" in str(failing)
    assert "| high is lower | **no** |" in failing.markdown()


def test_processes_make_what_one_makes(tmp_path):
    one, two = (quietly(TOY, tmp_path / str(count), seeds=2, processes=count) for count in (1, 2))
    assert one.to_dict() == two.to_dict()
    assert sorted(log(tmp_path / "2")) == sorted(log(tmp_path / "1"))


def test_an_error_in_a_process_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"no (low|high)"):
        quietly(toy(measure=toy_experiment.refuse), tmp_path / "refused", seeds=1, processes=2)
    with pytest.raises(MemlmError, match="the process that trained low from seed 0 ended with code 3; memory may"):
        quietly(toy(measure=toy_experiment.vanish, arms={"low": ""}), tmp_path / "gone", seeds=1, processes=2)


def test_an_interrupt_ends_all_processes_and_keeps_what_is_finished(tmp_path):
    folder = tmp_path / "run"
    code = (
        "import signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it\n"
        "from toy_experiment import *\n"
        "from memlm.recipes import run_experiment\n"
        "if __name__ == '__main__':\n"
        f"    run_experiment(toy(measure=wait), {str(folder)!r}, seeds=2, processes=2, show_progress=False)\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    started = subprocess.Popen(
        [sys.executable, script], env=os.environ | {"PYTHONPATH": paths}, stderr=subprocess.PIPE, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while len(list(folder.glob("waiting-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    for path in folder.glob("waiting-*"):
        status = Path(f"/proc/{path.name.partition('-')[2]}/status")
        if status.exists():  # on Linux: whether an interrupt is shut out does not show by chance alone
            blocked = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("SigBlk"))
            assert int(blocked, 16) >> (signal.SIGINT - 1) & 1
    os.killpg(started.pid, signal.SIGINT)  # as a terminal does it: to all
    _, err = started.communicate(timeout=60)
    assert err.decode().count("KeyboardInterrupt") == 1, err.decode()
    for path in folder.glob("waiting-*"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.name.partition("-")[2]), 0)
    assert sorted(path.name for path in (folder / "measured").iterdir()) == ["low-0.json", "low-1.json"]


def test_another_run_in_the_folder_is_refused(tmp_path):
    folder = tmp_path / "run"
    quietly(TOY, folder, seeds=1)
    with pytest.raises(ConfigError, match=r"holds a run with shift = 0\.0, this one has 1\.0: another size"):
        quietly(TOY, folder, size="shifted")
    with pytest.raises(ConfigError, match="holds a run of toy; name another folder for other"):
        quietly(toy(name="other"), folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(ConfigError, match=r"holds notes\.txt, which no recipe made"):
        quietly(TOY, tmp_path / "mine")
    with pytest.raises(ConfigError, match="size is 'huge'; expected one of full, one, shifted"):
        quietly(TOY, tmp_path / "new", size="huge")
    for name in ("seeds", "processes"):
        with pytest.raises(ConfigError, match=f"{name} is 0; expected"):
            quietly(TOY, tmp_path / "new", **{name: 0})
    assert not (tmp_path / "new").exists()


def test_recipes_are_found_by_name():
    assert [item.name for item in experiments()] == sorted(item.name for item in experiments())
    assert find_experiment("trime-small").name == "trime-small"
    with pytest.raises(ConfigError, match="there is no recipe 'trime-smal'; did you mean trime-small"):
        find_experiment("trime-smal")
    with pytest.raises(ConfigError, match=r"there is no recipe 'x'; expected one of .*trime-small"):
        find_experiment("x")


@pytest.mark.parametrize("experiment", experiments(), ids=lambda item: item.name)
def test_claims_are_about_rows_of_the_table(experiment):
    assert len(set(experiment.rows)) == len(experiment.rows)
    assert len({claim.text for claim in experiment.claims}) == len(experiment.claims)
    for claim in experiment.claims:
        for place in (claim.lower, claim.higher):
            assert place.arm in experiment.arms
            assert place.row in experiment.rows


def test_the_list_on_the_command_line():
    shown, values = run("recipes", "list"), json.loads(run("recipes", "list", "--json").out)
    assert shown.code == 0
    for recipe, experiment in zip(values["recipes"], experiments(), strict=True):
        assert recipe["name"] == experiment.name
        assert f"{experiment.name}: {experiment.summary}\n" in shown.out
        for claim in recipe["claims"]:
            assert f"  - {claim}\n" in shown.out


def test_bad_input_is_refused(tmp_path):
    assert "there is no recipe 'trime'; did you mean" in refused("recipes", "run", "trime", place=tmp_path)
    wrong = refused("recipes", "run", "trime-small", "--size", "big", "-o", tmp_path / "new", place=tmp_path)
    assert "size is 'big'; expected one of full, tiny" in wrong
    (tmp_path / "file").touch()
    assert run("recipes", "run", "trime-small", "-o", tmp_path / "file").code == 2


def test_listing_is_cheap():
    code = "import sys, memlm.recipes; print(sorted({'torch', 'faiss', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
