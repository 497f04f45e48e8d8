from __future__ import annotations

import subprocess
import sys


def test_large_copy_at_the_interpreters_exit() -> None:
    # From Python 3.12 on no thread can start there that would help.
    script = (
        "import atexit\n"
        "from clusterpool.object_store.memory_copy import TWO_THREADS_BYTES_MIN, MemoryCopier\n"
        "source, target = b'x' * TWO_THREADS_BYTES_MIN, bytearray(TWO_THREADS_BYTES_MIN)\n"
        "atexit.register(lambda: print(target == source))\n"
        "atexit.register(MemoryCopier(memoryview(target)).copy, 0, memoryview(source))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("True\n", "", 0)
