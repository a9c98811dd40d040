// A draft token from a drafter's logits, for native.cpp: reference_fused.py is the twin, flashspec.kernels holds the
// contract.

namespace {

struct Choice {
  const float* logits;
  Index* token_ids;  // (B, gamma); the column `offset` is written, as in weights
  Index* draft_lengths;
  uint8_t* faulty;
  float* weights;  // (B, gamma, size), null: not wanted
  const Index *seeds, *lengths;
  const float* temperature;
  const Index* part;           // null: 0, 1, 2 ...
  const float *bias, *floors;  // null: none
  Index gamma, size, offset, purpose, least;  // purpose: -1 without noise
};

// NOISE values of a row from `first` on; behind its end `fill`.
inline void take(const float* row, Index first, Index size, float fill, vec to[4]) {
  const Index count = std::min<Index>(NOISE, size - first);
  for (int i = 0; count < NOISE && i < 4; ++i) to[i] = broadcast(fill);
  std::memcpy(to, row + first, sizeof(float) * count);
}

// At least -log(arrival(word)), at a tenth of its price: an arrival is not below u = m 2^e, and m is at least 1.
inline vec most_noise(uvec word) {
  const ivec exponent = bits<ivec>(__builtin_convertvector(word, vec) * 0x1p-32f) >> 23;
  return floats(127 - exponent) * 0.693148f + 1e-3f;
}

void choose_row(const Choice& c, Index row) {
  const float temperature = c.temperature[row], floor = c.floors ? c.floors[row] : -INFINITY;
  const vec heat = broadcast(std::max(temperature, COLDEST));
  const bool noisy = c.purpose >= 0 && temperature != 0;
  float* const weights = c.weights ? c.weights + (row * c.gamma + c.offset) * c.size : nullptr;
  Best best(-INFINITY);
  vec largest = broadcast(-INFINITY);
  ivec strange = {};
  for (Index token = 0; token < c.size; token += NOISE) {
    vec x[4], added[4], scores[4];
    take(c.logits + row * c.size, token, c.size, -INFINITY, x);
    if (c.bias) take(c.bias + row * c.size, token, c.size, 0.0f, added);
    for (int i = 0; i < 4; ++i) {
      if (c.bias) x[i] += added[i];
      strange |= x[i] != x[i];
      largest = larger(x[i], largest);
      scores[i] = x[i] = x[i] < floor ? broadcast(-INFINITY) : x[i];
    }
    if (noisy || weights)
      for (vec& value : x) value /= heat;
    if (weights) std::memcpy(weights + token, x, sizeof(float) * std::min<Index>(NOISE, c.size - token));
    if (noisy) {
      uvec words[4];
      hash(c.seeds[row], c.lengths[row] + c.offset, static_cast<uint32_t>(c.purpose), token / 4, words);
      vec most = best.value;
      for (int i = 0; i < 4; ++i) most = larger(x[i] + most_noise(words[i]), most);
      if (fold(most, larger) <= best.most()) continue;
      for (int i = 0; i < 4; ++i) scores[i] = x[i] - logarithm(arrival(words[i]));
    }
    for (int i = 0; i < 4; ++i) best.see(scores[i], token + i * LANES);
  }
  const float most = fold(largest, larger);
  bool finite = most < INFINITY && most > -INFINITY;
  for (int lane = 0; lane < LANES; ++lane) finite = finite && !strange[lane];

  const Index chosen = best.first();
  c.token_ids[row * c.gamma + c.offset] = c.part ? c.part[chosen] : chosen;
  Index& length = c.draft_lengths[row];
  const bool goes_on = c.offset ? length == c.offset : c.lengths[row] >= c.least;
  if (c.offset == 0) length = c.faulty[row] = 0;
  if (goes_on) length += finite, c.faulty[row] = !finite;
}

}  // namespace

extern "C" void flashspec_choose(const Choice* choice, Index batch) {
  for (Index row = 0; row < batch; ++row) choose_row(*choice, row);
}
