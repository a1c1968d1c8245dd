"""Every setting of a factory process: read once from the environment, frozen, passed down."""

import os
import re
import socket
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, ByteSize, Field

from registry.settings import RegistrySettings


def _worker_name() -> str:
    return f"{socket.gethostname()}-{os.getpid()}"


def _tellable(name: str) -> str:
    if not name.isprintable() or not 0 < len(name) <= 128:
        raise ValueError("it must be 1 to 128 characters on one line, without control characters")
    return name


def _seconds(given: object) -> float:
    """Seconds from 45, 45s, 2m or 1h."""
    match = re.fullmatch(r"\s*([0-9]{1,9}(?:\.[0-9]{1,3})?)([smh]?)\s*", str(given))
    if match is None:
        raise ValueError("it must be a time such as 30s, 2m or 1h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


class FactorySettings(RegistrySettings):
    """RegistrySettings, and how this process trains."""

    base: str = ""  # the base that is used where none is named: a folder or a Hugging Face id
    base_revision: str = ""  # of the base above; empty takes its main branch
    quantise: Literal["", "8bit", "4bit"] = ""  # of the bases that jobs are made for; empty keeps them whole
    slots: Annotated[int, Field(ge=1, le=1024)] = 16  # K: users trained at once
    compile: bool = False  # layers as compiled graphs: a minute once for each shape, then quicker steps
    cuda_graph: bool = False  # micro-steps as CUDA graphs on a GPU: launched as one, where kernels are many and short
    memory: Annotated[ByteSize, Field(gt=0)] | None = None  # 8GiB; None: 95 % of what a GPU has free, any on a CPU
    states: Annotated[ByteSize, Field(ge=0)] = ByteSize(1 << 30)  # for states under the first adapted layer; 0: none
    states_disk: Annotated[ByteSize, Field(ge=0)] = ByteSize(0)  # the same under LORA_HOME, for later versions; 0: none
    device: str = ""  # cpu, cuda, cuda:1, auto for all GPUs; empty takes a GPU where there is one
    lease_seconds: Annotated[int, Field(ge=1, le=86400)] = 300  # how long a silent worker keeps its jobs
    save_seconds: Annotated[float, Field(ge=0)] = 60  # between saves of a training's progress
    save_to: Literal["home", "store"] = "home"  # where; in the store any worker goes on after one that was killed
    grace: Annotated[float, BeforeValidator(_seconds), Field(ge=0, le=86400)] = 30  # from SIGTERM to the end
    leave_note: Path | None = None  # a file that asks to leave by being there: `lora work --pool` sets it for its runs
    admit_seconds: Annotated[float, Field(ge=0)] = 600  # so long a cohort lets newcomers in; other groups wait for it
    worker: Annotated[str, AfterValidator(_tellable)] = Field(default_factory=_worker_name)
    log: Literal["", "json", "text"] = ""  # how events are logged; empty: JSON lines, on a terminal warnings in words
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = 0  # of `lora work`: Prometheus metrics and health; 0: none
    stall_seconds: Annotated[float, Field(gt=0)] = 1800  # without a step of any kind, after which /healthz says 503
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = 0.1  # of a dataset's rows, before it is refused
