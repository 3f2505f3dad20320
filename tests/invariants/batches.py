"""What hypothesis draws: whole batches, small against the tiles in some sizes and larger in others."""

from hypothesis import strategies as st

from tests.support import DTYPES, HEADS, Batch, make_batch


def drawn(dtype, head, sequences, H, V, spread, seed) -> Batch:
    """`sequences`: (length, prompt) of each."""
    lengths, prompts = zip(*sequences, strict=True)
    return make_batch(dtype, head, lengths=lengths, prompts=prompts, H=H, V=V, spread=spread, seed=seed)


def batches(dtypes=DTYPES, heads=tuple(HEADS), max_sequences=4):
    """Padded; sequences of 0 to 10 labels, up to 3 of them prompt."""
    return st.builds(
        drawn,
        st.sampled_from(dtypes),
        st.sampled_from(heads),
        st.lists(st.tuples(st.integers(0, 10), st.integers(0, 3)), min_size=1, max_size=max_sequences),
        H=st.integers(1, 40),
        V=st.sampled_from((2, 63, 129, 450)),
        spread=st.sampled_from((0.1, 2.0, 6.0)),
        seed=st.integers(0, 2**16),
    )
