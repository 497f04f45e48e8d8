"""Start of a node process. The zygote is forked first: nothing heavy may be imported, and no thread run, before."""

from __future__ import annotations

import logging
import sys

from clusterpool.processes.launch import receive_start
from clusterpool.processes.zygote import Zygote


def main() -> int:
    """Run the node that `launch_node` described on the command line; its exit code."""
    start = receive_start(sys.argv)
    zygote = Zygote.start()
    logging.basicConfig(
        level=start.config.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    from clusterpool.errors import ClusterpoolError
    from clusterpool.node.shell import NodeShell

    try:
        shell = NodeShell(start, zygote)
        shell.open()
    except Exception as exc:
        is_expected = isinstance(exc, ClusterpoolError)
        logging.getLogger(__name__).error("the node could not start: %s", exc, exc_info=not is_expected)
        start.report_failure(str(exc) if is_expected else f"{type(exc).__name__}: {exc}")
        zygote.close()
        start.remove_files()
        return 1
    return shell.run()


if __name__ == "__main__":
    sys.exit(main())
