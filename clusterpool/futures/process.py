"""`concurrent.futures.process` under our name: the executor and the error that it breaks with."""

from __future__ import annotations

from concurrent.futures.process import BrokenProcessPool

from clusterpool.futures.executor import ProcessPoolExecutor

__all__ = ["BrokenProcessPool", "ProcessPoolExecutor"]
