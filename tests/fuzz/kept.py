"""Calls that failed once, as `make fuzz` printed them after shrinking, and what was wrong."""

from tests.fuzz.calls import Call

KEPT = (
    # The mean of the float64 reference was divided in float32.
    Call(dtype="float64", lengths=(2, 2, 2)),
    Call(dtype="float64", lengths=(3,), normalizer=3),
    # So was SimNPO's gamma rounded there.
    Call(function="simnpo", dtype="float64", gamma=0.1),
    # float16: rows of dWeight that sequences of little weight make up had vanished next to those of large weight.
    Call(
        autocast="float16",
        lengths=(9, 5, 8, 3, 3),
        H=49,
        V=219,
        seed=100,
        spread=3.0,
        certain=-40.0,
        ignore_index=-1,
        labels="one",
        reduction="sum",
    ),
    # The reverse KL of a model and a reference that are both certain: what is lost is a unit of 1.
    Call(function="kl", lengths=(9, 13, 2, 2), spread=30.0, reverse=True, masked=False),
    Call(function="kl", lengths=(28,), spread=30.0, reverse=True, masked=False),
    # A loss of 3e-34: what the sum of 39 tokens is off by is its relative error.
    Call(lengths=(39,), V=117, seed=23, bias=True, certain=10.0, beta=1.0),
    # A normalizer that was dropped, which the calls of a run had not shown.
    Call(function="npo", lengths=(4, 4), normalizer=7),
    Call(function="simnpo", lengths=(4, 4), normalizer=7),
    # A saturated softcap: 1 - tanh^2 is off by a unit of 1.
    Call(
        function="logprob", lengths=(14, 11, 13), V=2, seed=28711517, softcap=0.5, spread=3.0, shift=False, ignored=0.3
    ),
)
