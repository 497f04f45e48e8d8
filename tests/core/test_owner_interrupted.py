from __future__ import annotations

from clusterpool.core import messages as m
from clusterpool.core import owner_events as e
from clusterpool.core.messages import Address
from tests.core.machines import Owner, make_task, of_type, sent

W1 = Address("n1", "w1")


def test_ctrl_c_drops_what_waits_and_interrupts_what_runs_and_keeps_the_workers() -> None:
    owner = Owner()
    (request,) = sent(owner.open_set(size=1), m.RequestWorkers)
    owner.grant(request.request, "w1")
    tasks = [make_task(1024 * number) for number in range(1, 4)]
    owner.submit(*tasks)  # how long they take is not known yet: one at a time
    commands = owner.handle(e.WorkInterrupted())
    (failed,) = of_type(commands, e.FailTasks)
    assert ([task.spec.number for task in failed.tasks], failed.kind) == ([2048, 3072], "cancelled")
    assert sent(commands, m.CancelTasks, W1) == [m.CancelTasks([1024], True)]
    assert not sent(commands, m.KillWorker) and not sent(commands, m.ReleaseWorkers)
    owner.finish("w1", m.TaskResult(1024, m.TaskStatus.CANCELLED, b""))
    # The next call finds the same worker.
    again = owner.submit(make_task(4096))
    assert [task.number for message in sent(again, m.StartTasks, W1) for task in message.tasks] == [4096]
