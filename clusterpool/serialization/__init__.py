"""Values, functions and exceptions as bytes; the only package that knows pickle and cloudpickle."""
