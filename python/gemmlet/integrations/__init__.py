"""gemmlet under code that exists already: one module for each package that it is swapped into.

Nothing here is imported before it is asked for, and each module needs the package that it is named after.
"""
