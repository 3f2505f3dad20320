"""All stages on a CPU, with injected faults that can happen on a GPU: a unit that hangs, one that raises, one that
crashes, and an absent peer. The units after each of them must still run."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

from bench.certify.schedule import Stage
from bench.certify.unit import Context, Unit

ABSENT = "absent/peer"


def hang(context: Context) -> None:
    time.sleep(3600)


def fail(context: Context) -> None:
    raise RuntimeError("put in to see what becomes of it")


def crash(context: Context) -> None:
    os.abort()


# stage -> the fault inserted before its last unit
FAULTS = {
    "environment": Unit("a unit that raises", fail, 1),
    "checks": Unit("a unit that crashes", crash, 1),
    "head": Unit("a unit that hangs", hang, 1, limit=2),
}


@dataclass(frozen=True)
class Faulty(Stage):
    """A stage with an injected fault."""

    def units(self, context: Context) -> list[Unit]:
        *first, last = super().units(context)
        return [*first, FAULTS[self.name], last]


def prepare(stages: Sequence[Stage]) -> list[Stage]:
    """The stages of a rehearsal. Call before a kernel is imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    from bench import providers
    from tests import interpreter

    interpreter.adjust()
    providers.PROVIDERS[ABSENT] = providers.Provider(ABSENT, "absent-peer", "npo", True, _absent, _absent)
    return [(Faulty if stage.name in FAULTS else Stage)(stage.name, stage.what, 1.0, 0.0) for stage in stages]


def _absent(batch):
    import absent_peer  # noqa: F401
