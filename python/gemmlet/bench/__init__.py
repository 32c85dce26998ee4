"""The benchmarks: what is timed (`cases`), how (`timing`), and what comes out (`results`).

``gemmlet bench`` and ``pytest benchmarks`` run over the same cases. Nothing here is imported by gemmlet itself.
"""
