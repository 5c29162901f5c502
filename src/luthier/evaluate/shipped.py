"""The general-capability suites that come with luthier, and what a suite may be called: `general`, a part of it, or by path.

The rows lie in `suite_data/`; where they come from is told in docs/capability-suite.md. No torch.
"""

from collections.abc import Sequence
from pathlib import Path

from luthier.core.errors import ConfigError, did_you_mean
from luthier.evaluate.public import find_suite
from luthier.evaluate.suites import Suite, load_suite

FOLDER = Path(__file__).parent / "suite_data"
GENERAL = "general"
SHIPPED = ("neutral", "grammar", "arithmetic", "facts", "formats", "refusals")
"""The parts of `general`, in the order in which they are run: what is cheap and notices most comes first."""


def shipped_suite(name: str) -> Suite:
    """Return one of the shipped suites. Raises: ConfigError if there is none of that name."""
    if name not in SHIPPED:
        near = did_you_mean(name, (GENERAL, *SHIPPED))
        raise ConfigError(
            f"no suite called {name!r} comes with luthier.{near} There is '{GENERAL}', which is all of {', '.join(SHIPPED)}; "
            "a suite file ends in .toml, and a public suite is NAME=PATH"
        )
    return load_suite(FOLDER / f"{name}.toml")


def find_suites(named: Sequence[str | Path]) -> tuple[Suite, ...]:
    """Return the suites that are named, each once: `general` (all that are shipped), a shipped one, or what `find_suite` takes.

    Raises: ConfigError if a name is none of these, or two different suites have the same name; DataError for unusable rows.
    """
    found: dict[str, Suite] = {}
    for each in named:
        for suite in _suites_of(str(each)):
            if found.setdefault(suite.name, suite).digest != suite.digest:
                raise ConfigError(f"two different suites are called {suite.name!r}; change the name in one of the files")
    if not found:
        raise ConfigError(f"no suite is named; give '{GENERAL}', one of {', '.join(SHIPPED)}, or a suite file")
    return tuple(found.values())


def _suites_of(named: str) -> list[Suite]:
    if named.endswith(".toml") or "=" in named:
        return [find_suite(named)]
    return [shipped_suite(name) for name in (SHIPPED if named == GENERAL else [named])]
