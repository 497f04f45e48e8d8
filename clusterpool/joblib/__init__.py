"""joblib's backend "clusterpool"; `import clusterpool` alone registers it, now or when joblib is imported."""

from __future__ import annotations

from clusterpool.joblib.hook import install, register

__all__ = ["install", "register"]
