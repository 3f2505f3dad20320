"""REPORT.md and answers.md of a study on a pre-trained model, with figures. The same records give the same bytes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from training.benchmarks.tofu.claims import GOOD_QUALITY
from training.benchmarks.tofu.summary import UTILITY_PARTS
from training.methods import METHODS
from training.pretrained import costs, figures, noise, sides
from training.pretrained.claims import COMPONENTS, all_findings
from training.pretrained.claims_attacks import ATTACKS, attack_rows, mean_prob
from training.pretrained.findings import NOT_MEASURED, Finding
from training.pretrained.outcomes import (
    NEAR,
    PROB,
    QUALITY,
    SCENARIOS,
    SET_ASIDE,
    Outcomes,
    Run,
    number,
)
from training.pretrained.plan import HEADLINE
from training.pretrained.utility import LEAST, TOFU_UTILITY, UTILITY
from training.reports import tables
from training.reports.claims import CONFIDENCE, filled, versions_sentence
from training.store import write_text

REPORT, ANSWERS = "REPORT.md", "answers.md"
INLINE = 3  # questions that the report itself shows
QUICK = "A quick run on few rows, with one epoch and one seed: it shows what a report has. Its verdicts prove nothing."


def write(folder: Path) -> None:
    """Read the records in `folder` and write REPORT.md, answers.md and the figures beside them.

    Of config.json, models.json, choice.json, costs.json and runs/*.json any may be absent: what they would tell is
    "not measured". ValueError where a file is no JSON.
    """
    outcomes = Outcomes.read(folder)
    drawn = figures.write_all(folder, outcomes)
    write_text(folder / ANSWERS, sides.page(outcomes))
    write_text(folder / REPORT, markdown(outcomes, drawn))


def markdown(outcomes: Outcomes, drawn: dict[str, list[str]]) -> str:
    """`drawn`: the figures that there are, as `figures.write_all` gives them."""
    findings = all_findings(outcomes)
    sections = [
        "# Unlearning a pre-trained language model",
        QUICK if "--quick" in (outcomes.config or {}).get("command", "") else "",
        filled(f"**{headline(findings)}**"),
        *_images(drawn["trade_off"], "Forget quality against utility", figures.TRADE_OFF),
        "## What agrees with the papers, and what does not",
        claims_table(findings),
        filled(
            f"In brackets intervals of {CONFIDENCE:.0%}: Student's over the seeds, of differences within a seed, or "
            "of resampled rows where it says one seed, of short and long answers and of shares of the retain model's "
            "utility; else the smallest and the largest of the seeds. *Cannot tell*: the interval has 0 in it, or "
            f"{NEAR:.0%} where it is of a share, or the seeds do not agree. Best checkpoint: of the highest forget "
            f"quality among those after the start with {NEAR:.0%} of the retain model's utility; *none* or 0 where no "
            "checkpoint has that."
        ),
        "## Figures",
        *_images(drawn["bars"], "Forget quality and utility, by method", figures.BARS),
        *_images(drawn["collapse"], "Utility over the steps", figures.COLLAPSE),
        *_images(drawn["attacks"], "After relearning and rounding", figures.ATTACKS),
        attacks_table(outcomes),
        "## All runs",
        runs_table(outcomes),
        "## How far the numbers can be trusted",
        *noise_section(outcomes),
        "## How the learning rates and retain weights were chosen",
        *choice_section(outcomes),
        "## What it cost",
        costs_section(outcomes),
        "## Questions before and after",
        *sides.excerpt(outcomes, INLINE, ANSWERS),
        "## What was run",
        *setting_section(outcomes),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def headline(findings: list[Finding]) -> str:
    """Two or three sentences, from the verdicts."""
    by_key = {finding.key: finding for finding in findings}
    holds = [finding.claim.holds for finding in findings if finding.records]
    if not holds:
        return "Nothing was measured yet."
    sentences = []
    places: dict[bool | None, list[str]] = {}
    for scenario in SCENARIOS:
        reach = by_key[f"reach, {scenario}"]
        if reach.records:
            seeds = reach.claim.measured.split(";")[0]
            places.setdefault(reach.claim.holds, []).append(f"{scenario} ({seeds})")
    for holds_there, named in places.items():
        what = f"a forget quality above {GOOD_QUALITY} with the retain model's utility in {' and '.join(named)}"
        verb = {True: "reaches", False: "does not reach", None: "cannot be said here to reach"}[holds_there]
        sentences.append(f"NPO+RT {verb} {what}.")
    falls = [by_key[f"collapse, {s}"].claim.holds for s in SCENARIOS if by_key[f"collapse, {s}"].records]
    slows = [by_key[f"slower, {s}"].claim.holds for s in SCENARIOS if by_key[f"slower, {s}"].records]
    if falls:
        first = "GA collapses" if all(falls) else "GA does not collapse everywhere"
        second = "NPO slows that" if all(slows) else "that NPO slows it is not shown everywhere"
        sentences.append(f"{first}{'; ' + second if slows else ''}.")
    counts = {True: holds.count(True), False: holds.count(False), None: holds.count(None)}
    missing = len(findings) - len(holds)
    sentences.append(
        f"Of {len(holds)} claims of papers {counts[True]} agree, {counts[False]} do not, {counts[None]} cannot be told"
        + (f"; {missing} more were not measured." if missing else ".")
    )
    return " ".join(sentences)


def claims_table(findings: list[Finding]) -> str:
    rows = [[finding.word, finding.claim.text, finding.claim.measured, finding.cause] for finding in findings]
    return tables.markdown(["", "claim", "measured", "cause, where it does not hold or cannot be told"], rows, text=4)


def attacks_table(outcomes: Outcomes) -> str:
    rows = [
        [label, mean_prob(measures[""]), *(mean_prob(measures[a]) if a in measures else None for a in ATTACKS)]
        for label, _, measures in attack_rows(outcomes)
    ]
    table = tables.markdown(["forget probability", "before", *ATTACKS.values()], rows) if rows else ""
    return table or f"Relearning and rounding: {NOT_MEASURED}."


def runs_table(outcomes: Outcomes) -> str:
    """Models first, then each run: at the end, and at the best checkpoint."""
    if not (outcomes.models or outcomes.arms):
        return NOT_MEASURED.capitalize() + "."
    last = ["forget_prob", "forget_rougeL", "forget_repetition"]
    rows: list[list[Any]] = [
        [name, "", *[""] * 3, *(_cell(number(measure, key)) for key in (QUALITY, UTILITY, TOFU_UTILITY)), "", "", ""]
        + [_cell(number(measure, key)) for key in last]
        for name, measure in outcomes.models.items()
    ]
    for scenario, arms in outcomes.arms.items():
        for arm in arms:
            for run in arm.runs:
                best = run.best(outcomes.least_utility(scenario))
                label = METHODS[arm.method].label + outcomes.more_epochs(arm)
                row = [label, scenario, f"{run.lr:g}", _weight(arm.retain_weight), run.seed]
                row += [_cell(number(run.end, key)) for key in (QUALITY, UTILITY, TOFU_UTILITY)]
                row += [_cell(number(best, key)) for key in (QUALITY, UTILITY)] + [best["step"] if best else None]
                rows.append(row + [_cell(number(run.end, key)) for key in last])
    headings = ["model", "scenario", "lr", "retain weight", "seed", "FQ, end", "utility, end", "TOFU's", "FQ, best"]
    headings += ["utility, best", "step, best", "forget prob", "forget ROUGE-L", "repetition"]
    return tables.markdown(headings, rows, text=2)


def _cell(value: float) -> float | None:
    return None if np.isnan(value) else value


def _weight(weight: float | None) -> str:
    return "-" if weight is None else f"{weight:g}"


def noise_section(outcomes: Outcomes) -> list[str]:
    headings = ["scenario", "against the retain model", *(f"n = {n}" for n in noise.FEWER)]
    headings += [f"n = {n}, with replacement" for n in noise.MORE]
    rows = [
        [scenario, name, *(noise.resampled(*pair, n).words() for n in noise.FEWER + noise.MORE)]
        for scenario in SCENARIOS
        for name, pair in noise.pairs(outcomes, scenario).items()
    ]
    least = [
        [n, f"{noise.detectable_rows(n) / n:.2f}", f"{noise.detectable_shift(n):.2f}"] for n in noise.FEWER + noise.MORE
    ]
    ceilings = [
        f"{scenario} p = {noise.ceiling(outcomes, scenario):.2g}"
        for scenario in SCENARIOS
        if np.isfinite(noise.ceiling(outcomes, scenario))
    ]
    return [
        filled(
            "The ceiling is a retain model of another seed, against the retain model: "
            + (", ".join(ceilings) or NOT_MEASURED)
            + "."
        ),
        filled(
            f"The p-value falls with the number of rows, whatever the models: medians [quartiles], {noise.DRAWS} draws "
            "of n of the rows. Beyond the rows there are, rows are drawn with replacement: what p the differences seen "
            "here would have if they were those of n rows. That takes all noise for difference, so that the other seed "
            "of the retain model falls too; it is no measurement."
        )
        if rows
        else "",
        tables.markdown(headings, rows, text=2) if rows else "",
        filled(
            "The least that the test can see at n rows: the KS statistic D of p = 0.05, and the shift between two "
            "normal distributions that has it, in their standard deviations."
        ),
        tables.markdown(["rows", "least D", "as a shift"], least, text=0),
        *utility_section(outcomes),
    ]


def utility_section(outcomes: Outcomes) -> list[str]:
    rows = [
        [scenario, name, f"{share.mean:.0%} [{share.low:.0%}, {share.high:.0%}]"]
        for scenario in SCENARIOS
        for name, share in noise.utility_shares(outcomes, scenario).items()
    ]
    left_out = {
        COMPONENTS[part]: [f"{number(m, part):.2g}" for name, m in outcomes.models.items() if name.startswith("retain")]
        for part in UTILITY_PARTS
        if part not in outcomes.parts
    }
    words = "; ".join(f"{part} ({', '.join(values)})" for part, values in left_out.items())
    return [
        filled(
            "The utility is the harmonic mean of those of TOFU's nine parts in which every retain model has at least "
            f"{LEAST}: a part near 0 would decide it alone, and a model that has nothing cannot lose it. Left out: "
            f"{words or 'none'}. TOFU's own utility, of all nine, is in the table of all runs."
        ),
        filled(
            "It is a mean over few rows too. At the end of the first seed, as a share of the retain model's, with the "
            f"interval of {CONFIDENCE:.0%} of resampled rows, the same rows of both models:"
        )
        if rows
        else "",
        tables.markdown(["scenario", "model", "utility, of the retain model's"], rows, text=3) if rows else "",
    ]


def choice_section(outcomes: Outcomes) -> list[str]:
    if not outcomes.choice:
        return [NOT_MEASURED.capitalize() + "."]
    rows = [
        [
            METHODS[c["method"]].label,
            f"{c['lr']:g}",
            _weight(c["retain_weight"] if METHODS[c["method"]].retain else None),
            *(c[key] for key in ("beta", "forget_weight")),
            *(c[key] for key in ("forget_quality", "forget_prob", "utility", "retrained_utility")),
            "yes" if c["chosen"] else "",
        ]
        for c in outcomes.choice
    ]
    headings = ["method", "lr", "retain weight", "beta", "forget weight", "forget quality", "forget prob", "utility"]
    headings += ["utility, retrained", "chosen"]
    return [
        filled(
            "On another forget set (tune), of other authors than those that are evaluated; they are among the authors "
            "that forget50 forgets. Chosen: of the settings that keep 90 % of the utility of the model retrained "
            "without half of the authors, the one with the best forget quality against that model; of NPO alone, which "
            "keeps no rows, the one with the best forget quality, since what that costs in utility is the question. "
            "A dash is the method's own setting. Methods that are not here take the setting of NPO+RT, GA+KL that of "
            "GA+RT, and GA the learning rate of NPO alone."
        ),
        tables.markdown(headings, rows),
        *set_aside_section(outcomes),
    ]


def set_aside_section(outcomes: Outcomes) -> list[str]:
    """Runs of settings that were changed after the numbers of the reported rows were seen."""
    rows = []
    for run in map(Run, outcomes.set_aside):
        label, weight = METHODS[run.record["method"]].label, _weight(run.record["retain_weight"])
        row = [label, run.record["scenario"], f"{run.lr:g}", weight, run.seed]
        rows.append(row + [_cell(number(run.end, key)) for key in (QUALITY, UTILITY, PROB, "retain_prob")])
    if not rows:
        return []
    headings = ["model", "scenario", "lr", "retain weight", "seed", "FQ, end", "utility, end", "forget prob"]
    sentence = (
        "Set aside after their numbers were seen, with settings that were chosen first and changed then; why, and what "
        f"else was changed after numbers were seen: [{SET_ASIDE}/README.md]({SET_ASIDE}/README.md)."
    )
    return [filled(sentence), tables.markdown([*headings, "retain prob"], rows, text=2)]


def costs_section(outcomes: Outcomes) -> str:
    if outcomes.costs is None:
        return NOT_MEASURED.capitalize() + "."
    headings, rows = costs.table(outcomes.costs)
    return tables.markdown(headings, rows, text=2)


def setting_section(outcomes: Outcomes) -> list[str]:
    config = outcomes.config
    parts = []
    if config:
        model, size = config["model"], config["size"]
        parts = [
            f"    {config['command']}",
            filled(
                f"{model['name']}, {model['parameters'] / 1e6:.0f} M parameters, sha256 {model['sha256'][:12]}. "
                f"{tables.settings_line(size)}. Device: {config['device']}. " + versions_sentence(config["versions"])
            ),
        ]
    starts = len({run["start"] for run in outcomes.records if "start" in run})
    if starts > 1:
        parts.append(
            f"The full model was trained {starts} times, with the same settings and seed but not the same bits."
        )
    if outcomes.arms:
        parts.append(filled(f"Seeds: {'; '.join(_seeds(outcomes, scenario) for scenario in outcomes.arms)}."))
    return [
        *(parts or [NOT_MEASURED.capitalize() + "."]),
        filled(
            f"Not as in the papers: a small model, not one of 7 B; {_authors(config)} every second question of each; "
            "a plain template of question and answer; the rows of forget10 are evaluated in both scenarios; learning "
            f"rates and retain weights are chosen here; on a CPU the arithmetic is float32, not bf16. Headline "
            f"methods: {', '.join(METHODS[name].label for name in HEADLINE)}."
        ),
    ]


def _seeds(outcomes: Outcomes, scenario: str) -> str:
    """How many each arm has; the others have one."""
    counts: dict[int, list[str]] = {}
    for arm in outcomes.arms[scenario]:
        counts.setdefault(len(arm.runs), []).append(outcomes.label(arm))
    several = [f"{n} of {', '.join(counts[n])}" for n in sorted(counts, reverse=True) if n > 1]
    ones = [f"one of {'the others' if several else 'each'}"] if 1 in counts else []
    return f"{scenario}: {', '.join([*several, *ones])}"


def _authors(config: Mapping[str, Any] | None) -> str:
    """In words, of a study whose size is known."""
    count = (config or {}).get("size", {}).get("part", {}).get("authors")
    return (
        f"{count} authors, of whom {count // 10} and {count // 2} are forgotten, not 200," if count else "few authors,"
    )


def _images(names: list[str], alt: str, caption: str) -> list[str]:
    if not names:
        return [f"{alt}: {NOT_MEASURED}."]
    return [*(f"![{alt}]({name})" for name in names), filled(caption)]
