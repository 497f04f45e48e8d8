"""`concurrent.futures.thread`, passed through: threads stay in the driver."""

from __future__ import annotations

from concurrent.futures.thread import BrokenThreadPool, ThreadPoolExecutor

__all__ = ["BrokenThreadPool", "ThreadPoolExecutor"]
