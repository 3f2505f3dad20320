"""README.md of a saved model: a model card, with the metadata that the Hugging Face hub reads.

huggingface_hub writes the metadata, so a name cannot break out of it; in the text names are escaped. There is no date:
the same run writes the same card.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData, metadata_load

from training.benchmarks.base import Column
from training.methods import Method
from training.reports import tables
from training.reports.run import CAVEAT, columns_of
from training.versions import commit, versions

CARD = "README.md"
Results = Mapping[str, Mapping[str, Any]]
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Card:
    """What a card says, apart from the results.

    Attributes:
        name: of the model.
        base: folder or hub name of the model that training started from, and `base_name` how it is shown.
        title: what was done, in a few words.
        settings: of the run, without paths.
        data: {kind of rows: (how many, their hash)}.
        method: of unlearning; None: fine-tuning.
        reference: how the reference log-probabilities were made, and how they were checked; "": there are none.
        benchmark: as reports show it.
        dataset: of the hub, or "".
    """

    name: str
    base: str
    base_name: str
    title: str
    settings: Mapping[str, Any]
    data: Mapping[str, tuple[int, str]]
    method: Method | None = None
    reference: str = ""
    benchmark: str = ""
    dataset: str = ""
    columns: Mapping[str, Column] = field(default_factory=dict)  # of the results

    def text(self, results: Results) -> str:
        """The file. `results`: {"before": summary, "after": summary, an attack: summary}."""
        sections = [
            f"---\n{self.metadata(results).to_yaml()}\n---",
            f"# {tables.escaped(self.name)}",
            f"{tables.escaped(self.base_name)}, {tables.escaped(self.title)}, by the training code of npo_kernels. For "
            "research on unlearning.",
            *self._method(),
            *self._results(results),
            "## Data",
            tables.markdown(
                ["rows", "number", "sha256 of the token ids"], [[k, n, f"`{h}`"] for k, (n, h) in self.data.items()]
            ),
            "## How to load it",
            '```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\nfolder = "."  # of this file\n'
            "model = AutoModelForCausalLM.from_pretrained(folder)\n"
            "tokenizer = AutoTokenizer.from_pretrained(folder)\n```",
            "## Limits",
            CAVEAT,
            "## Settings",
            tables.markdown(["setting", "value"], _escaped(self.settings), text=2),
            "## Versions",
            tables.markdown(["of", "version"], _escaped({**versions(), "commit": commit()}), text=2),
            *self._citation(),
        ]
        return "\n\n".join(sections) + "\n"

    def metadata(self, results: Results) -> ModelCardData:
        """As the hub reads it; with the results after training, and those after attacks left to the text."""
        tags = ["npo_kernels", *(["unlearning", self.method.name] if self.method else ["fine-tuned"])]
        after = columns_of(self.columns, [results.get("after", {})])
        found = [
            EvalResult(
                task_type="text-generation",
                dataset_type=self.dataset or str(self.settings.get("benchmark", "generated")),
                dataset_name=self.benchmark,
                metric_type=key,
                metric_name=heading,
                metric_value=results["after"][key],
            )
            for key, heading in after.items()
        ]
        return ModelCardData(
            base_model=hub_base(self.base),
            datasets=[self.dataset] if self.dataset else None,
            library_name="transformers",
            pipeline_tag="text-generation",
            tags=tags,
            model_name=self.name,
            eval_results=found or None,
            ignore_metadata_errors=False,
        )

    def _method(self) -> list[str]:
        if self.method is None:
            return []
        retain = {
            "nll": "the negative log-likelihood of the retain rows",
            "kl": "the KL divergence from the reference model on the retain rows",
            "activations": "the distance of activations from the reference model's on the retain rows",
        }.get(self.method.retain or "")
        return [
            "## Method",
            f"**{self.method.label}**, forget term `{self.method.formula}` ({linked(self.method.source)})"
            + (f"; retain term: {retain}." if retain else "; no retain term."),
            *([self.reference] if self.reference else []),
        ]

    def _results(self, results: Results) -> list[str]:
        shown = columns_of(self.columns, results.values())
        if not shown:
            return []
        rows = [[heading, *(summary.get(key) for summary in results.values())] for key, heading in shown.items()]
        return [f"## Results on {tables.escaped(self.benchmark)}", tables.markdown(["", *results], rows)]

    def _citation(self) -> list[str]:
        papers = re.findall(r"arXiv (\d{4}\.\d{4,5})", self.method.paper if self.method else "")
        cited = [f"the paper of the method, https://arxiv.org/abs/{paper}" for paper in papers]
        return ["## Citation", f"Please cite {' and '.join([*cited, 'npo_kernels (its CITATION.cff)'])}."]


def linked(paper: str) -> str:
    """`arXiv 2404.05868, eq. 3` with a link."""
    return re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", paper)


def hub_base(base: str) -> str | None:
    """The hub name of the model that this one was made from: itself, or what the card of its folder says."""
    folder = Path(base)
    if not folder.is_dir():
        return base if HUB_NAME.fullmatch(base) else None
    try:
        found = (metadata_load(folder / CARD) or {}).get("base_model")
    except (OSError, ValueError, yaml.YAMLError):  # no card, or not one that can be read
        return None
    return found if isinstance(found, str) and HUB_NAME.fullmatch(found) else None


def _escaped(values: Mapping[str, Any]) -> Sequence[Sequence[str]]:
    return [[f"`{k}`", tables.escaped(str(v))] for k, v in values.items() if v is not None and v != ""]
