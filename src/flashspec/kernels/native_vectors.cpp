// Vector arithmetic that native.cpp and what it includes share.

namespace {

constexpr int32_t IOTA[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

inline vec exponential(vec x) {  // relative error below 2e-7; 0 under -87; NaN stays NaN
  const vec bounded = x < -87.0f ? broadcast(-87.0f) : x > 88.0f ? broadcast(88.0f) : x;
  const vec magic = broadcast(0x1.8p23f), shifted = bounded * 1.44269504f + magic, power = shifted - magic;
  const vec r = bounded - power * 0.693359375f + power * 2.12194440e-4f;  // log 2 in two parts
  vec series = broadcast(1.0f / 5040);
  for (float factorial : {720.0f, 120.0f, 24.0f, 6.0f, 2.0f, 1.0f, 1.0f}) series = series * r + 1.0f / factorial;
  const vec scale = bits<vec>((bits<ivec>(shifted) - bits<ivec>(magic) + 127) << 23);
  return x < -87.0f ? vec{} : series * scale;
}

// a0 b0 a1 b1 ... of the lower and of the upper halves.
#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, ivec{__VA_ARGS__})
#endif
inline vec interleave_low(vec a, vec b) {
#if defined(__AVX512F__)
  return SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#elif defined(__AVX2__)
  return SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#else
  return SHUFFLE(a, b, 0, 4, 1, 5);
#endif
}
inline vec interleave_high(vec a, vec b) {
#if defined(__AVX512F__)
  return SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(__AVX2__)
  return SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  return SHUFFLE(a, b, 2, 6, 3, 7);
#endif
}

// Lane i of the result is the sum of v[i]'s lanes.
inline vec totals(vec v[LANES]) {
#pragma GCC unroll 4
  for (int half = LANES / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) v[i] = interleave_low(v[i], v[i + half]) + interleave_high(v[i], v[i + half]);
  return v[0];
}
template <class Pick> inline float fold(vec v, Pick pick) {  // all lanes into one
  for (int lanes = LANES; lanes > 1; lanes /= 2) v = pick(interleave_low(v, v), interleave_high(v, v));
  return v[0];
}
inline vec larger(vec a, vec b) { return a > b ? a : b; }
inline vec plus(vec a, vec b) { return a + b; }

inline vec read(const float* from) { return load<vec>(from); }
inline vec read(const uint16_t* from) { return bits<vec>(widen(load<halves>(from)) << 16); }
inline void write(float* to, vec value) { store(to, value); }
inline void write(uint16_t* to, vec value) {  // to nearest even
  const uvec word = bits<uvec>(value), rounded = (word + 0x7fff + (word >> 16 & 1)) >> 16;
  store(to, __builtin_convertvector(value == value ? rounded : uvec{} + 0x7fc0u, halves));
}

}  // namespace
