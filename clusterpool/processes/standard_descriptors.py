"""Descriptors 0, 1 and 2, which a program may be started without (`<&-`, some daemons and launchers of menus)."""

from __future__ import annotations

import os


def fill_standard_descriptors() -> None:
    """Open `/dev/null` where one of them is closed, for this process alone.

    Else the next lock, pipe or socket of ours would get its number: what a process that we start is given as its
    standard input takes the place of a lock that it was to inherit, and what a library writes to the standard error
    goes to a node.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest that is free, so this one
