"""The part of the suites that every change is held to. It takes about four minutes on two cores.

Of CPython's tests that is all; of joblib's, what takes long for what it tests is left out. `./dev compat all` runs
everything.
"""

from __future__ import annotations

# Suite -> parts of class names, or tests, as for --only; none is all.
CI_PART: dict[str, tuple[str, ...]] = {
    "multiprocessing": (),
    "futures": (),
    "joblib": (
        "test_config",
        "test_memmapping",
        "test_parallel.test_abort_backend",
        "test_parallel.test_backend_context_manager",
        "test_parallel.test_backend_hinting_and_constraints",
        "test_parallel.test_error_in_task_iterator",
        "test_parallel.test_globals_update_at_each_parallel_call",
        "test_parallel.test_lambda_expression",
        "test_parallel.test_nested_loop",
        "test_parallel.test_overwrite_default_backend",
        "test_parallel.test_parallel_return_order_with_return_as_generator_parameter",
        "test_parallel.test_retrieval_context",
        "test_parallel.test_simple_parallel",
    ),
}
