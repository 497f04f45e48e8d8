"""Every message between two processes, in one place: `from clusterpool.core import messages as m`.

task_messages: owners, workers, borrowers, and the base of all. node_messages: processes and their node. Apart from
these, peer_messages, transfer_messages, package_messages and joining stand beside their machines; wire.py knows all.
"""

from clusterpool.core.node_messages import *  # noqa: F403
from clusterpool.core.task_messages import *  # noqa: F403
