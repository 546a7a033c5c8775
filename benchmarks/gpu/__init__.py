"""All measurements on a GPU, by one command: docs/gpu.md.

A part is one file of results. It has one or more stages: modules with a function `plan`, which
returns measurements by name. A stage runs in a process of its own, so that frameworks do not share
memory. A failed measurement ends the process, and the next one starts in a new process.
"""
