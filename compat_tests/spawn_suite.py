"""The tests of `test._test_multiprocessing` with the start method spawn, made as CPython's own modules make them.

A module of its own, importable by name, because the tests send their functions and classes to other processes.
CPython has such a module too (`test.test_multiprocessing_spawn`), which some installed Pythons lack.
"""

from __future__ import annotations

from test import _test_multiprocessing

_test_multiprocessing.install_tests_in_module_dict(globals(), "spawn")
