// Transforms two random words into two standard normals (Box & Muller 1958) with the same bits on
// every machine: additions, multiplications and one square root, each rounded separately, in this
// order. python/diffcore/reference/philox.py is the specification, docs/numerics.md has the errors.
#pragma once

#include "core/math.h"
#include "noise/philox.h"

DC_KERNEL_NAMESPACE_BEGIN

// -2 ln u, u = (w >> 1) 2^-31 + 2^-32 in (0, 1]
template <class Lanes>
DC_HD typename Lanes::F squared_radius(typename Lanes::U w) {
  using I = typename Lanes::I;
  using F = typename Lanes::F;
  // -2 ln(1 + f) = f Σ kLog[k] f^k for sqrt ½ <= 1 + f < sqrt 2
  constexpr float kLog[] = {-0x1p+1f,       0x1.fffff6p-1f,  -0x1.555702p-1f,
                            0x1.0004c8p-1f, -0x1.98d39cp-2f, 0x1.535c2cp-2f,
                            -0x1.317c9p-2f, 0x1.25059cp-2f,  -0x1.65f09cp-3f};
  constexpr int32_t kSqrtHalf = 0x3f3504f3, kExponent31 = 31 << 23;
  const F s = Lanes::add(Lanes::to_real(I(w >> 1)), Lanes::real(0.5f));
  // u = 2^k m, sqrt ½ <= m < sqrt 2, and f = m - 1
  const I t = bit_cast<I>(s) - (kSqrtHalf + kExponent31);
  const F f = Lanes::add(bit_cast<F>(I((t & 0x7fffff) + kSqrtHalf)), Lanes::real(-1.0f));
  const F log = Lanes::mul(f, polynomial<Lanes>(kLog, f));  // -2 ln m
  const F scale = Lanes::mul(Lanes::to_real(I(t >> 23)), Lanes::real(-0x1.62e43p+0f));
  return Lanes::add(scale, log);
}

// tests/cuda/square_roots.cu takes all 2^31 of these roots on the CPU and on CUDA.
template <class Lanes>
DC_HD typename Lanes::F radius(typename Lanes::U w) {
  return Lanes::sqrt(squared_radius<Lanes>(w));
}

// The upper two bits of v select a quarter turn, the other bits an angle within π/4 of it.
template <class Lanes>
DC_HD void box_muller(typename Lanes::U w, typename Lanes::U v, typename Lanes::F& z0,
                      typename Lanes::F& z1) {
  using U = typename Lanes::U;
  using I = typename Lanes::I;
  using F = typename Lanes::F;
  // sin x = x + x y Σ kSin[k] y^k and cos x = 1 + y Σ kCos[k] y^k with y = x², |x| <= π/4
  constexpr float kSin[] = {-0x1.555546p-3f, 0x1.110778p-7f, -0x1.995408p-13f};
  constexpr float kCos[] = {-0x1.ffffbap-2f, 0x1.553faap-5f, -0x1.647822p-10f};
  const F x = Lanes::mul(Lanes::to_real(I(v << 2)), Lanes::real(0x1.921fb6p-32f));
  const F y = Lanes::mul(x, x);
  const F sine = Lanes::add(x, Lanes::mul(x, Lanes::mul(y, polynomial<Lanes>(kSin, y))));
  const F cosine = Lanes::add(Lanes::real(1.0f), Lanes::mul(y, polynomial<Lanes>(kCos, y)));
  const F r = bit_cast<F>(U(bit_cast<U>(radius<Lanes>(w)) ^ (v & 0x80000000u)));
  const I swap = I(v << 1);
  z0 = Lanes::mul(r, Lanes::where_negative(swap, sine, cosine));
  z1 = Lanes::mul(r, Lanes::where_negative(swap, cosine, sine));
}

// The four normals of one block.
DC_HD void normals(const NoiseKey& key, uint32_t block, float* z) {
  uint32_t c[4] = {key.first_block + block, key.stream, key.id[0], key.id[1]};
  philox<ScalarLanes>(c, key.key[0], key.key[1]);
  box_muller<ScalarLanes>(c[0], c[1], z[0], z[1]);
  box_muller<ScalarLanes>(c[2], c[3], z[2], z[3]);
}

// Two normals, or one, for loops over single elements.
DC_HD void normal_pair(const NoiseKey& key, uint64_t pair, float& z0, float& z1) {
  uint32_t c[4] = {key.first_block + uint32_t(pair / 2), key.stream, key.id[0], key.id[1]};
  philox<ScalarLanes>(c, key.key[0], key.key[1]);
  box_muller<ScalarLanes>(pair % 2 ? c[2] : c[0], pair % 2 ? c[3] : c[1], z0, z1);
}
DC_HD float normal(const NoiseKey& key, uint64_t element) {
  float z0, z1;
  normal_pair(key, element / 2, z0, z1);
  return element % 2 ? z1 : z0;
}

DC_KERNEL_NAMESPACE_END
