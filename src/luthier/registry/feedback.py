"""What clients say of answers, as the guardrail of an experiment hears it.

A word is about a request. The request's usage event says which arm answered and in which epoch, so nobody who speaks has to know
that there is an experiment, and what was said of another epoch does not count.
"""

from dataclasses import dataclass
from datetime import datetime
from math import isfinite

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from luthier.core.errors import ConfigError
from luthier.registry.columns import now
from luthier.registry.database import Database, insert_into
from luthier.registry.experiments import Guardrail, arms_of, check_guardrail
from luthier.registry.schema import AdapterVersion, Experiment, Surface
from luthier.registry.schema_serving import Feedback, UsageEvent
from luthier.registry.surfaces import serving_lock
from luthier.registry.versions import name_of

LONGEST_METRIC = 100
LONGEST_ID = 255


@dataclass(frozen=True)
class Rating:
    """What was said of an arm: the mean, and of how many answers."""

    mean: float
    num_answers: int


def give_feedback(
    session: Session,
    request_id: str,
    metric: str,
    value: float,
    *,
    tenant_id: int,
    key_id: int,
    at: datetime | None = None,
) -> None:
    """Keep a tenant's word on an answer of its own; a later one on the same metric replaces it.

    It may come before the answer's usage event. A word on a request that is not this tenant's is kept, and counts for nothing:
    whether there is such a request is nobody else's business.
    Raises: ConfigError for a value that is not finite, a metric without a name, or an id that is longer than any.
    """
    if not isfinite(value):
        raise ConfigError(f"{metric} is {value}; a finite number is needed")
    if not metric or len(metric) > LONGEST_METRIC:
        raise ConfigError(f"a metric's name has 1 to {LONGEST_METRIC} characters, this one {len(metric)}")
    if not request_id or len(request_id) > LONGEST_ID:
        raise ConfigError(f"the id of a request has 1 to {LONGEST_ID} characters, this one {len(request_id)}")
    said = {"value": value, "key_id": key_id, "created_at": at or now()}
    keys = {"request_id": request_id, "metric": metric, "tenant_id": tenant_id}
    statement = insert_into(session, Feedback).values(**keys, **said)
    session.execute(statement.on_conflict_do_update(index_elements=list(keys), set_=said))


def ratings(session: Session, experiment: Experiment, metric: str) -> dict[str, Rating]:
    """Return what was said of each arm in the present epoch, by the arm's name; an arm of which nothing was said is not there."""
    query = (
        select(UsageEvent.version_id, func.avg(Feedback.value), func.count())
        .join(Feedback, (Feedback.request_id == UsageEvent.request_id) & (Feedback.tenant_id == UsageEvent.tenant_id))
        .where(UsageEvent.experiment_id == experiment.id, UsageEvent.epoch == experiment.epoch, Feedback.metric == metric)
        .group_by(UsageEvent.version_id)
    )
    found = {version_id: Rating(float(mean), count) for version_id, mean, count in session.execute(query)}
    arms = arms_of(session, experiment)
    return {name: found[one.version_id] for name, one in arms.items() if one.version_id in found}


def watch(session: Session, experiment: Experiment, *, actor: str) -> str | None:
    """Hold an experiment's guardrail against what clients said, stop it if an arm is too bad, and return why; None if it goes on.

    An arm counts once as many answers of it were rated as the guardrail asks for units that saw it: one angry word stops nothing.
    """
    serving_lock(session)
    session.refresh(experiment)
    if experiment.ended_at is not None or experiment.guardrail["rule"] is None:
        return None
    rule = Guardrail(**experiment.guardrail["rule"])
    said = ratings(session, experiment, rule.metric)
    means = {arm: rating.mean for arm, rating in said.items() if rating.num_answers >= rule.exposures}
    control = name_of(session.get_one(AdapterVersion, experiment.guardrail["control"]))
    if control not in means or len(means) < 2:
        return None
    # An arm that does not count yet is given the control's mean, which is never too bad.
    measured = {arm: means.get(arm, means[control]) for arm in arms_of(session, experiment)}
    return check_guardrail(session, experiment, measured, actor=actor)


def watch_all(database: Database, *, actor: str) -> dict[str, str]:
    """Do so for every running experiment that has a guardrail, and return why it was stopped, by surface."""
    with database.reading() as session:
        running = session.scalars(select(Experiment).where(Experiment.ended_at.is_(None)))
        watched = [one.id for one in running if one.guardrail["rule"] is not None]
    stopped = {}
    for experiment_id in watched:
        with database.writing() as session:
            experiment = session.get_one(Experiment, experiment_id)
            if (why := watch(session, experiment, actor=actor)) is not None:
                stopped[session.get_one(Surface, experiment.surface_id).name] = why
    return stopped
