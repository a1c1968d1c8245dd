"""Publish users who are done: each becomes a version, or is told why not; nobody's trouble is a neighbour's."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from flows.candidates import Candidate
from flows.factory import Factory, now
from flows.finished import finished
from flows.hands import brief
from flows.logs import event
from flows.outgoing import Done
from registry.errors import LeaseLost, RegistryError
from registry.jobs import ClaimedJob
from registry.names import JobId
from registry.publishing import Finished, Outcome, Published, publish_together

if TYPE_CHECKING:
    from flows.cohort import Cohort


def publish_some(factory: Factory, cohort: "Cohort", done: Sequence[Done]) -> None:
    """Publish users' versions, here and nowhere else; one whose job went to another worker is left to it.

    Whoever is published already, or not here any more, is passed over.  Raises RegistryError, once everybody who can be
    is published; whatever else ails one of them costs that one an attempt.
    """
    here = {job.id: job for job, _ in list(cohort.work.values()) if job.id not in cohort.versions}
    done = [(job, candidate) for job, candidate in done if here.get(job.id) == job]
    finals = [(job, _final(cohort, job, candidate)) for job, candidate in done]
    ready = {job.id: (job, final) for job, final in finals if isinstance(final, Finished)}
    outcomes: dict[JobId, Outcome] = {job.id: final for job, final in finals if isinstance(final, Exception)}
    outcomes |= publish_together(factory.engine, factory.store, list(ready.values()), now(), factory.signer)
    troubles: list[RegistryError] = []
    for job, candidate in done:
        outcome = outcomes[job.id]
        if isinstance(outcome, Published):
            _, final = ready[job.id]
            event("version published", job, run=cohort.run_id, version=outcome.number, accepted=outcome.accepted,
                  reason=final.reason, tokens=final.tokens, device_seconds=final.device_seconds)  # fmt: skip
            _settle(cohort, job, candidate, outcome)
        elif isinstance(outcome, RegistryError) and not isinstance(outcome, LeaseLost):
            event("not published", job, logging.ERROR, run=cohort.run_id, reason=str(outcome))
            troubles.append(outcome)
        else:
            _leave(cohort, job, outcome)
    if troubles:
        raise troubles[0]


def _final(cohort: "Cohort", job: ClaimedJob, candidate: Candidate) -> Finished | Exception:
    """A candidate as files and facts, or what is wrong with it."""
    try:
        return finished(cohort.backstage, cohort.run_id, cohort.bank, job, candidate, cohort.meter)
    except Exception as error:  # whatever it is, it is this user's
        return error


def _leave(cohort: "Cohort", job: ClaimedJob, why: Exception) -> None:
    """One user leaves the cohort unpublished: the job is somebody else's, or to be tried again."""
    if isinstance(why, LeaseLost):
        event("lease lost", job, logging.WARNING, run=cohort.run_id, reason=str(why))
        cohort.hands.let_go(job)
    else:
        cohort.hands.put_back(job, brief(why))
    cohort.failed[job.reference.label] = brief(why)
    del cohort.work[job.id]


def _settle(cohort: "Cohort", job: ClaimedJob, candidate: Candidate, version: Published) -> None:
    """One user is safe elsewhere: forget what was kept for them here."""
    cohort.hands.let_go(job)
    for learner in candidate.learners:
        cohort.saves.drop(learner.name)
    cohort.shelf.clear(job)
    candidate.slim()
    cohort.versions[job.id] = version
    cohort.failed.pop(candidate.label, None)  # of an earlier lease, that was lost
