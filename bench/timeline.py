"""The launches of one call as the device ran them: number, durations, and the gaps between them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Span:
    """One launch or copy on the device, in microseconds from an arbitrary start."""

    name: str
    begin: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """The launches of one call, in the order of their start."""

    spans: tuple[Span, ...]

    @property
    def total(self) -> float:
        """Microseconds from the first start to the last end."""
        return max(s.end for s in self.spans) - self.spans[0].begin

    @property
    def idle(self) -> float:
        """Microseconds in which the device was idle."""
        busy, until = 0.0, self.spans[0].begin
        for span in self.spans:
            busy += max(0.0, span.end - max(span.begin, until))
            until = max(until, span.end)
        return self.total - busy

    def by_name(self) -> dict[str, list[float]]:
        """Microseconds of each kernel, the largest sum first."""
        found: dict[str, list[float]] = {}
        for span in self.spans:
            found.setdefault(span.name, []).append(span.end - span.begin)
        return dict(sorted(found.items(), key=lambda item: -sum(item[1])))


def timeline(call: Callable[[], object], on_gpu: bool) -> Timeline:
    """Of the second of two calls, as the first compiles. On a CPU the outermost operators take the place of
    launches."""
    call()
    if on_gpu:
        torch.cuda.synchronize()
    kinds = torch.autograd.DeviceType  # type: ignore[attr-defined]  # which torch imports, and does not export
    kind = kinds.CUDA if on_gpu else kinds.CPU
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as found:
        call()
        if on_gpu:
            torch.cuda.synchronize()
    events = (e for e in found.events() if e.device_type == kind and (on_gpu or e.cpu_parent is None))
    return Timeline(ordered(Span(e.name, e.time_range.start, e.time_range.end) for e in events))


def ordered(spans: Iterable[Span]) -> tuple[Span, ...]:
    return tuple(sorted(spans, key=lambda span: (span.begin, span.end)))
