"""What of an encoded set is trained on, in numbers: shown before a run, kept with it. Never changes a row."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class LabelCoverage:
    """The label coverage of an encoded set.

    rows: texts to train on; dropped: texts left out because truncation took their whole answer; truncated: texts cut to
    max_length, dropped ones among them. split_turns: conversations the template rewrites, made one text per answer.
    tokens, labelled_tokens, share: of the rows. length_p50, _p95, _max: tokens per row (nearest rank).
    stop_token: the text of the token that ends an answer; rows_with_stop: rows whose last label is that token.
    control_text_rows: examples whose own text holds a control token, which is then read as one.
    """

    rows: int
    dropped: int
    truncated: int
    split_turns: int
    tokens: int
    labelled_tokens: int
    share: float
    length_p50: int
    length_p95: int
    length_max: int
    stop_token: str
    rows_with_stop: int
    control_text_rows: int

    @property
    def stop_in_every_row(self) -> bool:
        """Whether every row teaches the model to stop."""
        return self.rows_with_stop == self.rows

    @property
    def warnings(self) -> list[str]:
        """What a user should look at before training, one sentence each."""
        notes = []
        if self.dropped:
            notes.append(f"{self.dropped} rows are dropped: truncation left nothing of their answers. Raise max_length.")
        if not self.stop_in_every_row:
            cut = self.rows - self.rows_with_stop
            notes.append(f"{cut} of {self.rows} rows are cut before {self.stop_token!r}, so they do not teach to stop.")
        if self.control_text_rows:
            notes.append(f"{self.control_text_rows} rows hold a control token in their own text, and it is read as one.")
        return notes

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values, the two judgements included."""
        return {**asdict(self), "stop_in_every_row": self.stop_in_every_row, "warnings": self.warnings}


def nearest_rank(sorted_values: Sequence[int], share: float) -> int:
    """Return the smallest value that at least `share` of the values do not exceed."""
    return sorted_values[max(0, math.ceil(share * len(sorted_values)) - 1)]
