"""Imported at the start of each Python process of a run: does what the run's environment asks for.

- COMPAT_TESTS_SUITE: a folder with further modules of the package `test`, for a Python that lacks some of them.
- COMPAT_TESTS_SUBJECT: put what is tested in the place of the standard names. Given only to the scripts that tests
  start (they `import multiprocessing`), and not handed on to processes that these start.
"""

import os

if "COMPAT_TESTS_SUITE" in os.environ:
    import test

    test.__path__.append(os.environ["COMPAT_TESTS_SUITE"])

if "COMPAT_TESTS_SUBJECT" in os.environ:
    from compat_tests.subject import Subject

    Subject.parse(os.environ.pop("COMPAT_TESTS_SUBJECT")).put_in_place()
