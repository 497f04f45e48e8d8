"""A worker's life: forked by the zygote, which has imported this module, it joins its node and runs what it is sent."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import socket
import sys
from collections.abc import Sequence
from typing import Any

import msgspec

from clusterpool.client import api
from clusterpool.client.client import Client
from clusterpool.client.runtime import Runtime
from clusterpool.config import WORKER_SETUP_VARIABLE
from clusterpool.core import messages as m
from clusterpool.core.messages import Address
from clusterpool.processes.named_output import name_output
from clusterpool.processes.task_page import make_task_page, task_page_path
from clusterpool.serialization.functions import install_main_module
from clusterpool.worker.task_runner import TaskRunner


def main(spec: dict[str, Any]) -> int:
    """Run one worker until it is retired; its exit code. `spec`: plain values from the node."""
    job = msgspec.msgpack.decode(spec["job"], type=m.JobPart)
    install_main_module()
    if job.authkey:
        multiprocessing.current_process().authkey = job.authkey
    _adopt_environment(job)
    _enter_packages(spec["working_dir"], spec["modules"])
    _call_setup()
    client = Client(
        node_socket=spec["node_socket"],
        processes_folder=spec["processes_folder"],
        address=Address(spec["node_id"], spec["process_id"]),
        job=job,
        kind="worker",
    )
    runtime = Runtime(client)
    page = make_task_page(task_page_path(spec["processes_folder"], spec["process_id"]))
    runner = TaskRunner(runtime, name=spec["name"], page=page)
    name_output(runner.called_name)
    client.on_worker_message = runner.message
    client.on_thread_turn = runner.turn_by_thread
    api.install(runtime)
    client.start(wants_logs=False)
    return runner.run()


def _adopt_environment(job: m.JobPart) -> None:
    """What a child of the driver would have: its working folder and its module search path."""
    if job.host != socket.gethostname():
        return
    with contextlib.suppress(OSError):
        os.chdir(job.cwd)
    known = set(job.sys_path)
    sys.path[:] = [*job.sys_path, *(entry for entry in sys.path if entry not in known)]


def _enter_packages(working_dir: str, modules: Sequence[str]) -> None:
    """The copies of the folders in `runtime_env` come before all else that has modules of the same names."""
    if working_dir:
        os.chdir(working_dir)
    sys.path[:0] = [*([working_dir] if working_dir else []), *modules]


def _call_setup() -> None:
    """What the job wants done first, such as the patch of `clusterpool run --patch`."""
    module, _, name = os.environ.get(WORKER_SETUP_VARIABLE, "").partition(":")
    if name:
        getattr(importlib.import_module(module), name)()
