"""The general-capability suites that come with luthier, and how a suite is named: `general`, one of its parts, or a file.

The rows lie in `suite_data/`; where they come from is told in docs/capability-suite.md. No torch.
"""

from collections.abc import Sequence
from pathlib import Path

from luthier.core.errors import ConfigError, did_you_mean
from luthier.evaluate.suites import Suite, load_suite

FOLDER = Path(__file__).parent / "suite_data"
GENERAL = "general"
SHIPPED = ("neutral", "grammar", "arithmetic", "facts", "formats", "refusals")
"""The parts of `general`, in the order in which they are run: what is cheap and notices most comes first."""


def shipped_suite(name: str) -> Suite:
    """Return one of the shipped suites. Raises: ConfigError if there is none of that name."""
    if name not in SHIPPED:
        known = ", ".join(SHIPPED)
        raise ConfigError(
            f"no suite called {name!r} comes with luthier.{did_you_mean(name, (GENERAL, *SHIPPED))} There are: {known}"
        )
    return load_suite(FOLDER / f"{name}.toml")


def find_suites(named: Sequence[str | Path]) -> tuple[Suite, ...]:
    """Return the suites that are named, each once: `general` (all that are shipped), a shipped one, or a suite file by its path.

    Raises: ConfigError if a name is neither, or two different suites have the same name; DataError for rows that cannot be used.
    """
    found: dict[str, Suite] = {}
    for each in named:
        for suite in _suites_of(each):
            if found.setdefault(suite.name, suite).digest != suite.digest:
                raise ConfigError(f"two different suites are called {suite.name!r}; change the name in one of the files")
    if not found:
        raise ConfigError(f"no suite is named; give '{GENERAL}', one of {', '.join(SHIPPED)}, or a suite file")
    return tuple(found.values())


def _suites_of(named: str | Path) -> list[Suite]:
    if Path(named).suffix == ".toml":
        return [load_suite(named)]
    return [shipped_suite(name) for name in (SHIPPED if str(named) == GENERAL else [str(named)])]
