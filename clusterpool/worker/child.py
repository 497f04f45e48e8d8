"""A worker that is one `multiprocessing.Process`: its main thread makes one call, and the exit code is its own."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

from clusterpool.client.child_process import ProcessWatch
from clusterpool.core import messages as m
from clusterpool.core.messages import Address
from clusterpool.serialization.functions import loads_function
from clusterpool.serialization.packing import loads

if TYPE_CHECKING:
    from clusterpool.client.runtime import Runtime


def run_child(runtime: Runtime, parent: Address, setup: m.SetupWorker) -> int:
    """Call what `setup` holds, with a descriptor that says when the parent has ended; the exit code."""
    client = runtime.client
    # A worker's own handler interrupts tasks. Here SIGINT is the program's, as in any Python.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    client.install_interrupt_handler(frozenset({run_child.__code__}))
    watch = ProcessWatch(parent)
    try:
        (payload, *args), _ = loads(setup.payload)
        function = loads_function(payload, node_id=client.address.node_id)
        client.send(parent, m.WorkerReady(setup.lease))
    finally:
        for reference in setup.references:
            client.release_reference(reference.owner, reference.number)
    exit_code: int = function(*args, watch.fd)
    # The exit handlers come next: they wait for this process's own children, so the cluster is left only then.
    return exit_code
