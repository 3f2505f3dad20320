"""The plan of the study: models, learning rates to try, unlearning runs, and their names, in two sizes."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from training.pretrained.costs import CASES, Case
from training.pretrained.part import Part

HEADLINE = ("ga", "npo", "npo_rt", "simnpo_rt")
OTHERS = ("ga_rt", "ga_kl", "npo_kl", "idk_rt", "dpo_rt", "ceu_rt", "undial_rt")
HEAVIER = 3.0  # a retain weight of NPO+RT beside the chosen one
PERCENTS = {"forget10": 10, "forget50": 50}
FINETUNE = {"epochs": 4, "lr": 5e-4, "batch_size": 16, "micro_batch_size": 8, "warmup_epochs": 0.25}
# Sixty steps for the tenth, 75 for the half.
TENTH = {"epochs": 2, "batch_size": 2, "micro_batch_size": 2, "warmup_steps": 0.1}
HALF = TENTH | {"epochs": 1, "batch_size": 4}
ATTACKED = ("npo_rt", "simnpo_rt")  # in forget10, seed 0
CONTROLS = ("retain90",)
ROUNDED = ("int8", "int4")
RELEARNED = (5, 20)  # % of the forget set
ATTACKS = (*ROUNDED, *(f"relearn{percent}" for percent in RELEARNED))


def retrained_on(scenario: str) -> str:
    """The split for the model trained without the forget set."""
    return f"retain{100 - PERCENTS[scenario]}"


Numbers = Mapping[str, Any]


class Taught(NamedTuple):
    """A model that is fine-tuned on a split."""

    split: str
    seed: int = 0

    @property
    def name(self) -> str:
        return self.split if self.seed == 0 else f"{self.split}_seed{self.seed}"


class Tried(NamedTuple):
    """Settings that are tried on the forget set that is not reported. None: the method's own."""

    method: str
    lr: float
    retain_weight: float = 1.0
    beta: float | None = None
    forget_weight: float | None = None

    @property
    def name(self) -> str:
        others = {"beta": self.beta, "f": self.forget_weight}
        more = "".join(f"-{name}{value:g}" for name, value in others.items() if value is not None)
        return f"{self.method}-lr{self.lr:g}-w{self.retain_weight:g}{more}"


class Run(NamedTuple):
    """A run that is reported.

    `retain_weight` None: the one that was chosen, or there is no retain term. `epochs` None: those of the scenario.
    """

    scenario: str
    method: str
    seed: int
    retain_weight: float | None = None
    epochs: int | None = None
    attacked: bool = False

    @property
    def name(self) -> str:
        weight = "" if self.retain_weight is None else f"-w{self.retain_weight:g}"
        epochs = "" if self.epochs is None else f"-e{self.epochs}"
        return f"{self.scenario}-{self.method}{weight}{epochs}-seed{self.seed}"


@dataclass(frozen=True)
class Plan:
    """The size of the study. Rows a step are those to forget; as many to keep come with them."""

    part: Part = field(default_factory=Part)
    taught: tuple[Taught, ...] = (
        *(Taught(split) for split in ("retain50", "full", "retain90")),
        Taught("retain90", 1),
    )
    finetune: Numbers = field(default_factory=lambda: FINETUNE)
    unlearn: Mapping[str, Numbers] = field(default_factory=lambda: {"forget10": TENTH, "forget50": HALF, "tune": TENTH})
    evaluations: Mapping[str, int] = field(default_factory=lambda: {"forget10": 2, "forget50": 2, "tune": 1})
    max_new_tokens: int = 40
    # Other methods take the learning rate and the retain weight of one of these (`training.pretrained.choice`).
    tries: tuple[Tried, ...] = (
        Tried("npo_rt", 2e-4),
        Tried("npo_rt", 3e-4),
        Tried("simnpo_rt", 2e-4, beta=1.0, forget_weight=1.0),
        Tried("npo_rt", 3e-4, retain_weight=3.0),
        Tried("ga_rt", 1e-4),
        Tried("simnpo_rt", 3e-4, beta=1.0, forget_weight=1.0),
        Tried("ga_rt", 5e-5),
        Tried("ga_rt", 2e-4),
        Tried("simnpo_rt", 3e-4),
        Tried("npo", 1e-4),
        Tried("npo", 5e-5),
    )
    others: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: {"forget10": OTHERS, "forget50": ()})
    seeds: Mapping[str, Mapping[str, int]] = field(  # how many of each headline method
        default_factory=lambda: {
            "forget10": dict.fromkeys(HEADLINE, 3),
            "forget50": dict.fromkeys(HEADLINE, 1),
        }
    )
    heavier: Mapping[str, int] = field(default_factory=lambda: {"forget10": 3, "forget50": 1})  # of NPO+RT, `HEAVIER`
    longer: Mapping[str, int] = field(default_factory=lambda: {"forget50": 2})  # epochs of one more run of NPO+RT
    attacked: tuple[str, ...] = ATTACKED
    controls: tuple[str, ...] = CONTROLS
    attacks: tuple[str, ...] = ATTACKS
    costs: tuple[Case, ...] = CASES

    def runs(self) -> Iterator[Run]:
        """Seed by seed, the most telling ones first: the study may be read before it is complete."""
        for scenario, counts in self.seeds.items():
            for seed in range(max(*counts.values(), self.heavier[scenario])):
                for method, count in counts.items():
                    attacked = scenario == "forget10" and method in self.attacked and seed == 0
                    if seed < count:
                        yield Run(scenario, method, seed, attacked=attacked)
                if seed < self.heavier[scenario]:
                    yield Run(scenario, "npo_rt", seed, HEAVIER)
                if seed == 0 and scenario in self.longer:  # whether it is time that it lacks
                    yield Run(scenario, "npo_rt", seed, epochs=self.longer[scenario])
                if seed == 0:
                    yield from (Run(scenario, method, seed) for method in self.others[scenario])

    def evaluated(self, method: str, scenario: str) -> int:
        """How often, after the start: the others at their end."""
        return self.evaluations[scenario] if method in HEADLINE else 1

    def recipe(self) -> dict[str, Any]:
        """What all records of one study share; which runs there are may differ."""
        names = ("part", "finetune", "unlearn", "evaluations", "max_new_tokens")
        return {name: value for name, value in asdict(self).items() if name in names}


QUICK = Plan(
    part=Part(authors=20, evaluated=2, facts=2, wrong=1),
    taught=tuple(Taught(split) for split in ("retain50", "full", "retain90")),
    finetune=FINETUNE | {"epochs": 1},
    unlearn={"forget10": HALF, "forget50": HALF, "tune": HALF},
    evaluations={"forget10": 1, "forget50": 1, "tune": 1},
    max_new_tokens=12,
    tries=(Tried("npo_rt", 2e-4),),
    others={"forget10": (), "forget50": ()},
    seeds={"forget10": {"ga": 1, "npo_rt": 1}},
    heavier=dict.fromkeys(PERCENTS, 0),
    longer={},
    attacked=("npo_rt",),
    controls=("retain90",),
    attacks=("int4", "relearn20"),
    costs=(Case("smollm2-135m", ("npo_rt",), 2),),
)
SIZES = {"full": Plan(), "quick": QUICK}
