"""TokenRows: the trained rows of a table, for a few tokens, without a copy of the table.

Row v of the table is replaced, for v among the adapter's tokens; everywhere else the base is untouched. An output head that
shares the table's weight gets the same rows: its logit of token v becomes h row_v.

Shape letters: N trained tokens, V rows of the table, O its columns; `...` any leading axes.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TokenRows(nn.Module):
    """rows (N, O) in float32, instead of the rows `indices` (N,) of a table (V, O). `is_tied`: they belong to another module."""

    indices: Tensor

    def __init__(self, indices: Tensor, rows: nn.Parameter, *, is_tied: bool = False):
        super().__init__()
        self.register_buffer("indices", indices, persistent=False)
        self.rows = rows
        self.is_tied = is_tied

    def put_into(self, module: nn.Module, output: Tensor, x: Tensor) -> Tensor:
        """Return what `module`, an embedding or a linear layer, computes for `x` with these rows; `output` is without them."""
        return self._looked_up(module, output, x) if isinstance(module, nn.Embedding) else self._as_head(module, output, x)

    def written_into(self, weight: Tensor) -> Tensor:
        """Return a copy of the table with the rows in it."""
        return weight.detach().index_copy(0, self.indices, self.rows.detach().to(weight.dtype))

    def _looked_up(self, table: nn.Embedding, output: Tensor, ids: Tensor) -> Tensor:
        tokens, order = self.indices.sort()
        place = torch.searchsorted(tokens, ids).clamp(max=len(tokens) - 1)
        is_trained = (tokens[place] == ids).unsqueeze(-1)
        padding = None if table.padding_idx is None else (self.indices == table.padding_idx).nonzero().flatten().tolist()
        # A padding row that is among them is looked up, and gets no gradient, as in the table itself.
        rows = F.embedding(order[place], self.rows, padding[0] if padding else None).to(output.dtype)
        embed_scale = getattr(table, "embed_scale", None)
        return torch.where(is_trained, rows if embed_scale is None else rows * embed_scale, output)

    def _as_head(self, head: nn.Module, output: Tensor, x: Tensor) -> Tensor:
        # The change is added, not the logit replaced: a product of few rows may round otherwise than the whole one, and a fresh
        # adapter must change nothing.
        change = (self.rows - cast(Tensor, head.weight)[self.indices]).to(x.dtype)
        return output.index_add(-1, self.indices, F.linear(x, change).to(output.dtype))
