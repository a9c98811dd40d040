// Counter-based noise and verification from raw logits, for native.cpp; reference.py and reference_fused.py are the
// twins. A row's positions are read until the first rejection and no further.

namespace {

constexpr int NOISE = 4 * LANES;  // tokens of one hash: a lane's four words are four neighbouring tokens
constexpr uint32_t ACCEPT = 1, RECOVER = 2, TOKEN = 3;  // sampling/noise.py
constexpr float COLDEST = 1e-6f;
enum Variant { REJECTION, COUPLED, GREEDY };

// Natural logarithm of normal positive numbers, relative error below 3e-7 also next to 1.
inline vec logarithm(vec x) {
  const ivec word = bits<ivec>(x), exponent = (word - 0x3f3504f3) >> 23;  // x = m 2^exponent, m in [sqrt 1/2, sqrt 2)
  const vec m = bits<vec>(word - (exponent << 23)), s = (m - 1.0f) / (m + 1.0f), square = s * s;
  vec series = broadcast(2.0f / 9);
  for (float divisor : {7.0f, 5.0f, 3.0f}) series = series * square + 2.0f / divisor;
  const vec power = floats(exponent);
  return power * 0.693359375f + (s * (series * square + 2.0f) - power * 2.12194440e-4f);
}

#ifdef __AVX512F__  // by lanes of 64 bits as they lie: GCC 12 widens both halves and multiplies all 64 bits
inline void multiply(uvec a, uint32_t b, uvec& high, uvec& low) {
  const __m512i factor = _mm512_set1_epi32(static_cast<int>(b)), x = bits<__m512i>(a);
  const __m512i even = _mm512_mul_epu32(x, factor), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), factor);
  high = bits<uvec>(_mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd));
  low = bits<uvec>(_mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32)));
}
#else
using wide = uint64_t __attribute__((vector_size(8 * LANES)));
inline void multiply(uvec a, uint32_t b, uvec& high, uvec& low) {
  const wide product = __builtin_convertvector(a, wide) * b;
  high = __builtin_convertvector(product >> 32, uvec);
  low = a * b;
}
#endif

// Philox 4x32-10 of LANES groups from `group` on, into the words of their 4 LANES tokens in order.
inline void hash(Index seed, Index position, uint32_t purpose, Index group, uvec words[4]) {
  const uint64_t key = static_cast<uint64_t>(seed), place = static_cast<uint64_t>(position);
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  uvec c0 = load<uvec>(IOTA) + static_cast<uint32_t>(group), c1 = uvec{} + static_cast<uint32_t>(place);
  uvec c2 = uvec{} + purpose, c3 = uvec{} + static_cast<uint32_t>(place >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    uvec high0, low0, high1, low1;
    multiply(c0, 0xD2511F53u, high0, low0);
    multiply(c2, 0xCD9E8D57u, high1, low1);
    c0 = high1 ^ c1 ^ k0, c1 = low1, c2 = high0 ^ c3 ^ k1, c3 = low0;
  }
  const vec even = bits<vec>(c0), odd = bits<vec>(c1), even2 = bits<vec>(c2), odd2 = bits<vec>(c3);
  const vec a = interleave_low(even, even2), b = interleave_high(even, even2);
  const vec c = interleave_low(odd, odd2), d = interleave_high(odd, odd2);
  words[0] = bits<uvec>(interleave_low(a, c)), words[1] = bits<uvec>(interleave_high(a, c));
  words[2] = bits<uvec>(interleave_low(b, d)), words[3] = bits<uvec>(interleave_high(b, d));
}

// -log(1 - u) for u = word / 2^32 within [2^-33, 1 - 2^-24]: the arrival times of an exponential race.
inline vec arrival(uvec word) {
  const vec raw = __builtin_convertvector(word, vec) * 0x1p-32f, most = broadcast(1 - 0x1p-24f);
  const vec u = raw < 0x1p-33f ? broadcast(0x1p-33f) : raw > most ? most : raw;
  const vec rest = 1.0f - u, kept = 1.0f - rest;  // what of u is left in 1 - u
  return kept == 0.0f ? u : -logarithm(rest) * (u / kept);
}

inline float uniform(Index seed, Index position) {
  uvec words[4];
  hash(seed, position, ACCEPT, 0, words);
  return static_cast<float>(words[0][0] >> 8 | 1) * 0x1p-24f;
}

// Calls body(token of the first lane, its LANES values) along a row; lanes behind the end are -inf.
template <class Body> inline void along(const float* row, Index size, Body body) {
  Index token = 0;
  for (; token + LANES <= size; token += LANES) body(token, load<vec>(row + token));
  if (token == size) return;
  float rest[LANES];
  std::fill_n(rest, LANES, -INFINITY);
  std::copy(row + token, row + size, rest);
  body(token, load<vec>(rest));
}

struct Best {  // the first largest value above 0 or -inf, a lane at a time
  vec value;
  ivec token = {};
  explicit Best(float floor) : value(broadcast(floor)) {}
  void see(vec values, Index first) {
    const auto above = values > value;
    value = above ? values : value;
    token = above ? load<ivec>(IOTA) + static_cast<int32_t>(first) : token;
  }
  float most() const { return fold(value, larger); }
  Index first() const {
    const float top = most();
    Index best = INT32_MAX;
    for (int lane = 0; lane < LANES; ++lane)
      if (value[lane] == top) best = std::min<Index>(best, token[lane]);
    return best;
  }
};

struct Distribution {  // softmax of a row of logits over a temperature; tokens under `floor` are out
  const float* logits;
  Index size;
  float heat, floor, most, sum;
  Index best;
  bool finite;

  Distribution(const float* logits, Index size, float heat, float floor, bool sums)
      : logits(logits), size(size), heat(heat), floor(floor), sum(0) {
    Best found(-INFINITY);
    ivec strange = {};
    along(logits, size, [&](Index token, vec x) {
      found.see(x, token);
      strange |= x != x;
    });
    most = found.most(), best = found.first();
    finite = most < INFINITY && most > -INFINITY;
    for (int lane = 0; lane < LANES; ++lane) finite = finite && !strange[lane];
    if (!sums || !finite) return;
    vec total = {};
    along(logits, size, [&](Index, vec x) { total += weight(x); });
    sum = fold(total, plus);
  }
  vec weight(vec x) const { return x < floor ? vec{} : exponential((x - most) / heat); }
  float log_probability(Index token) const {
    const float x = logits[token];
    return x < floor ? -INFINITY : (x - most) / heat - std::log(sum);
  }
};

struct Rows {  // as flashspec.kernels.verify_logits has them
  const float* target;
  const Index *token_ids, *draft_lengths;
  const float* draft;  // null: one-hot
  const Index *seeds, *lengths;
  const float *temperature, *floors;  // floors (B, γ + 1), null: none
  Index gamma, vocab_size, variant;
  Index *num_accepted, *next_token;
  uint8_t* failed;
};

// The winner of the race weight / arrival; with_draft: of max(0, p - q), or of p where that is empty.
Index race(const Distribution& p, const Distribution* q, Index one_hot, Index seed, Index position, uint32_t purpose) {
  Best excess(0.0f), whole(0.0f);
  uvec words[4];
  along(p.logits, p.size, [&](Index token, vec x) {
    const Index part = token / LANES % 4;
    if (part == 0) hash(seed, position, purpose, token / 4, words);
    const vec pace = 1.0f / arrival(words[part]), chance = p.weight(x) / p.sum;
    whole.see(chance * pace, token);
    if (q) {
      vec drafted = broadcast(-INFINITY);
      std::memcpy(&drafted, q->logits + token, sizeof(float) * std::min<Index>(LANES, p.size - token));
      const vec left = chance - q->weight(drafted) / q->sum;
      excess.see(left * pace, token);
    } else if (one_hot >= 0) {
      const ivec here = load<ivec>(IOTA) + static_cast<int32_t>(token);
      excess.see(here == static_cast<int32_t>(one_hot) ? vec{} : chance * pace, token);
    }
  });
  return excess.most() > 0 ? excess.first() : whole.first();
}

void verify_row(const Rows& r, Index row) {
  const Index seed = r.seeds[row], drafted = std::min(r.draft_lengths[row], r.gamma), size = r.vocab_size;
  const float temperature = r.temperature[row], heat = std::max(temperature, COLDEST);
  const bool greedy = r.variant == GREEDY || temperature == 0, rejects = r.variant == REJECTION && !greedy;
  for (Index i = 0;; ++i) {
    const Index at = row * (r.gamma + 1) + i, position = r.lengths[row] + i;
    const Distribution p(r.target + at * size, size, heat, r.floors ? r.floors[at] : -INFINITY, !greedy);
    const Index token = i < drafted ? r.token_ids[row * r.gamma + i] : -1;
    const bool known = token >= 0 && token < size;
    Index next = p.best;
    bool passed = false;
    if (!p.finite) {
      r.failed[row] = true;
    } else if (!rejects) {
      if (!greedy) next = race(p, nullptr, -1, seed, position, TOKEN);
      passed = token == next;
    } else {
      float log_q = 0;
      const float* draft = r.draft ? r.draft + (row * r.gamma + i) * size : nullptr;
      Distribution q(draft ? draft : p.logits, draft && i < drafted ? size : 0, 1.0f, -INFINITY, true);
      if (draft && known) log_q = q.finite ? q.log_probability(token) : NAN;
      const float log_u = static_cast<float>(std::log(static_cast<double>(uniform(seed, position))));
      passed = known && log_u < p.log_probability(token) - log_q;
      if (!passed) {
        const bool residual = i < drafted;
        const bool dense = residual && draft && q.finite;
        next = race(p, dense ? &q : nullptr, residual && !draft && known ? token : -1, seed, position, RECOVER);
      }
    }
    if (passed) continue;
    r.num_accepted[row] = i, r.next_token[row] = next;
    return;
  }
}

}  // namespace

extern "C" {

void flashspec_verify(const Rows* rows, Index batch) {
  for (Index row = 0; row < batch; ++row) verify_row(*rows, row);
}

// -log of the arrivals, (batch, queries, size).
void flashspec_gumbel(const Index* seeds, const Index* positions, Index batch, Index queries, Index purpose, Index size,
                      float* noise) {
  for (Index row = 0; row < batch * queries; ++row)
    for (Index token = 0; token < size; token += NOISE) {
      uvec words[4];
      vec values[4];
      hash(seeds[row / queries], positions[row], static_cast<uint32_t>(purpose), token / 4, words);
      for (int part = 0; part < 4; ++part) values[part] = -logarithm(arrival(words[part]));
      std::memcpy(noise + row * size + token, values, sizeof(float) * std::min<Index>(NOISE, size - token));
    }
}
}
