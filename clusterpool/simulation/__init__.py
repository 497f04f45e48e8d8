"""Whole clusters in virtual time: the machines of `core/` under simulated shells, with faults drawn from a seed."""
