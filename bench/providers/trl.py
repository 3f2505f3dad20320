"""TRL's chunked head: token log-probabilities recomputed in the backward, as its DPO and KTO trainers use it."""

from torch import Tensor

from bench.cases import IGNORED, Batch
from bench.providers.base import from_tokens

VOCAB_CHUNK = 32768  # columns of a tile, as in its trainers


def tokens(batch: Batch) -> Tensor:
    """Scored positions only, as TRL's own forward does with Triton."""
    from trl.kernels import ChunkedLogProbFunction

    scored = batch.labels != IGNORED
    logps = ChunkedLogProbFunction.apply(
        batch.hidden[scored], batch.weight, None, batch.labels[scored], 1.0, VOCAB_CHUNK, batch.softcap, 1.0, ()
    )[0]
    return logps.new_zeros(scored.shape).masked_scatter(scored, logps)


PROVIDERS = [from_tokens("trl/chunked", "trl", tokens)]
