"""What the stages do, each in a process of its own.

It imports `benchmarks.cases`, the package, and of the suite `journal`, `stages` and `bundle`.
"""
