"""Claims checked on records in which each is true, false or undecided: the verdict follows."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from tests.training.pretrained_records import TOKENS, WAYS, Study, Way
from training.pretrained.claims import all_findings, utility_at
from training.pretrained.claims_attacks import attacked
from training.pretrained.claims_short import halves
from training.pretrained.findings import Finding, Interval, all_of, by_count
from training.pretrained.noise import utility_share
from training.pretrained.outcomes import Outcomes, Run

Change = Callable[[Study], None]
SEEDS = (0, 1, 2)
FEW = ("ga", "npo", "npo_rt", "simnpo_rt", "dpo_rt")


def read(tmp_path, study: Study) -> Outcomes:
    return Outcomes.read(study.write(tmp_path))


def found(tmp_path, change: Change = lambda study: None) -> dict[str, Finding]:
    study = Study(ways={"forget10": {name: WAYS[name] for name in FEW}, "forget50": {"npo_rt": WAYS["npo_rt"]}})
    change(study)
    return {finding.key: finding for finding in all_findings(read(tmp_path, study))}


def ways(scenario: str = "forget10", **changes: dict) -> Change:
    def change(study: Study) -> None:
        for name, fields in changes.items():
            study.ways[scenario][name] = replace(study.ways[scenario][name], **fields)

    return change


def both(*changes: Change) -> Change:
    return lambda study: [change(study) for change in changes] and None


def extra(way: Way) -> Change:
    return lambda study: setattr(study, "extra", [("forget50", "npo_rt", way)])


def put(**fields) -> Change:
    return lambda study: [setattr(study, name, value) for name, value in fields.items()] and None


FAR = ways("forget50", npo_rt=dict(ratio=-1.3))
SAME_GA = dict(utility=WAYS["npo"].utility, pace=WAYS["npo"].pace, prob=WAYS["npo"].prob)
CASES = [
    ("collapse, forget10", True, ways()),
    ("collapse, forget10", False, ways(ga=dict(utility=0.5))),
    ("collapse, forget10", None, both(put(noise=0.15), ways(ga=dict(utility=0.26, seeds=tuple(range(9)))))),
    ("slower, forget10", True, ways()),
    ("slower, forget10", False, ways(npo=dict(utility=0.01, pace=0.1))),
    ("slower, forget10", None, ways(ga=dict(seeds=(0,)))),
    ("slower, forget10", None, ways(ga=dict(utility=0.3))),  # no collapse to slow
    ("slower, forget10", True, ways(ga=dict(utility=0.2, pace=6.0), npo=dict(utility=0.4, pace=1.0))),  # half-way less
    ("equal forgetting, forget10", True, ways()),
    ("equal forgetting, forget10", False, ways(npo=dict(utility=0.01, pace=0.3))),
    ("equal forgetting, forget10", None, ways(npo=dict(prob=0.8))),
    ("reach, forget10", True, ways()),
    ("reach, forget10", False, ways(npo_rt=dict(ratio=-1.2))),
    ("reach, forget10", None, both(put(row_noise=1.5), ways(npo_rt=dict(ratio=-0.85, seeds=tuple(range(12)))))),
    ("end, forget10", True, ways()),
    ("end, forget10", False, ways(npo_rt=dict(utility=0.3))),
    ("end, forget10", None, both(put(utility_spread=0.9), ways(npo_rt=dict(utility=0.42)))),
    ("reach, forget10", None, both(put(utility_spread=0.9), ways(npo_rt=dict(utility=0.42, pace=0.02)))),
    ("alone, forget10", True, ways()),
    ("alone, forget10", False, ways(dpo_rt=dict(ratio=0.0, utility=0.5))),
    ("alone, forget10", None, both(put(utility_spread=0.9), ways(dpo_rt=dict(ratio=0.0, utility=0.42, pace=0.02)))),
    ("weight reaches, forget50", True, both(FAR, extra(Way(0, 0.2, 0.5, 1, SEEDS, 5.0)))),
    ("weight reaches, forget50", None, both(FAR, put(utility_spread=0.9), extra(Way(0, 0.2, 0.42, 0.02, SEEDS, 5.0)))),
    ("weight reaches, forget50", False, extra(Way(-1.3, 0.2, 0.5, 1, SEEDS, 5.0))),
    ("weight reaches, forget50", None, extra(Way(0, 0.2, 0.5, 1, SEEDS, 5.0))),
    ("weight keeps, forget50", True, extra(Way(0, 0.2, 0.6, 1, SEEDS, 5.0))),
    ("weight keeps, forget50", False, extra(Way(0, 0.2, 0.4, 1, SEEDS, 5.0))),
    ("weight keeps, forget50", None, extra(Way(0, 0.2, 0.6, 1, (0,), 5.0))),
    ("short behind", True, ways(npo_rt=dict(prob=(0.4, 0.2)))),
    ("short behind", False, ways(npo_rt=dict(prob=(0.2, 0.4)))),
    ("short behind", None, ways()),
    ("short SimNPO", True, ways(npo_rt=dict(prob=(0.4, 0.2)))),
    ("short SimNPO", False, ways(simnpo_rt=dict(prob=(0.4, 0.2)))),
    ("short SimNPO", None, ways(simnpo_rt=dict(prob=WAYS["npo_rt"].prob))),
    ("short lead", True, ways(npo_rt=dict(prob=(0.4, 0.2)))),
    ("short lead", False, ways(npo_rt=dict(prob=(0.2, 0.4)))),
    ("short lead", None, ways()),
    ("relearning, npo_rt", True, ways()),
    ("relearning, npo_rt", False, put(control_relearned={"relearn5": 0.3, "relearn20": 0.6})),
    ("relearning, npo_rt", None, put(relearned={"relearn20": 0.066})),
    ("rounding, npo_rt", True, ways()),
    ("rounding, npo_rt", False, put(rounded={"int8": 0.0, "int4": -0.1})),
    ("rounding, npo_rt", None, put(rounded={"int8": 0.0, "int4": -0.03})),
]  # fmt: skip


@pytest.mark.parametrize(("key", "holds", "change"), CASES, ids=[f"{key}-{holds}" for key, holds, _ in CASES])
def test_the_verdict_follows_the_records(tmp_path, key, holds, change):
    finding = found(tmp_path, change)[key]
    assert finding.records and finding.claim.holds is holds
    assert finding.claim.measured and "nan" not in finding.claim.measured + finding.cause
    assert bool(finding.cause) == (holds is not True)


def test_what_misses_is_said(tmp_path):
    few = found(tmp_path / "little", ways(npo_rt=dict(ratio=-1.2)))["reach, forget10"]
    assert "forgets too little" in few.cause and "0 of 3 seeds" in few.claim.measured
    far = found(tmp_path / "far", ways(npo_rt=dict(ratio=3.0, pace=0.01)))["reach, forget10"]
    assert "goes too far" in far.cause
    low = found(tmp_path / "low", ways(npo_rt=dict(utility=0.1, pace=0.01)))["reach, forget10"]
    assert "never kept" in low.cause
    idle = found(tmp_path / "idle", ways(ga=dict(utility=0.5, prob=0.8)))["collapse, forget10"]
    assert "did little" in idle.cause


def test_a_longer_run_is_told_beside_the_verdict_and_does_not_change_it(tmp_path):
    """It has the forget quality and the utility; the verdict is of the runs of as many epochs as the others."""
    short = found(tmp_path / "short", FAR)
    both_lengths = found(tmp_path / "both", both(FAR, extra(replace(WAYS["npo_rt"], seeds=(0,), epochs=20))))
    outcomes = Outcomes.read(tmp_path / "both")
    usual, longer = outcomes.arm("forget50", "npo_rt"), outcomes.longer("forget50", "npo_rt")
    end = longer.runs[0].end
    share = utility_share([end], outcomes.models["retain50"], outcomes.parts).mean
    numbers = f"{end['summary']['forget_quality']:.2g}, the utility {share:.0%} ["
    told = "; after 20 epochs instead of 10 the forget quality is " + numbers
    for key in ("reach, forget50", "end, forget50"):
        assert both_lengths[key].claim == short[key].claim and short[key].claim.holds is False
        assert both_lengths[key].cause.startswith(short[key].cause + told)
    assert (usual.epochs, len(usual.runs), longer.epochs, len(longer.runs)) == (10, 3, 20, 1)
    assert outcomes.label(longer) == "NPO+RT, 20 epochs" and outcomes.label(usual) == "NPO+RT"
    assert both_lengths["weight keeps, forget50"].word == "not measured"  # one weight


def test_absent_records_are_not_measured(tmp_path):
    findings = all_findings(Outcomes.read(tmp_path))
    assert len(findings) == len({finding.key for finding in findings}) == 23
    assert all(finding.word == "not measured" and finding.cause for finding in findings)


def test_causes_and_numbers_do_not_hang_on_the_order_of_seeds(tmp_path):
    outcomes = read(tmp_path, Study())
    turned = replace(outcomes, records=outcomes.records[::-1])
    assert all_findings(outcomes) == all_findings(turned)


def slow_utility_at(prob: list[float], utility: list[float], share: float) -> float:
    """By going along the path in small pieces."""
    for i in range(len(prob) - 1):
        for part in np.linspace(0, 1, 20001):
            if prob[i] + part * (prob[i + 1] - prob[i]) <= share * prob[0]:
                return utility[i] + part * (utility[i + 1] - utility[i])
    return float("nan")


def run_of(prob: list[float], utility: list[float]) -> Run:
    numbers = zip(prob, utility, strict=True)
    summaries = [{"forget_prob": p, "utility": u} for p, u in numbers]
    return Run({"checkpoints": [{"step": i, "summary": summary} for i, summary in enumerate(summaries)]})


@pytest.mark.parametrize("share", [0.9, 0.5, 0.25, 0.1, 0.01])
def test_utility_at_a_level_is_that_of_going_along_the_path(share):
    prob, utility = [0.8, 0.9, 0.3, 0.5, 0.05], [0.5, 0.55, 0.4, 0.42, 0.1]  # first falls below, rises again
    wanted = slow_utility_at(prob, utility, share)
    assert utility_at(run_of(prob, utility), share) == pytest.approx(wanted, abs=1e-4, nan_ok=True)


def test_halves_are_split_at_the_median_length(tmp_path):
    outcomes = read(tmp_path, Study())
    split = halves(outcomes)
    assert split.short.tolist() == [bool(n <= np.median(TOKENS)) for n in TOKENS]
    runs = [run for run in outcomes.arm("forget10", "npo_rt").runs]
    least = 0.9 * outcomes.models["retain90"]["summary"]["utility"]
    retain = outcomes.models["retain90"]["rows"]["prob"]
    total = 0.0
    for i, short in enumerate(split.short):
        of_row = [(run.best(least) or run.end)["rows"]["prob"][i] - retain[i] for run in runs]
        total += short * sum(of_row) / len(of_row)
    assert split.of("npo_rt")[0].mean() == pytest.approx(total / split.short.sum())


def test_an_attack_is_held_against_the_control(tmp_path):
    outcomes = read(tmp_path, Study())
    hit = attacked(outcomes, "npo_rt", "relearn20")
    run = outcomes.arm("forget10", "npo_rt").runs[0]
    control = outcomes.models["retain90"]
    again = control["attacks"]["relearn20"]
    measures = {"before": run.end, "after": run.attacks["relearn20"], "control": again, "retain": control}
    mean = {name: np.mean(measure["rows"]["prob"]) for name, measure in measures.items()}
    assert hit.excess.mean == pytest.approx(mean["after"] - mean["control"])
    assert hit.gain.mean == pytest.approx(mean["after"] - mean["before"] - mean["control"] + mean["retain"])


def test_intervals_of_rows_are_those_of_a_plain_bootstrap():
    values = np.random.default_rng(4).gamma(2, size=40)
    rng = np.random.default_rng(11)
    means = sorted(np.mean([values[rng.integers(40)] for _ in range(40)]) for _ in range(1000))
    interval = Interval.of(values)
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(means[25], abs=0.08) and interval.high == pytest.approx(means[975], abs=0.08)
    assert Interval.of(values, values + 5).positive is False and Interval.of(np.zeros(3)).positive is None


def test_verdicts_of_parts():
    assert all_of([True, None, False]) is False and all_of([True, None]) is None and all_of([True, True]) is True
    assert by_count(np.array([True, False])) is None and by_count(np.array([False])) is False
