"""The version of clusterpool, for whoever must compare it before anything else is loaded."""

__version__ = "0.1.0"
