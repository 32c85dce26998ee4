// Samples of few different values as bytes: see plan.h.
#include <algorithm>
#include <array>
#include <bit>
#include <type_traits>

#include "cpu/training/plan.h"

namespace gemmlet {

template <class T>
bool encode(const T* x, Index n, std::uint8_t* bytes, T* values) {
  using Bits = std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>;
  // A hash table with open addressing, at most an eighth full: by its bits, so that any number is equal to itself alone. The
  // halves of the bits are folded: else multiples of 1/255, which images are, would share slots.
  constexpr int log_slots = 11, slots = 1 << log_slots;
  constexpr Bits factor = static_cast<Bits>(0x9E3779B97F4A7C15u >> (64 - 8 * sizeof(T))) | 1;
  struct Slot {
    Bits bits;
    std::int16_t byte;
  };
  std::array<Slot, slots> table;
  table.fill({0, -1});
  const auto slot_of = [&](Bits bits) {
    auto at = static_cast<std::size_t>(static_cast<Bits>((bits ^ (bits >> 4 * sizeof(T))) * factor) >>
                                       (8 * sizeof(T) - log_slots));
    while (table[at].byte >= 0 && table[at].bits != bits) at = (at + 1) % slots;
    return &table[at];
  };
  int count = 0;
  const auto add = [&](Slot* slot, Bits bits) {
    values[count] = std::bit_cast<T>(bits);
    *slot = {bits, static_cast<std::int16_t>(count++)};
  };
  add(slot_of(0), 0);  // zeros are the byte 0
  for (Index i = 0; i < n; ++i) {
    const Bits bits = std::bit_cast<Bits>(x[i]);
    Slot* const slot = slot_of(bits);
    if (slot->byte < 0) {
      if (count == 256) return false;
      add(slot, bits);
    }
    bytes[i] = static_cast<std::uint8_t>(slot->byte);
  }
  std::fill(values + count, values + 256, T(0));
  return true;
}

template bool encode(const float*, Index, std::uint8_t*, float*);
template bool encode(const double*, Index, std::uint8_t*, double*);

}  // namespace gemmlet
