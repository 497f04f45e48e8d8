"""Messages to bytes and back; what is no message of ours is refused here."""

from __future__ import annotations

import contextlib
from typing import Any, Union

import msgspec

from clusterpool.core import actor_messages as a
from clusterpool.core import coordination_messages as c
from clusterpool.core import joining as j
from clusterpool.core import messages as m
from clusterpool.core import package_messages as p
from clusterpool.core import peer_messages as n
from clusterpool.core import recovery_messages as r
from clusterpool.core import transfer_messages as t
from clusterpool.core import tunnel_messages as u

AnyMessage = Union[  # noqa: UP007
    m.SetupWorker, m.WorkerReady, m.WorkerSetupFailed, m.StartTasks, m.TasksFinished, m.StreamItem, m.StreamTaken,
    m.TaskStarted, m.TasksUnsent,
    m.ForgetFunctions, m.TakeBackTasks, m.CancelTasks, m.RetireWorker, m.ResolveObject, m.ObjectResolved, m.AddBorrower,
    m.RemoveBorrower, m.WatchProcess, m.ProcessEnded, m.NodeLost, m.Hello, m.RegisterProcess, m.Registered,
    m.LeaveNode, m.LeftNode, m.RequestWorkers, m.CancelRequest, m.WorkerGranted, m.RequestFailed, m.ReleaseWorkers,
    m.KillWorker, m.ReclaimLeases, m.WorkerExited, m.WorkerBlocked, m.WorkerUnblocked, m.WorkerLingers, m.LogLines,
    m.CreateObject,
    m.ObjectCreated, m.StoreFailed, m.SealObject, m.AbortObject, m.PinObject, m.ObjectPinned, m.ObjectOnDisk,
    m.UnpinObjects, m.FreeObjects, m.RegisterActor, m.ActorChanged, m.LifeEnded, m.LocateActor, m.ActorLocated,
    m.KillActor,
    a.LogCalls, a.SaveActor, a.ActorSaved, a.LoadActor, a.ActorLoaded, a.ResultsTaken, a.CallsResumed,
    m.DescribeCluster, m.WatchCapacity, m.CapacityChanged, m.ClusterDescribed, m.StopNode, m.Relay, m.Undeliverable,
    n.EndJob, n.JobEnded, n.LoadChanged, n.AskAlive, n.StillAlive,
    j.RegistrationRefused, p.OfferPackage, p.SendPackage, p.PackageAnswer,
    c.IsMoved, c.AdoptCarrier, c.AcquireToken, c.GetItem, c.CancelWait, c.ReleaseToken, c.ReturnToken, c.ReadValue,
    c.PutItem, c.ReturnItem, c.CountItems, c.ReadCell, c.WriteCell, c.ForgetCarriers, c.MoveCarrier, c.CarrierMoved,
    c.CoordinationDone, c.CoordinationFailed, c.ReportStuck, c.CountHeld, c.HeldCounted,
    t.OpenTransfer, t.TransferOpened, t.TransferRefused, t.SendChunk, t.ChunkData, t.CloseTransfer,
    r.CopyMade, r.CopyGone, r.CopyUnreadable, r.PromoteCopy, r.RequestsLost,
    u.OpenTunnel, u.TunnelOpened, u.TunnelRefused, u.TunnelData, u.TunnelCredit, u.TunnelEnd, u.TunnelStop,
]  # fmt: skip

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(AnyMessage)

encode = _encoder.encode
encode_into = _encoder.encode_into


def decode(frame: bytes | bytearray | memoryview) -> m.Message:
    """The message in `frame`.

    Raises: msgspec.MsgspecError when the bytes are no message of ours.
    """
    try:
        message: m.Message = _decoder.decode(frame)
    except (UnicodeDecodeError, RecursionError) as exc:  # msgspec lets these two pass
        raise msgspec.DecodeError(f"malformed frame: {exc}") from exc
    return message


def unsent_tasks(destination: m.Address, message: m.Message | bytes) -> m.TasksUnsent | None:
    """What to tell the sender of a message that got nowhere; None if it was to start nothing there."""
    with contextlib.suppress(msgspec.MsgspecError):  # of a relay, whose sender may have sent anything
        message = decode(message) if isinstance(message, bytes) else message
        if isinstance(message, m.StartTasks):
            return m.TasksUnsent(destination, [spec.number for spec in message.tasks])
    return None
