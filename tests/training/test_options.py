"""Options: one source for the command line, files, help and records; a misspelt name is refused with the nearest."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest

from training.commands.attack import AttackOptions
from training.commands.options import build, parse
from training.commands.run_folder import RunFolder
from training.commands.unlearn import UnlearnOptions

FILES = {
    "run.yaml": "preset: phi-1.5\nmethod: npo_kl\nlr: 3e-5\nout: runs/x\nfresh: true\nmicro_batch_size: 4\n"
    "eval_rows: 7\n",
    "run.toml": 'preset = "phi-1.5"\nmethod = "npo_kl"\nlr = 3e-5\nout = "runs/x"\nfresh = true\nmicro_batch_size = 4\n'
    "eval_rows = 7\n",
}


@dataclass(frozen=True)
class Few:
    """A few."""

    rows: Annotated[int, "how many"] = 3
    layout: Annotated[Literal["lists", "indexed"], "of the log"] = "lists"
    json: Annotated[bool, "print"] = False
    out: Annotated[Path | None, lambda: "where: " + "to"] = None


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_taken_and_the_command_line_counts_more(name, tmp_path):
    file = tmp_path / name
    file.write_text(FILES[name])
    options, tofu = parse(UnlearnOptions, "x", "", ["--config", str(file), "--method", "kto", "--no_fresh"])
    assert (options.preset, options.method, options.lr, options.out) == ("phi-1.5", "kto", 3e-5, Path("runs/x"))
    assert (options.epochs, options.template) == (5, "phi")  # the preset of the file
    assert not options.fresh and options.micro_batch_size == 4 and tofu.options.eval_rows == 7


def test_a_command_line_gives_what_the_class_gives(capsys):
    (options,) = parse(Few, "x", "", ["--rows", "9", "--out", "a/b", "--json"])
    assert options == Few(9, json=True, out=Path("a/b"))
    assert parse(Few, "x", "", []) == (Few(),)
    with pytest.raises(SystemExit):
        parse(Few, "x", "What it does.", ["--help"])
    said = capsys.readouterr().out
    assert all(
        text in said for text in ("What it does.", "A few.", "how many (default: 3)", "{lists,indexed}", "where: to")
    )


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("row: 7", "no such option: row; did you mean rows?"),
        ("zzz: 7", "no such option: zzz; there are rows, layout, json, out"),
        ("rows: many", "--rows"),
        ("rows: 7.5", "--rows"),
        ("layout: dicts", "--layout"),
        ("- rows", "expected lines 'option: value'"),
        ("rows: [1, 2]", "expected lines 'option: value'"),
        ("rows: {", "cannot be read"),
    ],
)
def test_a_file_that_does_not_fit_ends_with_the_reason(line, reason, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(line)
    with pytest.raises(SystemExit) as end:
        parse(Few, "x", "", ["--config", str(file)])
    assert end.value.code == 2 and reason in capsys.readouterr().err


def test_a_misspelt_word_on_the_command_line_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as end:
        parse(UnlearnOptions, "x", "", ["--learning_rate", "1e-3", "--retain_weigth", "2"])
    assert end.value.code == 2 and "--retain_weight" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no such option: retain_weigth; did you mean retain_weight"):
        build(UnlearnOptions, retain_weigth=2.0)
    for wrong in ({"preset": "llama-9"}, {"benchmark": "tofoo"}):
        with pytest.raises(ValueError, match="expected one of"):
            build(UnlearnOptions, **wrong)
        with pytest.raises(SystemExit):
            parse(UnlearnOptions, "x", "", [f"--{name}={value}" for name, value in wrong.items()])


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"epochs": 0}, "--epochs: expected more than 0, got 0"),
        ({"precision": "fp8"}, "--precision: expected one of auto, fp32, bf16, got 'fp8'"),
        ({"micro_batch_size": 2, "gradient_accumulation_steps": 2}, "got both"),
    ],
)
def test_values_that_no_run_can_have_are_refused(given, reason):
    with pytest.raises(ValueError, match=reason):
        build(UnlearnOptions, **given)


def test_the_record_of_a_run_is_a_file_that_gives_it_again(tmp_path):
    """options.yaml of the folder, through --config, is the same options."""
    chosen, tofu = build(UnlearnOptions, preset="tiny", model="base", out=tmp_path, method="simnpo_rt", beta=2.0,
                         forget_percent=5, save_model=False)  # fmt: skip
    RunFolder(tmp_path, chosen, tofu.options).begin("key")
    again, same = parse(UnlearnOptions, "x", "", ["--config", str(tmp_path / "options.yaml")])
    assert (again, asdict(same.options)) == (chosen, asdict(tofu.options))
    attack = build(AttackOptions, attack="relearn", model=tmp_path)
    RunFolder(tmp_path / "attack", attack[0], attack[1].options).begin("key")
    assert parse(AttackOptions, "x", "", ["--config", str(tmp_path / "attack" / "options.yaml")])[0] == attack[0]
    (tmp_path / "run.yaml").write_text("packing: on\nattack: quantize\n")
    with pytest.raises(SystemExit):
        parse(UnlearnOptions, "x", "", ["--config", str(tmp_path / "run.yaml")])  # attack is none of its options
    again = parse(AttackOptions, "x", "", ["quantize", "--config", str(tmp_path / "attack" / "options.yaml")])
    assert again[0].attack == "quantize"  # the command line counts more


def test_on_and_off_are_what_yaml_makes_of_them(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("packing: on\n")
    assert parse(UnlearnOptions, "x", "", ["--config", str(file)])[0].packing == "on"
    file.write_text("epochs: two\n")
    with pytest.raises(SystemExit):
        parse(UnlearnOptions, "x", "", ["--config", str(file)])
    assert f"those of --config {file}" in capsys.readouterr().err
