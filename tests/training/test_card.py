"""The card of a saved model: metadata that the hub reads, nothing that a name can break, the same text every time."""

import pytest
from huggingface_hub import ModelCard

from training.benchmarks.base import Column
from training.methods import METHODS
from training.reports.card import Card, hub_base

HOSTILE = "x\n---\nlicense: mit\n---\n# | <script> [a](b) `c`\x1b[2J"
COLUMNS = {"forget_prob": Column("forget prob"), "forget_quality": Column("forget quality"), "absent": Column("none")}
RESULTS = {
    "before": {"forget_prob": 0.9, "forget_quality": 1e-9},
    "after": {"forget_prob": 0.1, "forget_quality": 0.5, "step": 6},
    "after, int4": {"forget_prob": 0.3, "forget_quality": None},
}


def card(**changed):
    given = {
        "name": "npo_rt", "base": "org/model", "base_name": "model", "title": "unlearned", "settings": {"lr": 1e-5},
        "data": {"forget": (20, "ab12")}, "method": METHODS["npo_rt"], "benchmark": "TOFU", "dataset": "locuslab/TOFU",
        "columns": COLUMNS, "reference": "The reference model is the model before the first step.",
    }  # fmt: skip
    return Card(**(given | changed))


def read(text, folder):
    (folder / "README.md").write_text(text, encoding="utf-8")
    return ModelCard.load(folder / "README.md")


def test_the_hub_reads_what_was_done(tmp_path):
    found = read(card().text(RESULTS), tmp_path)
    data = found.data
    assert (data.base_model, data.datasets, data.library_name) == ("org/model", ["locuslab/TOFU"], "transformers")
    assert data.tags == ["npo_kernels", "unlearning", "npo_rt"]
    assert {r.metric_type: r.metric_value for r in data.eval_results} == {"forget_prob": 0.1, "forget_quality": 0.5}
    assert {(r.dataset_type, r.dataset_name) for r in data.eval_results} == {("locuslab/TOFU", "TOFU")}
    text = found.text
    assert "[arXiv 2404.05868](https://arxiv.org/abs/2404.05868), eq. 3" in text and METHODS["npo_rt"].formula in text
    assert "| forget prob | 0.9 | 0.1 | 0.3 |" in text and "| forget quality | 1e-09 | 0.5 | - |" in text
    assert "| forget | 20 | `ab12` |" in text and "| `lr` | 1e-05 |" in text
    assert "The reference model is" in text and "Unlearning is no guarantee" in text
    assert card().text(RESULTS) == card().text(RESULTS)


def test_a_finetuned_model_is_not_called_unlearned(tmp_path):
    found = read(card(method=None, columns={}, dataset="", base="no/such/hub/name", reference="").text({}), tmp_path)
    assert found.data.tags == ["npo_kernels", "fine-tuned"]
    assert found.data.base_model is found.data.datasets is found.data.eval_results is None
    assert "## Method" not in found.text and "## Results" not in found.text


@pytest.mark.parametrize("place", ["name", "base_name", "title", "benchmark", "dataset", "settings"])
def test_a_name_adds_nothing_to_the_card(place, tmp_path):
    plain = read(card().text(RESULTS), tmp_path)
    value = {"lr": HOSTILE} if place == "settings" else HOSTILE
    found = read(card(**{place: value}).text(RESULTS), tmp_path)
    assert found.data.to_dict().keys() == plain.data.to_dict().keys()
    assert "<script>" not in found.text.replace("\\<", "") and "\x1b" not in found.text
    lines = [text.splitlines() for text in (found.text, plain.text)]
    for start in ("#", "---", "| "):  # as many headings, rules and rows of tables
        counts = [sum(line.startswith(start) for line in some) for some in lines]
        assert counts[0] == counts[1], start


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("base_model: org/model", "org/model"),
        ("base_model: [org/model]", None),
        ("base_model: ../../etc/passwd", None),
        ("base_model: !!python/object/apply:os.getcwd []", None),
        ("base_model: {", None),
        ("tags: [x]", None),
    ],
)
def test_a_base_is_a_hub_name_that_the_card_of_a_folder_may_say(said, expected, tmp_path):
    (tmp_path / "README.md").write_text(f"---\n{said}\n---\ntext")
    assert hub_base(str(tmp_path)) == expected
    (tmp_path / "README.md").unlink()
    assert hub_base(str(tmp_path)) is None
    assert hub_base("org/model") == "org/model" and hub_base("a\nb/c") is None
