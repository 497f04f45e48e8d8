"""The backend gets registered without our importing joblib."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run(code: str) -> str:
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


INSTALL = "import sys; from clusterpool.joblib import hook; hook.install(); hook.install(); "
CHECK = "\nprint('clusterpool' in __import__('joblib').parallel.BACKENDS)"


@pytest.mark.parametrize(
    "use",
    [
        "import joblib",
        "import joblib.parallel",
        "from joblib import Parallel",
        "from joblib.parallel import parallel_config",
        "import sklearn.utils.parallel",
    ],
)
def test_registers_when_joblib_is_imported_later(use):
    if "sklearn" in use:
        pytest.importorskip("sklearn")
    assert run(INSTALL + "assert 'joblib' not in sys.modules;" + use + CHECK) == "True"


def test_registers_at_once_when_joblib_is_there():
    assert run("import joblib;" + INSTALL + CHECK) == "True"


def test_the_finder_goes_and_leaves_no_trace_on_the_module():
    code = (
        "n = len(__import__('sys').meta_path);"
        + INSTALL
        + "assert len(sys.meta_path) == n + 1; import joblib.parallel as p, inspect;"
        "assert len(sys.meta_path) == n;"
        "assert type(p.__loader__).__name__ == 'SourceFileLoader';"
        "assert p.__spec__.loader is p.__loader__;"
        "assert 'def delayed' in inspect.getsource(p); print('clean')"
    )
    assert run(code) == "clean"


def test_a_failed_import_of_joblib_can_be_tried_again():
    code = (
        INSTALL
        + """
sys.modules["queue"] = None
try:
    import joblib
except ImportError:
    pass
del sys.modules["queue"]
import queue
for name in [n for n in sys.modules if n.startswith("joblib")]:
    del sys.modules[name]
import joblib
print("clusterpool" in joblib.parallel.BACKENDS)
"""
    )
    assert run(code) == "True"


def test_the_hook_is_cheap_to_install():
    code = INSTALL + "print(sorted({'joblib', 'multiprocessing', 'numpy', 'concurrent'} & set(sys.modules)))"
    assert run(code) == "[]"
