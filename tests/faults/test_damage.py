"""Files that were cut or have another bit, and rows that changed: never another result, and the file is named."""

import json
import re

import pytest

from tests.faults.child import Fault
from tests.faults.runs import check_refused, run_to_end, succeeded
from tests.faults.subjects import AUTHORS, SMALL, copied

ADVICE = r"--fresh|again|remove|another folder|compute"
CHUNKS = 4


def damaged(path, how, rng):
    """The file with what is done to it; False where it is empty."""
    content = bytearray(path.read_bytes())
    if not content:
        return False
    if how == "cut":
        content = content[: rng.randrange(len(content))]
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return True


def check_not_believed(subject, case, path, what):
    """The run ends with the right bits, or says which file it is and what to do."""
    ended = subject.run(case)
    try:
        if ended.code == 0:
            found = subject.differences(case)
            if found == [f"with other bits: {path}"] and path.parent.name == "eval":  # a log that is not read any more
                log = run_to_end(f"evaluate {AUTHORS} --from_log {case / path}".split(), case)
                check_refused(log, re.escape(path.name), ADVICE)
            else:
                assert not found, f"another result: {'; '.join(found)}\n{ended.output}"
        else:
            names = "|".join(re.escape(part) for part in path.parts[-2:])
            check_refused(ended, names, ADVICE)
    except AssertionError as error:
        return [f"{path} {what}: {error}"]
    return []


@pytest.fixture(scope="module")
def stopped(subjects, tmp_path_factory):
    """{command: a folder of a run that was stopped late, with checkpoint, cache, logs and pieces of an evaluation}"""
    cases = {}
    for name in ("unlearn", "finetune", "evaluate"):
        subject, cases[name] = subjects[name], tmp_path_factory.mktemp(f"stopped_{name}")
        wanted = "save" if name == "finetune" else "evaluation"
        marks = [mark.text for mark in subject.whole.marks]
        last = max(i for i, text in enumerate(marks) if text == f"end {wanted}")
        events = [text for text in marks[:last] if text.startswith("event ")]
        subject.run(cases[name], Fault(len(events), "before"))
    assert list(cases["unlearn"].rglob("checkpoint-*")) and list(cases["unlearn"].rglob("*pieces/*.json"))
    return cases


@pytest.mark.parametrize("chunk", range(CHUNKS))
@pytest.mark.parametrize("how", ["cut", "flipped"])
@pytest.mark.parametrize("name", ["unlearn", "finetune", "evaluate"])
def test_damage_of_a_stopped_run(name, how, chunk, subjects, stopped, rng, tmp_path, tried):
    """Any of its files: checkpoint, cache, records, logs, pieces."""
    files = sorted(
        p.relative_to(stopped[name]) for p in stopped[name].rglob("*") if p.is_file() and p.suffix != ".lock"
    )
    failures = []
    for number, file in enumerate(files[chunk::CHUNKS]):
        case = copied(stopped[name], tmp_path / f"{number}")
        if damaged(case / file, how, rng):
            failures += check_not_believed(subjects[name], case, file, how)
            tried(f"damaged files: {how}")
    assert not failures, "\n\n".join(failures)


@pytest.mark.parametrize("name", ["unlearn", "finetune", "evaluate"])
def test_damage_of_a_finished_run(name, subjects, rng, tmp_path, tried):
    """Its records, by which it is found and is not run again."""
    subject, failures = subjects[name], []
    whole = subject.folder / f"whole {name}"
    assert subject.expected
    for number, file in enumerate(("run.json", "config.json", "metrics.json")):
        for how in ("cut", "flipped"):
            case = copied(whole, tmp_path / f"{number}{how}")
            path = case / "run" / "out" / file
            assert damaged(path, how, rng)
            failures += check_not_believed(subject, case, path.relative_to(case), how)
            tried(f"damaged files: {how}")
    assert not failures, "\n\n".join(failures)


def changed(data):
    """One answer to forget is another one."""
    path = data / "forget05.json"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[3]["answer"] = "Something else."
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("where", ["checkpoint", "cache"])
def test_rows_that_changed(where, subjects, tmp_path, tried):
    """Under a checkpoint, and under a cache that a new run is given."""
    home = subjects["unlearn"].home
    data = copied(home / "data", tmp_path / "data")
    command = (
        f"unlearn {SMALL} --data_dir {data} --forget_percent 5 --eval_rows 2 --max_new_tokens 1 --method npo "
        f"--epochs 1 --lr 1e-4 --save_steps 1 --eval_steps 0 --model {home}/full/model --reference_cache ../cache"
    ).split()
    first = run_to_end([*command, "--out", "out"], tmp_path / "case" / "run")
    succeeded(first)
    saved = [k for k, event in enumerate(first.events) if "run/out/checkpoint-" in event]
    run_to_end([*command, "--out", "stopped"], tmp_path / "case" / "run", Fault(saved[0] + 1, "before"))
    changed(data)
    out = "stopped" if where == "checkpoint" else "new"
    ended = run_to_end([*command, "--out", out], tmp_path / "case" / "run")
    expected = (r"other settings, data or weights", "--fresh") if where == "checkpoint" else ("another data", "again")
    check_refused(ended, *expected)
    tried("changed rows")
