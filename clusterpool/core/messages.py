"""Every message between two processes, in one place: `from clusterpool.core import messages as m`.

task_messages: owners, workers, borrowers, and the base of all. host_messages: processes and their node. Apart from
these, node_messages, transfer_messages, package_messages and joining stand beside their machines; wire.py knows all.
"""

from clusterpool.core.host_messages import *  # noqa: F403
from clusterpool.core.task_messages import *  # noqa: F403
