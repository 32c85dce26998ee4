// Which instruction sets this processor has and this operating system saves: asked without running any of them.
//
// Contract
//   Names of the levels of the x86-64 psABI, as python/gemmlet/backends/cpu.py knows them, best first; elsewhere the baseline
//   alone. Nothing beyond the baseline is executed.
#pragma once

#include <initializer_list>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace gemmlet {

#if defined(__x86_64__)

struct CpuidRegisters {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  CpuidRegisters(unsigned leaf, unsigned subleaf) {
    if (__get_cpuid_count(leaf, subleaf, &eax, &ebx, &ecx, &edx) == 0) eax = ebx = ecx = edx = 0;
  }
};

inline bool has_bits(unsigned value, std::initializer_list<int> bits) {
  for (int bit : bits)
    if (((value >> bit) & 1u) == 0) return false;
  return true;
}

// The register state that the operating system saves when it switches threads (XCR0).
inline unsigned saved_state() {
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

// Bit numbers: Intel SDM volume 2, CPUID; AMD APM volume 3, appendix E.
inline std::vector<const char*> supported_isas() {
  std::vector<const char*> levels;
  const CpuidRegisters basic(1, 0), extended(7, 0), amd(0x80000001u, 0);
  const bool xsave = has_bits(basic.ecx, {27});
  const unsigned state = xsave ? saved_state() : 0;
  const bool v3 = has_bits(basic.ecx, {12, 22, 28, 29})               // FMA, MOVBE, AVX, F16C
                  && has_bits(extended.ebx, {3, 5, 8})                // BMI1, AVX2, BMI2
                  && has_bits(amd.ecx, {5})                           // LZCNT
                  && has_bits(state, {1, 2});                         // XMM and YMM
  const bool v4 = v3 && has_bits(extended.ebx, {16, 17, 28, 30, 31})  // AVX-512 F, DQ, CD, BW, VL
                  && has_bits(state, {5, 6, 7});                      // masks, ZMM
  if (v4) levels.push_back("x86-64-v4");
  if (v3) levels.push_back("x86-64-v3");
  levels.push_back("baseline");
  return levels;
}

#else

inline std::vector<const char*> supported_isas() { return {"baseline"}; }

#endif

}  // namespace gemmlet
