"""Any number of values in one parameter of a statement, as rows to join.

A statement with a parameter for each takes longer to make, to send and to read than its answer does.  And PostgreSQL
takes such a list for a hundred rows whatever its length, so that it goes along the keys of what is joined: by the real
number, and with estimates that row-level security blurs, it would rather read a table of a million rows.
"""

from typing import Any

from sqlalchemy import CTE, JSON, String, bindparam, cast, func, select, type_coerce
from sqlalchemy.types import TypeEngine

_STRING = String()


def listed(dialect: str, parameter: str, kind: TypeEngine[Any] = _STRING) -> CTE:  # of any type
    """What a JSON list in that parameter holds, in a column `value`: strings, or ids in hexadecimal digits.

    Row-level security lets no index be read by what is cast in the same breath: the cast could tell what it is given.
    """
    given = bindparam(parameter, type_=String())
    if dialect != "postgresql":
        value = func.json_each(given).table_valued("value").c.value
        return select(type_coerce(value, kind).label("value")).cte("asked")
    value = func.json_array_elements_text(cast(given, JSON)).table_valued("value").c.value
    return select(cast(value, kind).label("value")).cte("asked").prefix_with("MATERIALIZED")
