"""The first and the last moments of a worker's life: from the fork to `main(spec)`, and from its return to
the exit.
"""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
import threading
import traceback
from typing import TYPE_CHECKING

from clusterpool.processes.death import die_with_parent, set_process_name

if TYPE_CHECKING:
    from clusterpool.processes.zygote_loop import ForkedChild, WorkerMain

# When memory runs out the kernel should take a worker, whose task can run again, and not the node or the
# user's program. Higher, and it would take the worker before a far larger stranger.
_OOM_SCORE = "300"


def run_forked_worker(child: ForkedChild, worker_main: WorkerMain) -> int:
    """Returns the exit code; the caller ends the process by `os._exit`, so that no page is touched for a
    clean-up.
    """
    _become_worker(child)
    exit_code = 1
    try:
        exit_code = _exit_code(worker_main(child.spec))
    except SystemExit as error:
        exit_code = _exit_code(error.code)
    except BaseException:
        traceback.print_exc()
    finally:
        _run_exit_handlers()
    return exit_code


def _become_worker(child: ForkedChild) -> None:
    die_with_parent(child.zygote_pid)
    set_process_name("cpool-worker")
    # A group of its own: a task that signals its process group (`os.kill(0, ...)`) reaches what it started,
    # no others.
    os.setpgid(0, 0)
    os.dup2(child.stdout_fd, 1)
    os.dup2(child.stderr_fd, 2)
    os.close(child.stdout_fd)
    os.close(child.stderr_fd)
    # As in any Python program: SIGINT raises KeyboardInterrupt, and what a task starts does not inherit
    # "ignored". No terminal can send it (the zygote's session has none): only the node does, to interrupt a
    # task that is cancelled.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _set_environment(child.spec.get("env") or {})
    _reseed()
    try:
        with open("/proc/self/oom_score_adj", "w") as file:  # noqa: PTH123
            file.write(_OOM_SCORE)
    except OSError:
        pass  # lower than what we have: not allowed, and not needed
    gc.enable()


def _set_environment(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    if "TZ" in values:
        import time

        time.tzset()


def _reseed() -> None:
    """Two workers must not draw the same numbers. `random` reseeds itself after a fork; numpy, if
    preloaded, does not.
    """
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()


def _exit_code(value: object) -> int:
    """As `sys.exit` would have it."""
    if value is None:
        return 0
    if isinstance(value, int):
        return value & 0xFF
    print(value, file=sys.stderr)
    return 1


def _run_exit_handlers() -> None:
    """What the interpreter does at its end, in its order, but for taking itself apart."""
    # Waits for threads that are not daemons, and ends thread pools. Private, but multiprocessing's workers
    # call it too.
    for step in (threading._shutdown, atexit._run_exitfuncs, _flush):  # type: ignore[attr-defined]
        try:
            step()
        except SystemExit:
            pass
        except BaseException:
            traceback.print_exc()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            try:
                stream.flush()
            except (OSError, ValueError):
                pass  # the node closed the other end, or the task closed the stream
