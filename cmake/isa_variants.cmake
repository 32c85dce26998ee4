# The instruction sets that the kernels are compiled for. Nothing else in the repository names a flag of one.
#
# GEMMLET_VECTOR_BYTES is the width of the vectors in csrc/cpu/simd.h. The names are those of the x86-64 psABI levels;
# python/gemmlet/backends/cpu.py picks the best that the processor and the operating system support.

if(CMAKE_OSX_ARCHITECTURES)
  set(gemmlet_processor ${CMAKE_OSX_ARCHITECTURES})
else()
  set(gemmlet_processor ${CMAKE_SYSTEM_PROCESSOR})
endif()

set(GEMMLET_ISA_VARIANTS baseline)
set(GEMMLET_ISA_FLAGS_baseline -DGEMMLET_VECTOR_BYTES=16)

if(gemmlet_processor MATCHES "^(x86_64|AMD64|amd64)$")
  list(APPEND GEMMLET_ISA_VARIANTS x86_64_v3 x86_64_v4)
  set(GEMMLET_ISA_FLAGS_x86_64_v3 -march=x86-64-v3 -DGEMMLET_VECTOR_BYTES=32)
  set(GEMMLET_ISA_FLAGS_x86_64_v4 -march=x86-64-v4 -mprefer-vector-width=512 -DGEMMLET_VECTOR_BYTES=64)
endif()
