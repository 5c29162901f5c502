"""The model as it was when a run began: what preferences and rewards are measured against. Never a second base."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from luthier.adapt.state import roster_of
from luthier.adapt.switching import activate, disabled


@contextmanager
def reference(model: nn.Module, frozen: str | None = None) -> Iterator[None]:
    """Within the block the model is as when the run began: its base, or the adapter `frozen` where the run continues one.

    `frozen` is a copy of the first A and B, a few megabytes, attached beside the adapter that is trained.
    """
    if frozen is None:
        with disabled(model):
            yield
        return
    before = dict(roster_of(model).active)
    activate(model, frozen)
    try:
        yield
    finally:
        activate(model, before)
