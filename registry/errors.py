"""What can go wrong in the registry, the store and the pull client.

RegistryError
├── NameRefused          a tenant, user, adapter or alias name is not allowed
├── NotFound             a reference, alias, job or schedule that does not exist
│   └── VersionGone      a version whose bytes retention has removed
├── RetentionRefused     a retention policy that cannot be meant
├── UnderHold            a legal hold forbids to remove anything of a user or tenant
├── NotYetForgotten      a user is forgotten as far as possible; the rest has to wait
├── NamesakeLeft         a user is forgotten, and somebody new has come under that name since
├── RegistryInUse        a SQLite file cannot be rewritten while others read it
├── LeaseLost            somebody else has the job now; this worker's result does not count
├── ContentDiffers       the same job published other content before
├── UploadSwept          an upload took longer than its lease, and was swept
├── AliasMoved           an alias does not point to where the caller says it does
├── PromotionRefused     the version cannot be what an alias points to
├── AliasProtected       the alias moves only when its mover says that they mean it
├── GrantRefused         a token gives no leave to what was asked for
├── TicketRefused        a ticket is not what a broker gives out
├── ScheduleRefused      a cron expression, interval or time zone is not valid
├── QuotaRefused         a weight or limit of a tenant is not valid
├── QuotaReached         a tenant has as many jobs waiting as it may have
├── CursorRefused        the place where an answer should go on is none of that answer's
├── SettingRefused       a variable of the environment holds what it may not
├── SignatureRefused     a version is not signed, or not by a key that is trusted here
├── ManifestRefused      a manifest is not what a version's must be
├── DatabaseUnavailable  the database cannot be reached or is not set up
├── SchemaUnknown        this release does not know a revision of the tables
└── StoreError
    ├── ObjectMissing    no object under that key
    ├── ObjectDiffers    other bytes are already under that key, or came back
    ├── PullFailed       pulls of the same version that this one waited for have failed
    ├── KeyRefused       a key that some store could misread
    └── StoreUnavailable the store cannot be reached or refuses us

Facts are in `args`, prose is in `__str__`: an error survives pickling between processes.
"""


class RegistryError(Exception):
    """Everything the registry raises on purpose."""


class NameRefused(RegistryError):
    """A name is not allowed: what kind of name, the name, and what is allowed."""

    def __init__(self, kind: str, name: str, allowed: str) -> None:
        super().__init__(kind, name, allowed)

    def __str__(self) -> str:
        kind, name, allowed = self.args
        return f"{ascii(name)[:80]} is not a valid {kind}; allowed are {allowed}"


class NotFound(RegistryError):
    """Something that was asked for does not exist: what, which, and what to do."""

    def __init__(self, kind: str, name: str, fix: str) -> None:
        super().__init__(kind, name, fix)

    def __str__(self) -> str:
        return "there is no {} {}; {}".format(*self.args)


class VersionGone(NotFound):
    """Retention has removed a version's bytes: which, when, and by what rule."""

    def __init__(self, version: str, at: str, rule: str) -> None:
        RegistryError.__init__(self, version, at, rule)

    def __str__(self) -> str:
        version, at, rule = self.args
        return f"{version} was removed on {at} ({rule}); see `lora history` for those that are kept"


class RetentionRefused(RegistryError):
    """A retention policy cannot be meant: why, and what to do."""

    def __init__(self, why: str, fix: str) -> None:
        super().__init__(why, fix)

    def __str__(self) -> str:
        return "retention refused: {}; {}".format(*self.args)


class UnderHold(RegistryError):
    """A legal hold forbids to remove anything: on whom, by whom, and why."""

    def __init__(self, whom: str, actor: str, reason: str) -> None:
        super().__init__(whom, actor, reason)

    def __str__(self) -> str:
        whom, actor, reason = self.args
        return f"{whom} is under legal hold by {actor} ({reason}); nothing is removed until `lora hold {whom} --off`"


class NotYetForgotten(RegistryError):
    """What is left of a user has to wait: how much of what, and until when."""

    def __init__(self, what: str, until: str) -> None:
        super().__init__(what, until)

    def __str__(self) -> str:
        what, until = self.args
        return f"not finished: {what} until {until}; run it again then, or leave it to upkeep"


class NamesakeLeft(RegistryError):
    """Somebody who was to be forgotten is; who came under that name since is not: the user and the receipt."""

    def __init__(self, user: str, receipt: str) -> None:
        super().__init__(user, receipt)

    def __str__(self) -> str:
        user, receipt = self.args
        return (
            f"the {user} of an earlier request is forgotten (receipt {receipt}), but not the one who has come under "
            "that name since; run it again to forget them too, or see `lora forgotten` for the receipt"
        )


class RegistryInUse(RegistryError):
    """A SQLite file cannot be rewritten while others read it: where it is."""

    def __init__(self, url: str) -> None:
        super().__init__(url)

    def __str__(self) -> str:
        return "database {} is being read, so deleted rows may still lie in its files; run it again".format(*self.args)


class LeaseLost(RegistryError):
    """Somebody else has the job now, or it is over: this worker's result does not count."""

    def __init__(self, job: str, fence: int) -> None:
        super().__init__(job, fence)

    def __str__(self) -> str:
        return "job {} is no longer held under fence {}; drop this result, its new holder goes on".format(*self.args)


class ContentDiffers(RegistryError):
    """The same job was published before with other content."""

    def __init__(self, job: str, number: int) -> None:
        super().__init__(job, number)

    def __str__(self) -> str:
        return "job {} already published version {} with other content; enqueue a new job".format(*self.args)


class UploadSwept(RegistryError):
    """An upload took longer than its lease and counts as dead: its prefix."""

    def __init__(self, prefix: str) -> None:
        super().__init__(prefix)

    def __str__(self) -> str:
        return "the upload to {} took longer than its lease and was swept; do it again".format(*self.args)


class AliasMoved(RegistryError):
    """An alias points elsewhere than its mover expected: which, the version number expected, and the one found."""

    def __init__(self, alias: str, expected: int, found: int) -> None:
        super().__init__(alias, expected, found)

    def __str__(self) -> str:
        alias, expected, found = self.args
        where = f"at version {found}" if found else "nowhere yet"
        return f"{alias} not moved: it points {where}, not at version {expected}; look again, then decide"


class PromotionRefused(RegistryError):
    """A version cannot become what an alias points to: which, why, and what to do."""

    def __init__(self, reference: str, why: str, fix: str) -> None:
        super().__init__(reference, why, fix)

    def __str__(self) -> str:
        return "{} not moved: {}; {}".format(*self.args)


class AliasProtected(RegistryError):
    """An alias is protected: which, by whom, and why."""

    def __init__(self, alias: str, actor: str, reason: str) -> None:
        super().__init__(alias, actor, reason)

    def __str__(self) -> str:
        return "alias {} is protected by {} ({}); pass --override if you mean to move it".format(*self.args)


class GrantRefused(RegistryError):
    """A grant gives no leave to what was asked for: why, and what to do."""

    def __init__(self, why: str, fix: str) -> None:
        super().__init__(why, fix)

    def __str__(self) -> str:
        return "grant refused: {}; {}".format(*self.args)


class TicketRefused(RegistryError):
    """A ticket is not what a broker gives out: why, and what to do."""

    def __init__(self, why: str, fix: str) -> None:
        super().__init__(why, fix)

    def __str__(self) -> str:
        return "ticket refused: {}; {}".format(*self.args)


class ScheduleRefused(RegistryError):
    """A schedule's timing is not valid: what was given, why, and what to do."""

    def __init__(self, given: str, why: str, fix: str) -> None:
        super().__init__(given, why, fix)

    def __str__(self) -> str:
        return "schedule {!r}: {}; {}".format(*self.args)


class QuotaRefused(RegistryError):
    """A tenant's weight or limit is not valid: which, what was given, and what to give."""

    def __init__(self, which: str, given: object, fix: str) -> None:
        super().__init__(which, given, fix)

    def __str__(self) -> str:
        return "{} is {!r}: {}".format(*self.args)


class QuotaReached(RegistryError):
    """A tenant has as many jobs waiting as it may have: how many that is."""

    def __init__(self, most: int) -> None:
        super().__init__(most)

    def __str__(self) -> str:
        most = self.args[0]
        return f"no more jobs may wait: the limit is {most}; try again when some are done, or raise max-waiting"


class CursorRefused(RegistryError):
    """A cursor does not say where an answer goes on: the cursor, and why."""

    def __init__(self, cursor: str, why: str) -> None:
        super().__init__(cursor, why)

    def __str__(self) -> str:
        cursor, why = self.args
        return f"{ascii(cursor)[:80]} is no cursor of this answer: {why}; pass one that it gave, or begin anew without"


class SettingRefused(RegistryError):
    """A variable of the environment holds what it may not: which, what, and what is allowed."""

    def __init__(self, variable: str, value: str, allowed: str) -> None:
        super().__init__(variable, value, allowed)

    def __str__(self) -> str:
        variable, value, allowed = self.args
        return f"{variable} is {ascii(value)[:80]}: {allowed}; mend it or unset it"


class SignatureRefused(RegistryError):
    """A version is not signed, by no key that is trusted, or not as it is: which, why, and what to do."""

    def __init__(self, version: str, why: str, fix: str) -> None:
        super().__init__(version, why, fix)

    def __str__(self) -> str:
        return "{} refused: {}; {}".format(*self.args)


class ManifestRefused(RegistryError):
    """A manifest is not what a version's must be: whose, and why."""

    def __init__(self, prefix: str, why: str) -> None:
        super().__init__(prefix, why)

    def __str__(self) -> str:
        return "the manifest of {} {}; publish the version anew".format(*self.args)


class DatabaseUnavailable(RegistryError):
    """The database cannot be reached or is not set up: where, why, and what to do."""

    def __init__(self, url: str, why: str, fix: str) -> None:
        super().__init__(url, why, fix)

    def __str__(self) -> str:
        return "database {}: {}; {}".format(*self.args)


class SchemaUnknown(RegistryError):
    """This release does not know a revision of the tables: which, whose, and what to do."""

    def __init__(self, revision: str, whose: str, fix: str) -> None:
        super().__init__(revision, whose, fix)

    def __str__(self) -> str:
        return "revision {}, {}, is not one that this release knows; {}".format(*self.args)


class StoreError(RegistryError):
    """Something is wrong between us and the object store."""


class ObjectMissing(StoreError):
    """There is no object under that key."""

    def __init__(self, key: str, store: str) -> None:
        super().__init__(key, store)

    def __str__(self) -> str:
        return "no object {} in {}; was it swept, or is LORA_STORE_URL another store?".format(*self.args)


class ObjectDiffers(StoreError):
    """Other bytes are under that key than should be: expected and found SHA-256."""

    def __init__(self, key: str, expected: str, found: str) -> None:
        super().__init__(key, expected, found)

    def __str__(self) -> str:
        key, expected, found = self.args
        return f"object {key} has SHA-256 {found[:12]}..., not {expected[:12]}...; it is corrupt or was tampered with"


class PullFailed(StoreError):
    """Pulls of the same version that this one waited for have failed: which, how many, and how the last one did."""

    def __init__(self, served_name: str, count: int, why: str) -> None:
        super().__init__(served_name, count, why)

    def __str__(self) -> str:
        return "{}: {} pulls of it that this one waited for failed, the last with: {}; try again".format(*self.args)


class KeyRefused(StoreError):
    """A key that some store could misread: the key and why."""

    def __init__(self, key: str, why: str) -> None:
        super().__init__(key, why)

    def __str__(self) -> str:
        key, why = self.args
        return f"key {ascii(key)[:80]} refused: {why}; use plain names between single slashes"


class StoreUnavailable(StoreError):
    """The store cannot be reached or refuses us: where, why, and what to do."""

    def __init__(self, store: str, why: str, fix: str) -> None:
        super().__init__(store, why, fix)

    def __str__(self) -> str:
        return "store {}: {}; {}".format(*self.args)
