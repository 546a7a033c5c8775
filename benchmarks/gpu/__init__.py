"""Everything that is to be measured on a GPU, by one command: docs/gpu.md.

A part is one file of results. It has one or more stages, modules with a function `plan` that
names measurements. A stage runs in a process of its own, so that frameworks do not share memory,
and a failed measurement cannot spoil the next.
"""
