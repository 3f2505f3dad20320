"""The interface of a benchmark: rows to learn and to forget, and measures of a model.

The engine and the methods do not depend on a benchmark. The commands get everything specific from the one given by
`--benchmark`: rows, token ids, the evaluation, and the contents of tables and figures.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple, Protocol, TypeVar

from training.store import fingerprint, folder_hash, unhashed, write_json, write_record

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from rich.progress import Progress
    from transformers import PreTrainedModel

    from training.data import Example, Row
    from training.pieces import Pieces
    from training.templates import Format

REFUSALS = Path(__file__).with_name("refusals.txt")
ITSELF = (
    "--retain_log has the numbers of the model that is evaluated, and a comparison of a model with itself finds no "
    "difference, whatever it has learned; expected the log of a model that never saw the forget set"
)


class Column(NamedTuple):
    """How tables and figures show one metric of a summary."""

    heading: str
    panel: str | None = None  # heading of a figure's panel that draws it over the epochs, from 0 to 1
    p_value: bool = False  # drawn on a logarithmic axis, with a line at 0.05
    detail: bool = False  # shown of a single run, not in the table of a grid


MEMBERSHIP = {  # of `training.membership.summary`
    "mia_loss": Column("MIA loss", detail=True),
    "mia_zlib": Column("MIA zlib", detail=True),
    "mia_min_k": Column("MIA Min-K%", detail=True),
    "mia_min_k_plus_plus": Column("MIA Min-K%++", detail=True),
    "mia_gradnorm": Column("MIA gradient norm", detail=True),
    "mia_reference": Column("MIA reference", detail=True),
    "privleak": Column("PrivLeak", detail=True),
}


class Claim(NamedTuple):
    """A statement of a paper, compared with what was measured."""

    text: str
    measured: str
    holds: bool


class TradeOff(NamedTuple):
    """The two metrics of a summary that a figure plots against each other."""

    utility: str  # on the horizontal axis
    forgetting: str


@dataclass(frozen=True)
class NoOptions:
    """A benchmark without options."""


@dataclass(frozen=True)
class EvaluationOptions:
    """Options of an evaluation, for every benchmark."""

    eval_batch_size: Annotated[int, "sequences per forward or generation in evaluation"] = 32
    mia_gradnorm: Annotated[bool, "also run the membership attack on gradient norms: one backward pass per row"] = False
    fluency_classifier: Annotated[
        Path | None, "folder of a transformers text classifier; the probability of its first class is reported"
    ] = None

    def __post_init__(self):
        if self.eval_batch_size < 1:
            raise ValueError(f"--eval_batch_size: expected 1 or more, got {self.eval_batch_size}")


class Benchmark(Protocol):
    """A benchmark with its options. Methods with a body here are optional to override.

    Attributes:
        name: as `--benchmark` takes it.
        Options: a dataclass of its options, `Annotated[type, help]` with defaults; they stand beside a command's own.
        title: as reports show it.
        columns: what tables and figures show of a summary, in this order.
        legend: a sentence for what the columns are.
        trade_off: what is drawn against each other, if anything.
        world_splits: further splits that a model from nothing has to learn, as the evaluation asks about them.
    """

    name: ClassVar[str]
    Options: ClassVar[type["DataclassInstance"]] = NoOptions
    title: ClassVar[str]
    columns: ClassVar[Mapping[str, Column]]
    legend: ClassVar[str] = ""
    trade_off: ClassVar[TradeOff | None] = None
    world_splits: ClassVar[tuple[str, ...]] = ()

    options: Any

    def __init__(self, options: Any):
        self.options = options

    @property
    def scenario(self) -> str:
        """Name of the forget set in folders and reports: "forget10" if the options have a `forget_percent`."""
        percent = getattr(self.options, "forget_percent", None)
        return "forget" if percent is None else f"forget{percent:02d}"

    @property
    def retain_split(self) -> str:
        """The split for a model trained without the forget set."""
        return "retain"

    @property
    def series(self) -> str:
        """A name for successive scenarios (requests) that a report shows side by side. "": not part of a series."""
        return ""

    @property
    def follows(self) -> str | None:
        """The scenario whose unlearned model this one starts from. None: it starts from the fine-tuned model."""
        return None

    def scenarios(self, names: str) -> list["Benchmark"]:
        """This benchmark with each of the forget sets in `names`, separated by commas. ValueError if one is unknown.

        Here `names` are percents, where the options have a `forget_percent`.
        """
        if not hasattr(self.options, "forget_percent"):
            raise ValueError(f"{self.name} has one forget set; leave the option out")
        try:
            percents = list(dict.fromkeys(int(part) for part in names.split(",")))
        except ValueError:
            raise ValueError(f"expected numbers with commas between them, got {names!r}") from None
        return [type(self)(replace(self.options, forget_percent=percent)) for percent in percents]

    def rows(self, split: str) -> list["Row"]:
        """The rows of "full", "forget", "retain" or another split of the benchmark. ValueError if it is unknown."""
        ...

    def refusals(self) -> list[str]:
        """Refusals such as "I don't know", for the methods that learn or score them."""
        return read_refusals(REFUSALS)

    def alternates(self) -> list[list[str]]:
        """Other plausible answers to each of the forget rows, if the benchmark has any. `training.alternates` generates
        them otherwise."""
        return []

    def encode(self, format: "Format", rows: Iterable["Row"]) -> list["Example"]:
        """Token ids and labels. For plain text there may be more or fewer examples than rows."""
        return format.encode(rows)

    def evaluate(self, model: "PreTrainedModel", format: "Format", pieces: "Pieces", progress: "Progress") -> Any:
        """Measure the model row by row, as much as `summarize` needs. `model` has a fused head; its mode is changed.

        Long work goes through `pieces.rows`, so that an interrupted evaluation can resume.
        """
        ...

    def summarize(self, measures: Any, retrained: Any = None) -> dict[str, float | None]:
        """The metrics of a report. `retrained`: measures of a model trained without the forget set."""
        ...

    def table(self, summary: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
        """(headings, rows) of one summary."""
        shown = {key: column.heading for key, column in self.columns.items() if summary.get(key) is not None}
        return list(shown.values()), [[summary[key] for key in shown]]

    def headline(self, summary: Mapping[str, Any]) -> str:
        """A sentence above the table."""
        return ""

    def size(self) -> dict[str, int]:
        """Size of the evaluation: {set: number of rows}."""
        return {}

    def samples(self, measures: Any) -> list[dict[str, str]]:
        """A few {"set", "question", "answer", "generation"} for a report."""
        return []

    def warnings(self, measures: Any) -> list[str]:
        """Warnings about the measures that do not prevent the metrics."""
        return []

    def doubts(self, measures: Any, retrained: Any) -> list[str]:
        """Reasons to doubt the comparison with `retrained`, such as measures of the wrong model."""
        return []

    def open_unlearning(self, measures: Any, summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """{file name: content} in the format of OpenUnlearning's evaluations."""
        raise ValueError(f"--format open_unlearning: {self.name} is no benchmark of OpenUnlearning")

    def demo_files(self) -> dict[str, str]:
        """{relative path: text} of a small data set in the benchmark's own files: the data of `--data_dir demo`."""
        raise ValueError(f"{self.name} has no generated data in files")

    def check(self, measures: Any) -> None:
        """ValueError if the measures are not of the rows that are evaluated with these options."""

    def losses(self, measures: Any, format: "Format", number: int) -> tuple[list["Example"], list[float]]:
        """At most `number` examples, and their negative log-likelihoods in nats according to the measures.

        Used to check that the measures are of a given model. Empty if the measures have none.
        """
        return [], []

    def read(self, path: Path) -> Any:
        """Read measures from a file. ValueError if it is not an evaluation."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as reason:
            raise ValueError(
                f"{path}: expected an evaluation of --benchmark {self.name}, got no JSON: {reason}; evaluate the "
                "model again"
            ) from None
        return unhashed(content, path)

    def write(self, path: Path, measures: Any) -> None:
        write = write_record if isinstance(measures, dict) else write_json
        write(path, measures)

    def key(self) -> str:
        """A hash of everything that the measures depend on, except the model."""
        return fingerprint([self.name, options_in_key(self.options)])

    def claims(self, start: Mapping[str, Any], histories: Mapping[str, Sequence[Sequence[Mapping]]]) -> list[Claim]:
        """Claims of papers that a grid can test, from the summary before and {method: histories of its seeds}."""
        return []


def options_in_key(options: "DataclassInstance", without: Iterable[str] = ()) -> dict[str, str]:
    """The options for a key. A folder is represented by the hash of its contents."""
    given = {name: value for name, value in asdict(options).items() if name not in without}
    return {k: folder_hash(v) if isinstance(v, Path) and v.is_dir() else str(v) for k, v in given.items()}


BENCHMARKS: dict[str, type[Benchmark]] = {}
Class = TypeVar("Class", bound=type[Benchmark])


def register(benchmark: Class) -> Class:
    """Add a benchmark to the registry, as a decorator of its class."""
    if benchmark.name in BENCHMARKS:
        raise ValueError(f"benchmark {benchmark.name}: there is one of that name already; choose another")
    BENCHMARKS[benchmark.name] = benchmark
    return benchmark


def read_refusals(file: Path) -> list[str]:
    """One a line."""
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{file.name}: expected one refusal a line, got an empty file")
    return lines
