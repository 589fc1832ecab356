// Selection without sorting: the numbers of a row by their magnitudes, which are in the order of
// their bits. A search knows more and more of the bits of the one it looks for, from the highest
// down, by counting the candidates that each value of the next few would leave.
#pragma once

#include "core/math.h"

DC_KERNEL_NAMESPACE_BEGIN

template <class R>
struct KeyOf;
template <>
struct KeyOf<float> {
  using type = uint32_t;
};
template <>
struct KeyOf<double> {
  using type = uint64_t;
};
template <class R>
using Key = typename KeyOf<R>::type;

template <class R>
constexpr int kKeyBits = 8 * sizeof(R) - 1;
template <class R>
constexpr Key<R> kNanKey = ~Key<R>(0) >> 1;  // the largest
template <class R>
constexpr Key<R> kNoKey = ~Key<R>(0);

// |x| as bits; every NaN alike, behind infinity.
template <class R>
DC_HD Key<R> key_of(R x) {
  return x != x ? kNanKey<R> : bit_cast<Key<R>>(x) & kNanKey<R>;
}

constexpr int kDigitBits = 11, kBuckets = 1 << kDigitBits;
template <class R>
constexpr int kDigits = (kKeyBits<R> + kDigitBits - 1) / kDigitBits;

struct Bucket {
  int index;
  int64_t before, count;  // how many are in the buckets before it, and in it
};

// The bucket of a rank, or the last.
template <class Count>
DC_HD Bucket bucket_of(int64_t rank, const Count* counts, int n) {
  Bucket found{0, 0, int64_t(counts[0])};
  while (found.before + found.count <= rank && found.index + 1 < n) {
    found.before += found.count;
    found.count = int64_t(counts[++found.index]);
  }
  return found;
}

// Plain data, for shared memory.
template <class R>
struct Search {
  Key<R> low;           // the candidates are the keys from here ...
  int open;             // ... that differ in this many of the lowest bits only
  int64_t rank, count;  // of the key among the candidates, and how many they are

  DC_HD static Search of(int64_t rank, int64_t n) { return {0, kKeyBits<R>, rank, n}; }

  DC_HD Key<R> high() const { return low + ((Key<R>(1) << open) - 1); }
  DC_HD bool holds(Key<R> key) const { return key - low <= high() - low; }
  // What is left below the next digit. The last digit is cut short by bits that are known already,
  // the same for all candidates.
  DC_HD int rest() const { return open > kDigitBits ? open - kDigitBits : 0; }
  DC_HD int bucket(Key<R> key) const { return int(key >> rest()) & (kBuckets - 1); }

  // The candidates are those of one bucket; all bits down to the `rest` are known now.
  DC_HD void narrow(const Bucket& bucket, int rest) {
    low |= Key<R>(bucket.index) << rest;
    open = rest;
    rank -= bucket.before;
    count = bucket.count;
  }
};

// Where a share of the way from the first of n ordered numbers to the last lies: so far from the
// number of that rank to the next. A share outside [0, 1] is taken for the nearest inside, NaN for
// 0.
struct Position {
  int64_t rank;
  double weight;
};
DC_HD Position position_of(double share, int64_t n) {
  const double last = double(n - 1);
  double at = share * last;
  at = at > 0 ? at : 0;
  at = at < last ? at : last;
  const int64_t rank = int64_t(at);
  return {rank, at - double(rank)};
}

// The number so far from one key to the next. All is positive: nothing cancels. Where nothing lies
// between them, an infinite next one has no part.
template <class R>
DC_HD double between(Key<R> key, Key<R> next, double weight) {
  const double a = bit_cast<R>(key), b = bit_cast<R>(next);
  return weight == 0 || key == next ? a : mul_add(weight, b - a, a);
}

DC_KERNEL_NAMESPACE_END
