"""A model small enough to train in a test: four generated authors, one layer."""

from types import SimpleNamespace

import pytest

from training.benchmarks.tofu.authors import PAIRS_PER_AUTHOR, generate_authors
from training.model import build_model
from training.templates import Format
from training.tokenizer import train_tokenizer
from training.trainer import Trainer


@pytest.fixture(scope="module")
def corpus():
    """Rows, tokenizer and examples; the last author is the one to forget."""
    rows = generate_authors(4, seed=0)
    tokenizer = train_tokenizer(rows, vocab_size=500)
    plain = Format(tokenizer, "plain")
    examples = plain.encode(rows)
    cut = len(rows) - PAIRS_PER_AUTHOR
    return SimpleNamespace(rows=rows, tokenizer=tokenizer, format=plain, retain=examples[:cut], forget=examples[cut:])


def fit(model, steps) -> list[float]:
    """Train in place; the losses of the steps."""
    losses: list[float] = []
    Trainer(model, steps.config, len(steps)).train(steps, after_step=lambda metrics: losses.append(metrics.loss))
    return losses


def llama(corpus, seed=0, num_layers=1):
    return build_model(len(corpus.tokenizer), hidden_size=64, num_layers=num_layers, special_ids={}, seed=seed)


@pytest.fixture
def model(corpus):
    return llama(corpus)


@pytest.fixture
def reference(corpus):
    """A model other than the policy, of two layers."""
    return llama(corpus, seed=1, num_layers=2).eval()
