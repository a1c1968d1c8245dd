"""The endpoint beside a worker, asked by clients that are not what they should be."""

import socket
import struct
import threading
import time
import urllib.request

import pytest
from prometheus_client import CollectorRegistry

from flows.endpoint import Endpoint, served


def test_probes_that_only_knock_leave_no_word_and_no_thread(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A load balancer's connections are reset before they ask anything; others never ask and never end."""
    monkeypatch.setattr("flows.endpoint._Quiet.timeout", 0.1)
    with served(Endpoint(CollectorRegistry(), dict, dict), 0, "127.0.0.1") as port:
        knock = socket.create_connection(("127.0.0.1", port))
        knock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # its end is a reset
        knock.close()
        with socket.create_connection(("127.0.0.1", port), timeout=20) as silent:
            assert silent.recv(1) == b""  # sent away
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=20) as answer:
            assert answer.status == 200
        while any("process_request" in thread.name for thread in threading.enumerate()):
            time.sleep(0.01)

    assert capfd.readouterr().err == ""
