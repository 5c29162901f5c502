"""What an adapter must hold to go out: a small TOML file, checked whole, with a digest that a decision is tied to.

The default policy is `DEFAULT_POLICY`; a file says only what is to be otherwise. Loads no torch.
"""

import hashlib
import json
import tomllib
from pathlib import Path
from typing import Annotated, Literal, Self

import tomli_w
from pydantic import Field, model_validator

from luthier.core.errors import ConfigError
from luthier.core.settings import Settings
from luthier.evaluate.scores import Kind, SuiteScores

Share = Annotated[float, Field(gt=0, le=1)]


class Floor(Settings):
    """A share that the candidate itself must reach, whatever its baselines do. Below it is a fail, without a test."""

    suite: str | None = Field(None, description="the suite it holds for; give this or `metric`")
    metric: str | None = Field(None, description="the metric of the suites it holds for, such as json-valid")
    minimum: Share = Field(description="lowest mean score that may go out")

    @model_validator(mode="after")
    def _names_one_thing(self) -> Self:
        if (self.suite is None) == (self.metric is None):
            raise ValueError("a floor holds for a suite or for a metric; give exactly one of the two")
        return self

    def holds_for(self, suite: SuiteScores) -> bool:
        """Whether this floor is about `suite`."""
        return self.suite == suite.suite if self.suite is not None else self.metric == suite.metric

    @property
    def about(self) -> str:
        """What it holds for, in words."""
        return f"suite '{self.suite}'" if self.suite is not None else f"metric '{self.metric}'"


class TaskRules(Settings):
    """What the suites of kind `task` must show: `improve`, a lower bound above 0, or `no worse`, one above -delta."""

    against_base: Literal["improve", "no worse"] = Field("improve", description="what is asked against the base")
    against_incumbent: Literal["improve", "no worse"] = Field("no worse", description="what is asked against the incumbent")


class DriftRules(Settings):
    """How far the negative log-likelihood of neutral text may rise, in nats per token: an effect size, not a test."""

    warn: float = Field(0.05, gt=0, allow_inf_nan=False, description="a rise above this is told")
    fail: float = Field(0.15, gt=0, allow_inf_nan=False, description="a rise above this is a fail")

    @model_validator(mode="after")
    def _warns_before_it_fails(self) -> Self:
        if self.warn > self.fail:
            raise ValueError(f"warn = {self.warn:g} is above fail = {self.fail:g} and would have no effect")
        return self


class SliceRules(Settings):
    """When a drop in a part of a suite is a fail of its own."""

    min_items: int = Field(30, ge=1, description="slices of fewer items are not tested")
    min_drop: Share = Field(0.05, description="smaller drops are never a fail, however certain")
    share_of_alpha: float = Field(0.2, ge=0, lt=1, description="part of alpha that is spent on slices; 0: none is tested")


class Policy(Settings):
    """What the gate asks for. Shares are of 1: 0.01 is one point."""

    name: str = Field("default", min_length=1, description="what the policy is called in reports and in the registry")
    version: int = Field(1, ge=1, description="to be raised with every change")
    kinds: tuple[Kind, ...] = Field(("task", "capability", "drift"), description="kinds of suites that must have been run")
    suites: tuple[str, ...] = Field((), description="names of suites that must have been run")
    incumbent: Literal["if given", "required", "ignored"] = Field(
        "if given", description="whether the adapter that serves now is a second baseline beside the base"
    )
    alpha: float = Field(0.05, gt=0, lt=0.5, description="chance of calling unchanged models worse, over all tests together")
    min_drop: Share = Field(0.01, description="smaller drops are never a fail, however certain")
    delta: Share = Field(0.05, description="a suite passes if a drop of this much can be ruled out")
    deltas: dict[str, Share] = Field(
        default_factory=lambda: {"formats": 0.1, "refusals": 0.1},
        description="other deltas, by suite; the two given are what the shipped suites of 160 and 120 items can tell",
    )
    pooled_delta: Share = Field(0.02, description="the same for the mean over all capability suites")
    min_clusters: int = Field(
        20, ge=2, description="a suite of fewer clusters (or single items) cannot pass: too few to resample"
    )
    power: float = Field(0.8, gt=0.5, lt=1, description="chance of a decision with the number of items that is advised")
    task: TaskRules = Field(default_factory=lambda: TaskRules.model_validate({}), description="what task suites must show")
    drift: DriftRules = Field(default_factory=lambda: DriftRules.model_validate({}), description="how far neutral text may drift")
    slices: SliceRules = Field(default_factory=lambda: SliceRules.model_validate({}), description="tests of parts of suites")
    floors: tuple[Floor, ...] = Field(
        default_factory=lambda: (Floor.model_validate({"metric": "json-valid", "minimum": 0.9}),),
        description="shares the candidate must reach",
    )
    seed: int = Field(0, ge=0, description="of the resampling, so that a decision can be repeated")

    def delta_of(self, suite: SuiteScores) -> float:
        """The drop that must be ruled out for this suite: in nats what drift fails by, else a share."""
        return self.drift.fail if suite.scale == "nats" else self.deltas.get(suite.suite, self.delta)

    def min_drop_of(self, suite: SuiteScores) -> float:
        """The smallest drop that can be a fail: in nats what drift warns of, else a share."""
        return self.drift.warn if suite.scale == "nats" else self.min_drop

    def digest(self) -> str:
        """Return a sha256 over everything the policy says."""
        said = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(said.encode()).hexdigest()

    def to_toml(self) -> str:
        """Return the policy as TOML that reads back to the same policy."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


DEFAULT_POLICY = Policy.model_validate({})


def read_policy(path: str | Path) -> Policy:
    """Return the policy of a TOML file; what it does not say is as in the default one, but it must have a name of its own.

    Raises: ConfigError for a file that cannot be read, for unknown keys (with near misses) and impossible values.
    """
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no policy file {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the policy file {path} is not TOML: {error}") from None
    except OSError as error:
        raise ConfigError(f"the policy file {path} cannot be read: {error.strerror}") from None
    policy = Policy(**values)
    if policy != DEFAULT_POLICY and policy.name == DEFAULT_POLICY.name:
        raise ConfigError(f'the policy in {path} is not the default one; give it a name of its own, as in: name = "strict"')
    return policy
