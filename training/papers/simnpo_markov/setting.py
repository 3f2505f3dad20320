"""Three Markov chains on ten states, and the small GPT-2s that learn their mixture.

Each chain prefers three states of its own: retain {0, 1, 2}, forget1 {3, 4, 5}, forget2 {6, 7, 8}; state 9 is nobody's.
With the leakage l = 0.2, own states S and n = 10,

    P(j | i) = (1 - l) / 3   j in S          P(j | i) = 1 / n          P(j at first) = P(j | i in S)
               l / (n - 3)   elsewhere                  for i not in S
               for i in S

(arXiv 2410.07163; numbers from the authors' code). Sequences have 20 states, those of forget2 `length`, which is what
the experiment is about. A model is given a sequence and says the next state, so that it has to infer the chain.

The reference learns all three chains, or all but forget2 where that is to be unseen; the retrained model learns retain
alone. Both start from the same weights. The authors train for 5 epochs of 20000 x 0.8 sequences in batches of 128 at a
constant 5e-4; here the same optimiser takes 200 batches of 32 at a rate that rises to 1e-3 and falls to 0, which costs
a sixteenth and ends as near to the chains.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR
from transformers import GPT2Config, GPT2LMHeadModel

from training.data import IGNORE_INDEX

NUM_STATES, LEAKAGE = 10, 0.2
OWN_STATES = {"retain": (0, 1, 2), "forget1": (3, 4, 5), "forget2": (6, 7, 8)}
LENGTH = 20  # states of a sequence, of all chains but forget2
NUM_SEQUENCES = {"retain": 10_000, "forget1": 5_000, "forget2": 5_000}
TRAIN = 0.8  # of the sequences; the others are for testing
WIDTH, LAYERS, HEADS = 128, 4, 1
TRAIN_STEPS, TRAIN_BATCH, TRAIN_LR, WARM_UP = 200, 32, 1e-3, 0.1
NUM_TEST_TOKENS = 570  # of each chain, that distances are a mean over: 30 sequences of 20 states


class Chain(NamedTuple):
    start: Tensor  # (10,) float64
    matrix: Tensor  # (10, 10) float64, a row for the state that one is in

    @classmethod
    def preferring(cls, own: tuple[int, ...], leakage: float = LEAKAGE) -> "Chain":
        start = torch.full((NUM_STATES,), leakage / (NUM_STATES - len(own)), dtype=torch.float64)
        start[list(own)] = (1 - leakage) / len(own)
        matrix = torch.full((NUM_STATES, NUM_STATES), 1 / NUM_STATES, dtype=torch.float64)
        matrix[list(own)] = start
        return cls(start, matrix)

    def sample(self, num: int, length: int, rng: torch.Generator) -> Tensor:
        """(num, length) int64 states."""
        states = [torch.multinomial(self.start, num, replacement=True, generator=rng)]
        for _ in range(length - 1):
            states.append(torch.multinomial(self.matrix[states[-1]], 1, generator=rng).squeeze(1))
        return torch.stack(states, 1)


CHAINS = {name: Chain.preferring(own) for name, own in OWN_STATES.items()}


class Case(NamedTuple):
    """A variant of the experiment."""

    length: int  # of the sequences of forget2
    seen: bool = True  # whether the reference has learned forget2

    @property
    def name(self) -> str:
        return str(self.length) if self.seen else f"{self.length}, unseen"


@dataclass(frozen=True)
class Setting:
    """The experiment of one seed and one case. Rows (N, 20) are states, with -100 behind a shorter sequence."""

    train: Mapping[str, Tensor]  # {chain: rows}
    test: Mapping[str, Tensor]  # {chain: (N, its length)}
    reference: GPT2LMHeadModel
    retrained: GPT2LMHeadModel  # on retain alone

    @cached_property
    def aims(self) -> dict[str, Tensor]:
        """{chain: (N, T - 1, 10) log-probabilities of the retrained model on the test sequences}"""
        return {chain: log_probabilities(self.retrained, rows) for chain, rows in self.test.items()}

    @cached_property
    def truth(self) -> dict[str, Tensor]:
        """{chain: (N, T - 1, 10) its own log-probabilities}"""
        return {chain: CHAINS[chain].matrix[rows[:, :-1]].log() for chain, rows in self.test.items()}


def hidden_states(model: GPT2LMHeadModel, rows: Tensor) -> Tensor:
    """(N, T, 128) last hidden states. Attention is causal: what stands behind a sequence does not matter."""
    return model.transformer(rows.clamp(min=0)).last_hidden_state


@torch.no_grad()
def log_probabilities(model: GPT2LMHeadModel, rows: Tensor) -> Tensor:
    """(N, T - 1, 10) of the next state, float64, as distances near 0 are differences of these."""
    hidden = hidden_states(model, rows[:, :-1]).double()
    return torch.log_softmax(hidden @ model.lm_head.weight.double().T, -1)


def make_settings(
    seed: int, cases: list[Case], train_steps: int = TRAIN_STEPS, on_model: Callable[[], None] = lambda: None
) -> dict[Case, Setting]:
    """Draw and train; cases share what is the same for them: retain, forget1 and the retrained model."""
    rng = torch.Generator().manual_seed(seed)
    both = {chain: _split(chain, LENGTH, rng) for chain in ("retain", "forget1")}
    after = rng.get_state()

    def trained(rows: Tensor) -> GPT2LMHeadModel:
        model = train(rows, seed, train_steps)
        on_model()
        return model

    retrained = trained(both["retain"][0])
    settings = {}
    for case in cases:
        parts = both | {"forget2": _split("forget2", case.length, rng.set_state(after))}
        learned = {chain: rows for chain, (rows, _) in parts.items()}
        test = {chain: rows for chain, (_, rows) in parts.items()}
        known = [rows for chain, rows in learned.items() if case.seen or chain != "forget2"]
        settings[case] = Setting(learned, test, trained(torch.cat(known)), retrained)
    return settings


def train(rows: Tensor, seed: int, steps: int) -> GPT2LMHeadModel:
    """AdamW on the mean NLL a state; every sequence comes once before one comes again."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = GPT2Config(
            vocab_size=NUM_STATES, n_positions=LENGTH, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_inner=WIDTH,
            activation_function="relu", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
            tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # which transformers takes from the name of a class, and GPT-2's has another
    optimizer = torch.optim.AdamW(model.parameters(), lr=TRAIN_LR)
    schedule = OneCycleLR(
        optimizer, TRAIN_LR, total_steps=steps, pct_start=WARM_UP, anneal_strategy="linear", cycle_momentum=False
    )
    for batch in batches(rows, steps, TRAIN_BATCH, torch.Generator().manual_seed(seed)):
        loss = model(input_ids=batch.clamp(min=0), labels=batch).loss  # of 10 states: nothing to fuse
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)


def batches(rows: Tensor, steps: int, size: int, rng: torch.Generator) -> list[Tensor]:
    """`steps` batches (size, T); every row comes once before one comes again."""
    rounds = -(-steps * size // len(rows))
    order = torch.cat([torch.randperm(len(rows), generator=rng) for _ in range(rounds)])
    return [rows[picked] for picked in order[: steps * size].split(size)]


def _split(chain: str, length: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Training rows (N, 20), and test sequences (M, length): as many as give the same number of predictions."""
    sequences = CHAINS[chain].sample(NUM_SEQUENCES[chain], length, rng)
    num_train = round(TRAIN * len(sequences))
    num_test = min(len(sequences) - num_train, -(-NUM_TEST_TOKENS // (length - 1)))
    rows = F.pad(sequences[:num_train], (0, LENGTH - length), value=IGNORE_INDEX)
    return rows, sequences[num_train : num_train + num_test]
