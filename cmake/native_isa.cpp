// Prints the best instruction set of the machine that builds (isa_variants.cmake).
#include <cstdio>

#include "../csrc/cpu/features.h"

int main() { std::fputs(gemmlet::supported_isas().front(), stdout); }
