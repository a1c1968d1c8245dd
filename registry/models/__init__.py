"""The registry's tables.  Every row that belongs to a tenant says so; versions are added and never rewritten."""

from registry.models.base import Base, Facts, UtcTime
from registry.models.people import Adapter, Dataset, Freshness, SharedBase, Tenant, User
from registry.models.upkeep import Event, Forgetting, Hold, Pin, RetentionPolicy, Tombstone
from registry.models.versions import AdapterVersion, Alias, AliasMove, Evaluation, ProtectedAlias
from registry.models.work import Job, Run, Schedule, Share, Upload, Worker

__all__ = [
    "Adapter",
    "AdapterVersion",
    "Alias",
    "AliasMove",
    "Base",
    "Dataset",
    "Evaluation",
    "Event",
    "Facts",
    "Forgetting",
    "Freshness",
    "Hold",
    "Job",
    "Pin",
    "ProtectedAlias",
    "RetentionPolicy",
    "Run",
    "Schedule",
    "Share",
    "SharedBase",
    "Tenant",
    "Tombstone",
    "Upload",
    "User",
    "UtcTime",
    "Worker",
]
