"""Rows out of CSV and TSV: a heading, then a row for each line, or for several where a cell has line ends in quotes."""

import csv
from collections.abc import Callable, Iterator, Sequence

from lora_core.data.compression import Bounded
from lora_core.data.rows import Limits, RawRow, RowProblem, Rows, lines
from lora_core.data.strict_json import parse_json
from lora_core.errors import DatasetRefused

csv.field_size_limit(1 << 24)

OTHERS = (";", "\t", "|", ",")  # what spreadsheets of other countries, and files of another name, separate cells by
# Lists inside a cell come as JSON; in some columns always, in others where it is no plain text.
LISTS = {"messages": True, "conversations": True, "prompt": False, "chosen": False, "rejected": False}


def delimited(delimiter: str) -> Callable[[str, Bounded, Limits], Rows]:
    """A reader of cells that such a character separates."""

    def read(name: str, stream: Bounded, limits: Limits) -> Rows:
        text = _Text(name, stream, limits)
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        heading: Sequence[str] = ()
        while True:
            text.held = 0
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield RowProblem(name, reader.line_num, "row", f"is not CSV: {error}", "mend its quotes and line ends")
                continue
            if cells and not heading:
                heading = _heading(name, cells, limits.columns)
            elif cells:
                yield _row(name, reader.line_num, heading, cells, limits.depth)

    return read


class _Text:
    """A file's lines for the csv module, which holds a row however many lines it goes on: `held` bytes so far."""

    def __init__(self, name: str, stream: Bounded, limits: Limits) -> None:
        self._name, self._lines, self._most, self.held = name, lines(stream, limits.row_bytes), limits.row_bytes, 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        number, line = next(self._lines)
        where = f"{self._name}:{number}"
        self.held += len(line or b"")
        if line is None or self.held > self._most:
            why = f"is in a row of more than {self._most:,} bytes"
            raise DatasetRefused(where, why, "shorten it, or close the quote that is open")
        try:
            return line.decode("utf-8-sig" if number == 1 else "utf-8") + "\n"
        except UnicodeDecodeError as error:
            raise DatasetRefused(where, f"byte {error.start + 1} is not UTF-8", "save it as UTF-8") from None


def _heading(name: str, cells: Sequence[str], most: int) -> Sequence[str]:
    if len(cells) > most:
        raise DatasetRefused(name, f"has {len(cells):,} columns, at most {most:,}", "keep the columns that are needed")
    if len(cells) == 1 and (other := next((mark for mark in OTHERS if mark in cells[0]), None)):
        why = f"has cells that {other!r} separates"
        raise DatasetRefused(name, why, "save it with commas as .csv, or with tabs as .tsv")
    named = [cell for cell in cells if cell]
    twice = next((cell for index, cell in enumerate(named) if cell in named[:index]), None)
    if twice is not None:
        raise DatasetRefused(name, f"has two columns named {twice[:40]!r}", "keep one of them")
    return cells


def _row(name: str, number: int, heading: Sequence[str], cells: Sequence[str], depth: int) -> RawRow | RowProblem:
    if len(cells) != len(heading):
        why = "has another number of cells than the heading"
        return RowProblem(name, number, "row", why, "quote cells that hold commas")
    # An empty cell is no list: so a table writes that a row has none.
    row: dict[str, object] = {
        key: cell for key, cell in zip(heading, cells, strict=True) if key and (cell or not LISTS.get(key))
    }
    for key, always in LISTS.items():
        if isinstance(cell := row.get(key), str) and (always or cell.lstrip().startswith("[{")):
            try:
                row[key] = parse_json(cell, depth)
            except ValueError as error:
                return RowProblem(name, number, key, f"is not JSON: {error}", "write the list as JSON")
    return RawRow(name, number, row)
