"""Publishing while the cohort changes."""

import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from flows.factory import Factory
from flows.sending import publish_some
from flows.settings import FactorySettings


def test_publishers_do_not_mind_who_comes_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer lets newcomers in between any two of their steps."""
    cohort: Any = SimpleNamespace(work={}, versions={})
    factory = Factory(FactorySettings())
    monkeypatch.setattr("flows.sending.publish_together", lambda *_: {})

    def come() -> None:
        for number in range(1000):
            cohort.work[number] = (SimpleNamespace(id=number), None)
            time.sleep(0)  # let the other go on

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=come)
    thread.start()
    try:
        while thread.is_alive():
            publish_some(factory, cohort, [])
    finally:
        thread.join()
        sys.setswitchinterval(before)
