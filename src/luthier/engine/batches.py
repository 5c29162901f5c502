"""Which rows run together when nothing is learnt from them: rows of like length, so that little is padded.

Only indices, no tensors, no shuffling: training plans its epochs in `luthier.data`.
"""

from collections.abc import Sequence


def batches_by_length(lengths: Sequence[int], *, max_tokens: int | None = None, max_rows: int | None = None) -> list[list[int]]:
    """Return batches of row indices, longest rows first: a batch that does not fit into memory fails at once, not at the end.

    A batch costs rows x its longest row, at most `max_tokens`; a longer row gets a batch of its own. Every row comes once.
    """
    batches: list[list[int]] = []
    longest = 0
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        rows = len(batches[-1]) + 1 if batches else 1
        has_room = (max_rows is None or rows <= max_rows) and (max_tokens is None or rows * longest <= max_tokens)
        if batches and has_room:
            batches[-1].append(row)
        else:
            batches.append([row])
            longest = lengths[row]
    return batches
