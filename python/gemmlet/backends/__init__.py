"""The backends: each computes the functions of `gemmlet.kernels`; the reference catches what one leaves out."""
