# The instruction sets that the kernels are compiled for. Nothing else in the repository names a flag of one.
#
# GEMMLET_VECTOR_BYTES is the width of the vectors in csrc/cpu/simd.h. The names are those of the x86-64 psABI levels;
# python/gemmlet/backends/cpu.py picks the best that the processor and the operating system support.

set(GEMMLET_ISAS native CACHE STRING
  "Instruction sets to build: `native`, the best of this machine; `all`, for a package that others will install; or a list, \
as x86_64_v3;baseline")

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

if(GEMMLET_ISAS STREQUAL "native")
  # For another machine than this one, all.
  if(NOT CMAKE_CROSSCOMPILING)
    try_run(gemmlet_status gemmlet_compiled ${PROJECT_BINARY_DIR}/native_isa ${PROJECT_SOURCE_DIR}/cmake/native_isa.cpp
      RUN_OUTPUT_VARIABLE gemmlet_native)
    if(NOT gemmlet_compiled OR NOT gemmlet_status EQUAL 0)
      message(FATAL_ERROR "cmake/native_isa.cpp, which asks for this machine's instruction sets, does not run; say which "
                          "to build with -DGEMMLET_ISAS=all, or a list of ${GEMMLET_ISA_VARIANTS}")
    endif()
    string(REPLACE "-" "_" GEMMLET_ISA_VARIANTS ${gemmlet_native})
  endif()
elseif(NOT GEMMLET_ISAS STREQUAL "all")
  foreach(isa IN LISTS GEMMLET_ISAS)
    if(NOT isa IN_LIST GEMMLET_ISA_VARIANTS)
      message(FATAL_ERROR "GEMMLET_ISAS: ${isa} is none of native, all, ${GEMMLET_ISA_VARIANTS}")
    endif()
  endforeach()
  set(GEMMLET_ISA_VARIANTS ${GEMMLET_ISAS})
endif()
message(STATUS "Instruction sets: ${GEMMLET_ISA_VARIANTS}")
