"""clusterpool against multiprocessing, concurrent.futures, loky, Ray and Dask: `python -m benchmarks`."""
