"""Every setting of a factory process: read once from the environment, frozen, passed down."""

import os
import socket
from typing import Annotated, Literal

from pydantic import AfterValidator, ByteSize, Field

from registry.settings import RegistrySettings


def _worker_name() -> str:
    return f"{socket.gethostname()}-{os.getpid()}"


def _tellable(name: str) -> str:
    if not name.isprintable() or not 0 < len(name) <= 128:
        raise ValueError("it must be 1 to 128 characters on one line, without control characters")
    return name


class FactorySettings(RegistrySettings):
    """RegistrySettings, and how this process trains."""

    base: str = ""  # the base that is used where none is named: a folder or a Hugging Face id
    base_revision: str = ""  # of the base above; empty takes its main branch
    quantise: Literal["", "8bit", "4bit"] = ""  # of the bases that jobs are made for; empty keeps them whole
    slots: Annotated[int, Field(ge=1, le=1024)] = 16  # K: users trained at once
    compile: bool = False  # layers as compiled graphs: a minute once for each shape, then quicker steps
    memory: Annotated[ByteSize, Field(gt=0)] | None = None  # 8GiB; None: 95 % of what a GPU has free, any on a CPU
    states: Annotated[ByteSize, Field(ge=0)] = ByteSize(1 << 30)  # for states under the first adapted layer; 0: none
    states_disk: Annotated[ByteSize, Field(ge=0)] = ByteSize(0)  # the same under LORA_HOME, for later versions; 0: none
    device: str = ""  # cpu, cuda, cuda:1, auto for all GPUs; empty takes a GPU where there is one
    lease_seconds: Annotated[int, Field(ge=1)] = 300  # how long a silent worker keeps its jobs
    save_seconds: Annotated[float, Field(ge=0)] = 60  # between saves of a training's progress
    worker: Annotated[str, AfterValidator(_tellable)] = Field(default_factory=_worker_name)
    log: Literal["", "json", "text"] = ""  # how events are logged; empty: JSON lines, on a terminal warnings in words
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = 0  # of `lora work`: Prometheus metrics and health; 0: none
    stall_seconds: Annotated[float, Field(gt=0)] = 1800  # without a step of any kind, after which /healthz says 503
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = 0.1  # of a dataset's rows, before it is refused
