"""`python -m benchmarks`: all measurements on the CPU, printed and written as JSON."""

from benchmarks.bench_losses import main

main()
