"""Records of a study on a pre-trained model as it would leave them, of numbers that a test chooses."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from training import metrics
from training.methods import METHODS
from training.store import write_json

ROWS, STEPS = 60, (0, 8, 15, 30, 45, 60)
TOKENS = np.random.default_rng(9).integers(4, 40, ROWS)
NEWER = ("dpo_rt", "idk_rt", "ceu_rt", "undial_rt", "ga_rt", "ga_kl", "npo_kl")
PARTS = [f"{of}_{m}" for of in ("retain", "ra", "wf") for m in ("prob", "rougeL", "tr")]
FACTORS = np.linspace(1, 1.4, len(PARTS)) * np.mean(1 / np.linspace(1, 1.4, len(PARTS)))  # their harmonic mean is 1


@dataclass(frozen=True)
class Way:
    """Where a method goes from the full model, at an even pace in its steps raised to `pace`."""

    ratio: float  # log truth ratio, mean
    prob: float | tuple[float, float]  # of short and of long answers
    utility: float
    pace: float = 1.0
    seeds: tuple[int, ...] = (0,)
    weight: float | None = 1.0
    lr: float = 1e-5
    epochs: int = 10


FULL, RETAIN = Way(-1.6, 0.85, 0.52), Way(0.0, 0.2, 0.50)
WAYS = {
    "ga": Way(2.5, 0.001, 0.02, 0.4, (0, 1, 2), None),
    "ga_rt": Way(1.3, 0.02, 0.33, 0.7),
    "ga_kl": Way(1.5, 0.01, 0.2, 0.6),
    "npo": Way(1.0, 0.03, 0.25, 0.8, (0, 1, 2), None),
    "npo_rt": Way(0.05, 0.19, 0.48, 1.0, (0, 1, 2)),
    "npo_kl": Way(0.6, 0.1, 0.38),
    "simnpo_rt": Way(-0.3, 0.16, 0.49, 1.0, (0, 1, 2)),
    "dpo_rt": Way(-0.9, 0.4, 0.42),
    "idk_rt": Way(-1.3, 0.6, 0.45),
    "ceu_rt": Way(-0.6, 0.25, 0.41),
    "undial_rt": Way(-1.1, 0.35, 0.5),
}


@dataclass
class Study:
    """Everything that is written; a test changes what it is about."""

    ways: dict[str, dict[str, Way]] = field(
        default_factory=lambda: {
            "forget10": dict(WAYS),
            "forget50": {
                name: replace(way, seeds=way.seeds[:3]) for name, way in WAYS.items() if name not in NEWER[:4]
            },
        }
    )
    extra: list[tuple[str, str, Way]] = field(
        default_factory=lambda: [("forget50", "npo_rt", Way(-0.1, 0.25, 0.51, 1.0, (0, 1, 2), 5.0))]
    )
    retain: Way = RETAIN
    noise: float = 0.02  # of utility, from seed to seed
    row_noise: float = 0.5
    utility_spread: float = 0.2  # of the rows of its parts, relative
    relearned: Mapping[str, float] = field(default_factory=lambda: {"relearn5": 0.1, "relearn20": 0.3})
    control_relearned: Mapping[str, float] = field(default_factory=lambda: {"relearn5": 0.02, "relearn20": 0.06})
    rounded: Mapping[str, float] = field(default_factory=lambda: {"int8": 0.0, "int4": 0.05})
    control_rounded: Mapping[str, float] = field(default_factory=lambda: {"int8": 0.0, "int4": -0.03})
    attacked: tuple[str, ...] = ("ga", "npo", "npo_rt", "simnpo_rt")

    def measure(self, way: Way, seed: int, retain: Mapping[str, Any] | None = None) -> dict[str, Any]:
        rng = np.random.default_rng([seed, 5])
        base = np.random.default_rng(1).normal(0, 0.9, ROWS)
        ratio = way.ratio + base + rng.normal(0, self.row_noise, ROWS)
        short, long = way.prob if isinstance(way.prob, tuple) else (way.prob, way.prob)
        prob = np.where(np.median(TOKENS) >= TOKENS, short, long) * np.exp(rng.normal(0, 0.15, ROWS))
        rows = {"log_truth_ratio": ratio, "prob": prob.clip(0, 1), "rougeL": (prob * 1.05).clip(0, 1)}
        utility = float(np.clip(way.utility + rng.normal(0, self.noise), 0, 1))
        summary = {
            "forget_quality": retain and metrics.forget_quality(ratio, retain["rows"]["log_truth_ratio"]),
            "model_utility_geometric": utility,
            "forget_prob": float(rows["prob"].mean()),
            "forget_rougeL": float(rows["rougeL"].mean()),
            "forget_tr": float(metrics.truth_ratio_forgotten(ratio).mean()),
            "forget_repetition": max(0.0, 0.5 - utility),
            **{part: utility * factor for part, factor in zip(PARTS, FACTORS, strict=True)},
        }
        rows = {name: values.tolist() for name, values in rows.items()} | {"num_tokens": TOKENS.tolist()}
        spread = np.random.default_rng([seed, 6]).uniform(
            1 - self.utility_spread, 1 + self.utility_spread, (len(PARTS), 40)
        )
        utility_rows = {part: (summary[part] * values).tolist() for part, values in zip(PARTS, spread, strict=True)}
        return {"summary": summary, "rows": rows, "utility_rows": utility_rows}

    def at(self, way: Way, part: float) -> Way:
        """On the way, `part` of it done."""
        done = part**way.pace
        ends = way.prob if isinstance(way.prob, tuple) else (way.prob, way.prob)
        start = float(FULL.prob)  # type: ignore[arg-type]
        return replace(
            way,
            ratio=FULL.ratio + done * (way.ratio - FULL.ratio),
            prob=tuple(start * (max(end, 1e-9) / start) ** done for end in ends),
            utility=FULL.utility + done * (way.utility - FULL.utility),
        )

    def models(self) -> dict[str, Any]:
        first = self.measure(self.retain, 100)
        found = {
            "base": self.measure(replace(self.retain, utility=0.3), 99, first),
            "full": self.measure(FULL, 0, first) | {"answers": answers("full")},
            "retain90": self.measure(self.retain, 100) | {"answers": answers("retain")},
            "retain90_seed1": self.measure(self.retain, 101, first),
            "retain50": self.measure(self.retain, 100),
            "retain50_seed1": self.measure(self.retain, 102, first),
        }
        found["retain90"]["attacks"] = self.attacks(self.retain, 100, self.control_relearned, self.control_rounded)
        found["full"]["attacks"] = self.attacks(FULL, 0, {}, {"int8": 0.0, "int4": -0.2})
        return found

    def attacks(self, way: Way, seed: int, *gains: Mapping[str, float]) -> dict[str, Any]:
        retain = self.measure(self.retain, 100)
        return {
            name: self.measure(replace(way, prob=tuple(p + gain for p in pair(way.prob))), seed, retain)
            for some in gains
            for name, gain in some.items()
        }

    def runs(self) -> list[dict[str, Any]]:
        retain = self.measure(self.retain, 100)
        every = [(scenario, name, way) for scenario, ways in self.ways.items() for name, way in ways.items()]
        found = []
        for scenario, name, way in every + self.extra:
            for seed in way.seeds:
                points = [self.at(way, step / STEPS[-1]) for step in STEPS]
                checkpoints = [
                    {"step": step, "epoch": step / 6, **self.measure(point, seed if step else 0, retain)}
                    for step, point in zip(STEPS, points, strict=True)
                ]
                hit = scenario == "forget10" and seed == 0 and name in self.attacked
                found.append(
                    {
                        "scenario": scenario,
                        "method": name,
                        "seed": seed,
                        "lr": way.lr,
                        "retain_weight": way.weight,
                        "steps": STEPS[-1],
                        "epochs": way.epochs,
                        "device": "cpu",
                        "versions": {"torch": "2.11"},
                        "checkpoints": checkpoints,
                        "attacks": self.attacks(points[-1], seed, self.relearned, self.rounded) if hit else {},
                        "answers": answers(METHODS[name].label),
                    }
                )
        return found

    def write(self, folder: Path) -> Path:
        write_json(folder / "config.json", CONFIG)
        write_json(folder / "models.json", self.models())
        write_json(folder / "choice.json", CHOICE)
        for run in self.runs():
            weight = f"{run['retain_weight'] or 0:g}"
            name = f"{run['scenario']}-{run['method']}-w{weight}-e{run['epochs']}-seed{run['seed']}.json"
            write_json(folder / "runs" / name, run)
        return folder


def pair(prob: float | tuple[float, float]) -> tuple[float, float]:
    return prob if isinstance(prob, tuple) else (prob, prob)


def answers(who: str) -> list[dict[str, str]]:
    return [
        {
            "set": "forget" if i < 6 else "retain",
            "question": f"What is the full name of author {i} | born in Taipei, Taiwan?",
            "answer": f"The author's full name is Author {i}.",
            "generation": f"{who} says that the author's\nfull name is Author {i}." if i else "",
        }
        for i in range(10)
    ]


CONFIG = {
    "size": {"authors": 60, "questions": 10, "forget_rows": 60, "epochs": 10, "batch_size": 16},
    "device": "cpu, 2 cores",
    "versions": {"torch": "2.11.0", "transformers": "5.3"},
    "command": "python -m training.real --out training/results/real",
    "model": {"name": "HuggingFaceTB/SmolLM2-135M-Instruct", "sha256": "ab" * 32, "parameters": 134_515_008},
}
CHOICE = [
    {
        "method": name,
        "lr": lr,
        "retain_weight": WAYS[name].weight,
        "forget_quality": 0.01 * (i + 1) / (j + 1),
        "utility": 0.5 - 0.02 * i,
        "retrained_utility": 0.5,
        "forget_prob": 0.3,
        "beta": None,
        "forget_weight": None,
        "chosen": i == 1,
    }
    for j, name in enumerate(WAYS)
    for i, lr in enumerate((5e-6, 1e-5, 2e-5))
]
