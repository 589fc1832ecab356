// The order in which threads or blocks run: EMULATION_ORDER.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <vector>

namespace emulation {

class Order {
 public:
  Order() {
    const char* given = getenv("EMULATION_ORDER");
    if (!given || !*given || !strcmp(given, "forward")) return;
    kind_ = strcmp(given, "backward") ? kRandom : kBackward;
    state_ = strtoull(given, nullptr, 0) * 2 + 1;
  }
  bool forward() const { return kind_ == kForward; }
  template <class T>
  void arrange(std::vector<T>& items) {
    if (kind_ == kBackward) std::reverse(items.begin(), items.end());
    if (kind_ == kRandom)
      for (size_t n = items.size(); n > 1; --n) std::swap(items[n - 1], items[below(n)]);
  }

 private:
  size_t below(size_t n) {
    state_ = state_ * 6364136223846793005ull + 1442695040888963407ull;
    return size_t(state_ >> 33) % n;
  }
  enum { kForward, kBackward, kRandom } kind_ = kForward;
  uint64_t state_ = 0;
};

}  // namespace emulation
