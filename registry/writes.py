"""Many rows of several tables written in one statement, so that what they need is locked for as short as can be.

On PostgreSQL that is a `WITH` of all writes, each reading its rows from one parameter (JSON): the statement's text does
not depend on how many rows there are, so that it is made, parsed and planned once.  On SQLite they come one by one.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from uuid import UUID

from sqlalchemy import (
    JSON,
    Executable,
    Insert,
    String,
    Table,
    Update,
    and_,
    bindparam,
    cast,
    column,
    func,
    insert,
    literal,
    select,
    update,
)
from sqlalchemy.orm import Session

from registry.models import Base

Shape = tuple[Table, tuple[str, ...], tuple[str, ...]]  # what a statement depends on: table, columns, keys


@dataclass(frozen=True)
class Rows:
    """Rows, all of the same columns, to add to a table; or, `by` some of them (the tenant's first), to change in it.

    Those to change are locked in the order of these.
    """

    table: type[Base]
    rows: Sequence[Mapping[str, object]]
    by: tuple[str, ...] = ()

    @property
    def shape(self) -> Shape:
        """All but the values."""
        table = self.table.__table__
        assert isinstance(table, Table)
        return table, tuple(self.rows[0]), self.by


def write(session: Session, writes: Sequence[Rows]) -> None:
    """Carry out writes that do not read each other."""
    writes = [one for one in writes if one.rows]
    connection = session.connection()
    if connection.dialect.name == "postgresql":
        given = {f"rows_{number}": json.dumps(one.rows, default=_words) for number, one in enumerate(writes)}
        connection.execute(_together(tuple(one.shape for one in writes)), given)
        return
    for one in writes:
        named = [{f"its_{name}": value for name, value in row.items()} for row in one.rows]
        connection.execute(_one(*one.shape), named)


def _words(value: object) -> str:
    """An id or a moment as PostgreSQL reads it."""
    if isinstance(value, UUID | datetime):
        return str(value)
    raise TypeError(f"{value!r} of {type(value).__name__} cannot be written")


@cache
def _together(shapes: tuple[Shape, ...]) -> Executable:
    parts = [_many(number, *shape).cte(f"write_{number}") for number, shape in enumerate(shapes)]
    return select(literal(1)).add_cte(*parts)


def _many(number: int, table: Table, names: tuple[str, ...], by: tuple[str, ...]) -> Insert | Update:
    """One of the writes, its rows in one parameter."""
    listed = func.json_to_recordset(cast(bindparam(f"rows_{number}", type_=String), JSON))
    columns = [column(name, table.c[name].type) for name in names]
    rows = listed.table_valued(*columns, name=f"given_{number}").render_derived(with_types=True)
    if not by:
        return insert(table).from_select(names, select(*(rows.c[name] for name in names)))
    there = select(*rows.c).join(table, and_(*(table.c[name] == rows.c[name] for name in by)))
    # An update alone locks its rows in whatever order it meets them.
    locked = there.order_by(*(rows.c[name] for name in by)).with_for_update(of=table).subquery(f"locked_{number}")
    same = [table.c[name] == locked.c[name] for name in by]
    return update(table).where(*same).values({name: locked.c[name] for name in names if name not in by})


@cache
def _one(table: Table, names: tuple[str, ...], by: tuple[str, ...]) -> Insert | Update:
    """One of the writes, a row at a time."""
    values = {name: bindparam(f"its_{name}", type_=table.c[name].type) for name in names if name not in by}
    if not by:
        return insert(table).values(values)
    same = [table.c[name] == bindparam(f"its_{name}", type_=table.c[name].type) for name in by]
    return update(table).where(*same).values(values)
