"""Pictures with matplotlib, which is an optional extra: it is loaded when the first one is drawn, and never opens a window."""

import io
from typing import TYPE_CHECKING, Any

from luthier.core.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def make_figure(purpose: str, **settings: Any) -> "Figure":
    """Return an empty figure; `settings` are matplotlib's. Raises: MissingExtraError, saying that `purpose` needs it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "plots", purpose) from None
    return Figure(**settings)


def as_png(figure: "Figure") -> bytes:
    """Return the picture's file."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()
