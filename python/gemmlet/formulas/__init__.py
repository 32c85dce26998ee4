"""The registry: every activation, loss and optimizer rule, declared once, with its NumPy expression.

The NumPy expressions here are the reference: short, and evaluated in float64 whatever the input. Those in C++ stand in
``csrc/formulas/``. The entries drive ``gemmlet.kernels.__all__``, the documentation, the tests and the benchmarks.
"""
