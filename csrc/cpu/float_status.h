// The floating-point environment of a thread: its mode (rounding, flush to zero) and its status flags.
//
// Contract
//   FloatMode holds what another library may have changed, and what float_mode() and set_float_mode() carry from one thread
//   to another. Flags have the values of NumPy's NPY_FPE_*. On a processor that is not known here there are no flags.
#pragma once

#include <cstdint>

namespace gemmlet {

constexpr unsigned divide_by_zero = 1, overflow = 2, underflow = 4, invalid = 8;

#if defined(__x86_64__)
using FloatMode = unsigned;
inline FloatMode float_mode() { return __builtin_ia32_stmxcsr(); }
inline void set_float_mode(FloatMode mode) { __builtin_ia32_ldmxcsr(mode); }
inline unsigned float_status() {
  const unsigned csr = __builtin_ia32_stmxcsr();
  return (csr >> 2 & 7) | (csr & 1) << 3;
}
inline void clear_float_status() {
  // To write the register takes longer than to read it.
  const unsigned csr = __builtin_ia32_stmxcsr();
  if ((csr & 0x1d) != 0) __builtin_ia32_ldmxcsr(csr & ~0x3fu);
}
inline void raise_float_status(unsigned flags) {
  __builtin_ia32_ldmxcsr(__builtin_ia32_stmxcsr() | (flags & 7) << 2 | flags >> 3);
}
#elif defined(__aarch64__)
using FloatMode = std::uint64_t;
inline FloatMode float_mode() {
  FloatMode mode;
  __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
}
inline void set_float_mode(FloatMode mode) { __asm__ volatile("msr fpcr, %0" : : "r"(mode)); }
inline unsigned float_status() {
  std::uint64_t fpsr;
  __asm__ volatile("mrs %0, fpsr" : "=r"(fpsr));
  return static_cast<unsigned>((fpsr >> 1 & 7) | (fpsr & 1) << 3);
}
inline void clear_float_status() { __asm__ volatile("msr fpsr, %0" : : "r"(std::uint64_t{0})); }
inline void raise_float_status(unsigned flags) {
  std::uint64_t fpsr;
  __asm__ volatile("mrs %0, fpsr" : "=r"(fpsr));
  fpsr |= std::uint64_t{flags & 7} << 1 | flags >> 3;
  __asm__ volatile("msr fpsr, %0" : : "r"(fpsr));
}
#else
using FloatMode = int;
inline FloatMode float_mode() { return 0; }
inline void set_float_mode(FloatMode) {}
inline unsigned float_status() { return 0; }
inline void clear_float_status() {}
inline void raise_float_status(unsigned) {}
#endif

// Leaves these status flags at its end: for code that raises some which say nothing about its result.
class FloatStatusGuard {
 public:
  explicit FloatStatusGuard(unsigned status) : status_(status) {}
  FloatStatusGuard(const FloatStatusGuard&) = delete;
  FloatStatusGuard& operator=(const FloatStatusGuard&) = delete;
  ~FloatStatusGuard() {
    if (float_status() == status_) return;
    clear_float_status();
    if (status_ != 0) raise_float_status(status_);
  }

 private:
  const unsigned status_;
};

}  // namespace gemmlet
