"""The inspector shows the tokens that are trained on, in colour, with and without a tokenizer of one's own."""

import io
import json
import re

import pytest
from rich.console import Console

from training.commands.show_rows import ShowRowsOptions, main
from training.data import IGNORE_INDEX


def shown(options, colour=False):
    out = io.StringIO()
    example = main(
        options, Console(file=out, width=160, force_terminal=colour, color_system="truecolor" if colour else None)
    )
    return example, out.getvalue()


@pytest.fixture
def data_dir(tmp_path, corpus):
    (tmp_path / "forget10.json").write_text("".join(json.dumps(row) + "\n" for row in corpus.rows[-20:]))
    return tmp_path


def test_every_token_is_listed(data_dir, corpus):
    corpus.tokenizer.save_pretrained(data_dir / "tokenizer")
    options = ShowRowsOptions(tokenizer=data_dir / "tokenizer", data_dir=data_dir, row=3)
    example, text = shown(options)
    assert example == corpus.forget[3]
    lines = re.findall(r"^ +(\d+) +(\d+) +('.*?'|\".*?\") *(yes)? *$", text, re.MULTILINE)
    assert [(int(p), int(i), bool(scored)) for p, i, _, scored in lines] == [
        (p, i, label != IGNORE_INDEX) for p, (i, label) in enumerate(zip(*example, strict=True))
    ]
    assert eval(lines[-1][2]) == "<eos>" and eval(lines[0][2]) == "<bos>"
    scored = sum(label != IGNORE_INDEX for label in example.labels)
    assert f"this row: {len(example.labels)} tokens, {scored} scored" in text
    total = sum(label != IGNORE_INDEX for e in corpus.forget for label in e.labels)
    assert f"the split: 20 rows, {sum(len(e.labels) for e in corpus.forget)} tokens, {total} scored" in text
    assert "template plain, ends with 2 '<eos>'" in text
    assert shown(ShowRowsOptions(model=data_dir / "tokenizer", data_dir=data_dir, row=3))[1] == text


def test_scored_tokens_are_coloured(data_dir, corpus):
    example, text = shown(ShowRowsOptions(data_dir=data_dir, row=3), colour=True)
    scored = sum(label != IGNORE_INDEX for label in example.labels)
    assert len(re.findall(r"\x1b\[1;32m *yes", text)) == scored
    answer = re.search(r"\x1b\[1;32m(.*?)\x1b\[0m", text, re.DOTALL)[1]
    assert answer.strip() == f"{corpus.rows[-17]['answer']}<eos>"


def test_generated_authors_need_nothing():
    example, text = shown(ShowRowsOptions(split="world_facts_perturbed", template="phi-npo-repo"))
    assert "Aarhus" in text and "template phi-npo-repo" in text and example.labels[0] == IGNORE_INDEX


def test_what_is_not_there_is_said(data_dir):
    for options, reason in (
        ({"row": 20, "data_dir": data_dir}, "forget10 has the rows 0 to 19, got 20"),
        ({"split": "forget01"}, r"generated authors have forget05, .*, got forget01"),
        ({"split": "retain90", "data_dir": data_dir}, r"retain90\.json is not in .*, which has forget10\.json"),
        ({"template": "qwen"}, "has no chat template"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=reason):
            shown(ShowRowsOptions(**options))
