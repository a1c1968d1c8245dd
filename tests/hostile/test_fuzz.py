"""Whatever stands in a file from outside: it is refused in words or taken for what it is, and never costs much."""

from pathlib import Path

import pytest

from tests.hostile.trial import run

MOST = 700 << 20  # bytes beyond what the process has; the confined reader of Parquet may take more
MOST_READER = 1500 << 20


@pytest.mark.timeout(900)
@pytest.mark.parametrize("seeds", [range(60), pytest.param(range(1000, 1400), marks=pytest.mark.long)], ids=len)
def test_hostile_files_are_refused_in_words_or_taken_for_what_they_are(tmp_path: Path, seeds: range) -> None:
    """Adapters of every method and datasets of every format, mutated and made up; what is taken is compared."""
    verdicts = list(run(tmp_path, seeds))

    assert [verdict for verdict in verdicts if not verdict.good] == []
    assert [verdict for verdict in verdicts if verdict.bytes > MOST or verdict.reader_bytes > MOST_READER] == []
    for what in ("artefact", "dataset"):
        assert sum(verdict.outcome == "refused" for verdict in verdicts if verdict.what == what) > len(seeds) / 8
