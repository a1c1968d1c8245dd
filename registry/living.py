"""Who is there: a user who is being forgotten is not, though their rows go only after their bytes have gone."""

from sqlalchemy import ColumnElement, exists, or_

from registry.models import Forgetting, User

NAMELESS = "forgotten-"  # how the name begins that they have until then; anybody may have such a name


def living() -> ColumnElement[bool]:
    """The condition that nobody has begun to forget the user of a statement's rows.

    Receipts, of which there may be many, are looked at for the few whose name begins so.
    """
    begun = exists().where(Forgetting.tenant_id == User.tenant_id, Forgetting.user_id == User.id)
    return or_(~User.name.startswith(NAMELESS), ~begun)
