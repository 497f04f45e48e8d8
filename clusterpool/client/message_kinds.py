"""Which of a client's messages are for whom."""

from __future__ import annotations

from clusterpool.core import messages as m
from clusterpool.core.actor_messages import ActorLoaded, ActorSaved, CallsResumed, ResultsTaken
from clusterpool.core.coordination_messages import CoordinationDone, CoordinationFailed, CountHeld
from clusterpool.core.joining import RegistrationRefused
from clusterpool.core.package_messages import PackageAnswer

# What a worker does at once.
WORKER_MESSAGES = frozenset(
    {
        m.SetupWorker,
        m.StartTasks,
        m.ForgetFunctions,
        m.TakeBackTasks,
        m.CancelTasks,
        m.RetireWorker,
        m.StreamTaken,
        ResultsTaken,
        CallsResumed,
    }
)
# Answers to `Client.request`.
REPLIES = frozenset(
    {m.ObjectCreated, m.ObjectPinned, m.ObjectOnDisk, m.StoreFailed, m.ActorLocated, m.ClusterDescribed, PackageAnswer}
    | {ActorSaved, ActorLoaded, CoordinationDone, CoordinationFailed}
)
# What this shell handles itself, or looks at first.
NOT_FOR_MACHINE = (
    WORKER_MESSAGES
    | REPLIES
    | {m.Registered, m.WorkerExited, m.ProcessEnded, m.LogLines, CountHeld, m.LeftNode, RegistrationRefused}
)
