"""The soak of `python -m benchmarks.chaos`: a long job on a cluster whose processes are killed all the while.

`job` is the program under test, in a process of its own; `engines` says how each contender runs it; `clusters` starts
their clusters and knows whom to kill; `monkey` kills; `leaks` looks at what is left; `picture` draws.
"""
