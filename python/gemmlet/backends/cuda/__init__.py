"""The CUDA backend: kernels of `csrc/cuda`, compiled by NVRTC at their first use."""
