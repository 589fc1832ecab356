// Radix select: finds an order statistic of the magnitudes of a row without sorting. Nonnegative
// floating-point numbers sort like their bits, taken as integers (keys). The search determines the
// key from the highest bits down: for each digit it counts the candidates by the value of that
// digit, and continues in the bucket that contains the rank.
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
constexpr Key<R> kNanKey = ~Key<R>(0) >> 1;  // the largest key of a number
template <class R>
constexpr Key<R> kNoKey = ~Key<R>(0);  // larger than all keys

// The bits of |x|. Every NaN has the same key, above infinity.
template <class R>
DC_HD Key<R> key_of(R x) {
  return x != x ? kNanKey<R> : bit_cast<Key<R>>(x) & kNanKey<R>;
}

constexpr int kDigitBits = 11, kBuckets = 1 << kDigitBits;
template <class R>
constexpr int kDigits = (kKeyBits<R> + kDigitBits - 1) / kDigitBits;

struct Bucket {
  int index;
  int64_t before;  // number of keys in the buckets before it
  int64_t count;   // number of keys in it
};

// The bucket that contains a rank, or the last bucket.
template <class Count>
DC_HD Bucket bucket_of(int64_t rank, const Count* counts, int n) {
  Bucket found{0, 0, int64_t(counts[0])};
  while (found.before + found.count <= rank && found.index + 1 < n) {
    found.before += found.count;
    found.count = int64_t(counts[++found.index]);
  }
  return found;
}

// The state of a search. Plain data, because it is stored in shared memory.
template <class R>
struct Search {
  Key<R> low;     // the smallest possible candidate
  int open;       // candidates differ from `low` only in this many of the lowest bits
  int64_t rank;   // of the key among the candidates
  int64_t count;  // number of candidates

  DC_HD static Search of(int64_t rank, int64_t n) { return {0, kKeyBits<R>, rank, n}; }

  DC_HD Key<R> high() const { return low + ((Key<R>(1) << open) - 1); }
  DC_HD bool holds(Key<R> key) const { return key - low <= high() - low; }
  // The number of undetermined bits below the next digit. For the last digit a bucket index also
  // includes bits that are already determined, which are the same for all candidates.
  DC_HD int rest() const { return open > kDigitBits ? open - kDigitBits : 0; }
  DC_HD int bucket(Key<R> key) const { return int(key >> rest()) & (kBuckets - 1); }

  // Continues in one bucket: all bits except the lowest `rest` are determined.
  DC_HD void narrow(const Bucket& bucket, int rest) {
    low |= Key<R>(bucket.index) << rest;
    open = rest;
    rank -= bucket.before;
    count = bucket.count;
  }
};

// The position of the quantile `level` among n ordered numbers: a fraction `weight` of the way from
// the number of this rank to the next. A level outside [0, 1] is clamped, NaN counts as 0.
struct Position {
  int64_t rank;
  double weight;
};
DC_HD Position position_of(double level, int64_t n) {
  const double last = double(n - 1);
  double at = level * last;
  at = at > 0 ? at : 0;
  at = at < last ? at : last;
  const int64_t rank = int64_t(at);
  return {rank, at - double(rank)};
}

// Interpolates from one key to the next by `weight`. Both are nonnegative, so nothing cancels. With
// weight 0 or equal keys `next` is not used, because it may be infinite.
template <class R>
DC_HD double between(Key<R> key, Key<R> next, double weight) {
  const double a = bit_cast<R>(key), b = bit_cast<R>(next);
  return weight == 0 || key == next ? a : mul_add(weight, b - a, a);
}

DC_KERNEL_NAMESPACE_END
