// Packed weights and their products, for native.cpp. All arithmetic is float32, and sums run in the same order whatever
// the number of rows.
//
// A weight (N, K) is stored in panels of 32 rows by blocks of 32 columns, each block as two groups of 16 rows, one
// row a vector lane (native.py packs them); counts are padded to multiples of 32 with zeros, here as in activations.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

using Index = int64_t;

extern "C" struct Matrix {
  const uint8_t* data;
  Index rows, columns, format;
};

namespace {

// A product holds TILE rows by WIDE vectors of sums in registers: 24 of 32 (AVX-512, NEON) or 12 of 16.
#if defined(__AVX512F__)
constexpr int LANES = 16, WIDE = 2, TILE = 12;
#elif defined(__AVX2__)
constexpr int LANES = 8, WIDE = 2, TILE = 6;
#elif defined(__aarch64__)
constexpr int LANES = 4, WIDE = 2, TILE = 12;
#else
constexpr int LANES = 4, WIDE = 2, TILE = 6;
#endif
constexpr int GROUP = 16, PANEL = 32, BLOCK = 32;
constexpr int CHUNK = 4;     // blocks unpacked to memory at a time, for more than TILE rows: 16 KB stay in L1
constexpr int AHEAD = 4096;  // bytes of prefetch: 3.7 -> 2.5 cycles a vector of Q4_1 at one row (2.3 from L2)

using vec = float __attribute__((vector_size(4 * LANES)));
using ivec = int32_t __attribute__((vector_size(4 * LANES)));
using uvec = uint32_t __attribute__((vector_size(4 * LANES)));
using bytes = int8_t __attribute__((vector_size(LANES)));
using halves = uint16_t __attribute__((vector_size(2 * LANES)));

template <class V> inline V load(const void* from) {
  V value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
template <class V> inline void store(void* to, V value) { std::memcpy(to, &value, sizeof value); }
template <class To, class From> inline To bits(From from) { return load<To>(&from); }
inline vec broadcast(float x) { return x - vec{}; }
inline vec floats(ivec x) { return __builtin_convertvector(x, vec); }

#ifdef __AVX512F__  // GCC 12 finds these instructions by itself only in part
inline uvec widen(halves x) { return bits<uvec>(_mm512_cvtepu16_epi32(bits<__m256i>(x))); }
inline ivec widen(bytes x) { return bits<ivec>(_mm512_cvtepi8_epi32(bits<__m128i>(x))); }
inline vec from_half(const uint8_t* at) { return bits<vec>(_mm512_cvtph_ps(load<__m256i>(at))); }
inline vec nibble(uvec eight, int i) {  // a table look-up reads the low four bits only: no mask, no conversion
  const vec table = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return bits<vec>(_mm512_permutexvar_ps(bits<__m512i>(eight >> 4 * i), bits<__m512>(table)));
}
#else
inline uvec widen(halves x) { return __builtin_convertvector(x, uvec); }
inline ivec widen(bytes x) { return __builtin_convertvector(x, ivec); }
inline vec from_half(const uint8_t* at) {
  const uvec half = widen(load<halves>(at)), magnitude = (half & 0x7fff) << 13;
  const uvec value = bits<uvec>(bits<vec>(magnitude) * 0x1p112f);           // rebias the exponent
  const uvec special = bits<uvec>(magnitude >= 0x0f800000u) & 0x7f800000u;  // inf and NaN
  return bits<vec>(value | special | (half & 0x8000) << 16);
}
inline vec nibble(uvec eight, int i) { return floats(bits<ivec>(eight >> 4 * i & 15)); }
#endif

// The weight formats. A block is 32 columns of a group of 16 rows: scales, then lanes, one a row: of 32 bits, as many
// neighbouring columns as fit, or of 8. `Format(panel, row)` takes LANES rows from `row` on; (eight, i) is column
// 8 * eight + i.
struct Float32 {
  static constexpr int size = 2048;
  const uint8_t* at;
  Float32(const uint8_t* panel, int row) : at(panel + row / GROUP * size + row % GROUP * 4) {}
  vec operator()(int eight, int i) const { return load<vec>(at + 512 * eight + 64 * i); }
};
struct BFloat16 {
  static constexpr int size = 1024;
  const uint8_t* at;
  BFloat16(const uint8_t* panel, int row) : at(panel + row / GROUP * size + row % GROUP * 4) {}
  vec operator()(int eight, int i) const {
    const uvec two = load<uvec>(at + 256 * eight + 64 * (i / 2));
    return bits<vec>(i % 2 ? two & 0xffff0000u : two << 16);
  }
};
struct Q8_0 {  // a byte a row: one instruction widens them
  static constexpr int size = 32 + 512;
  const uint8_t* at;
  vec scale;
  Q8_0(const uint8_t* panel, int row)
      : at(panel + row / GROUP * size + 32 + row % GROUP), scale(from_half(at - 32 + row % GROUP)) {}
  vec operator()(int eight, int i) const { return scale * floats(widen(load<bytes>(at + 128 * eight + 16 * i))); }
};
struct Q4_1 {
  static constexpr int size = 64 + 256;
  const uint8_t* at;
  vec scale, least;
  Q4_1(const uint8_t* panel, int row)
      : at(panel + row / GROUP * size + 64 + row % GROUP * 4),
        scale(from_half(at - 64 - row % GROUP * 2)), least(from_half(at - 32 - row % GROUP * 2)) {}
  vec operator()(int eight, int i) const { return scale * nibble(load<uvec>(at + 64 * eight), i) + least; }
};
struct Q4_0 {
  static constexpr int size = 32 + 256;
  const uint8_t* at;
  vec scale, least;
  Q4_0(const uint8_t* panel, int row)
      : at(panel + row / GROUP * size + 32 + row % GROUP * 4), scale(from_half(at - 32 - row % GROUP * 2)),
        least(scale * -8.0f) {}
  vec operator()(int eight, int i) const { return scale * nibble(load<uvec>(at + 64 * eight), i) + least; }
};

template <class Format> constexpr int block_size() { return PANEL / GROUP * Format::size; }  // of a panel's block
template <class Format> inline void prefetch(const uint8_t* panel) {
  if (std::is_same_v<Format, Float32>) return;  // the hardware keeps up, and what was unpacked is in L1
  for (int line = 0; line < block_size<Format>(); line += 64) __builtin_prefetch(panel + AHEAD + line);
}

// sums (ROWS, PANEL), WIDE vectors of it, += x times the transpose of a panel's rows from `first` on.
// x: (blocks, ROWS, BLOCK), so that offsets are constants. A block is summed on its own first: one long chain of additions
// left SmolLM2's logits 1.8e-4 from transformers', against 0.7e-4 between transformers and float64.
template <class Format, int ROWS>
void multiply(const uint8_t* panel, int first, const float* x, Index blocks, float* sums) {
  for (; blocks > 0; --blocks, panel += block_size<Format>(), x += ROWS * BLOCK) {
    if (first == 0) prefetch<Format>(panel);
    const Format low(panel, first), high(panel, first + (WIDE - 1) * LANES);
    vec sum[ROWS][WIDE] = {};
#pragma GCC unroll 1
    for (int eight = 0; eight < BLOCK / 8; ++eight)
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        const vec w[2] = {low(eight, i), high(eight, i)};
#pragma GCC unroll 16
        for (int row = 0; row < ROWS; ++row) {
          const vec value = broadcast(x[row * BLOCK + eight * 8 + i]);
          for (int v = 0; v < WIDE; ++v) sum[row][v] += value * w[v];
        }
      }
#pragma GCC unroll 16
    for (int row = 0; row < ROWS; ++row)
      for (int v = 0; v < WIDE; ++v) {
        float* const at = sums + row * PANEL + first + v * LANES;
        store(at, load<vec>(at) + sum[row][v]);
      }
  }
}

template <class Format, int ROWS = TILE>
void multiply_rows(int rows, const uint8_t* panel, const float* x, Index blocks, float* sums) {
  if constexpr (ROWS > 1)
    if (rows < ROWS) return multiply_rows<Format, ROWS - 1>(rows, panel, x, blocks, sums);
  for (int first = 0; first < PANEL; first += WIDE * LANES) multiply<Format, ROWS>(panel, first, x, blocks, sums);
}

// Blocks of a panel as Float32.
template <class Format> void unpack(const uint8_t* panel, Index blocks, float* to) {
  for (; blocks > 0; --blocks, panel += block_size<Format>(), to += PANEL * BLOCK) {
    prefetch<Format>(panel);
    for (int row = 0; row < PANEL; row += LANES) {
      const Format block(panel, row);
      float* column = to + row / GROUP * GROUP * BLOCK + row % GROUP;
      for (int eight = 0; eight < BLOCK / 8; ++eight)
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i, column += GROUP) store(column, block(eight, i));
    }
  }
}

template <class Format> void embed(const uint8_t* panel, int row, Index blocks, float* out) {  // one row of a panel
  for (; blocks > 0; --blocks, panel += block_size<Format>()) {
    const Format block(panel, row / LANES * LANES);
    for (int eight = 0; eight < BLOCK / 8; ++eight)
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) *out++ = block(eight, i)[row % LANES];
  }
}

inline Index padded(Index n) { return (n + PANEL - 1) / PANEL * PANEL; }
inline int tiles_of(int rows) { return (rows + TILE - 1) / TILE; }
inline int tile_start(int rows, int tile) { return rows * tile / tiles_of(rows); }

// x (rows, 32 * blocks) -> (blocks, rows of the tile, BLOCK) for each tile of rows, one after the other.
void arrange(const float* x, int rows, Index blocks, float* to) {
  for (int tile = 0; tile < tiles_of(rows); ++tile)
    for (Index block = 0; block < blocks; ++block)
      for (int row = tile_start(rows, tile); row < tile_start(rows, tile + 1); ++row, to += BLOCK)
        std::copy_n(x + (row * blocks + block) * BLOCK, BLOCK, to);
}

// sums (rows, PANEL) = x times the transpose of a panel. x: arranged. scratch: CHUNK unpacked blocks.
template <class Format>
void panel_product(const uint8_t* panel, int rows, const float* x, Index blocks, float* sums, float* scratch) {
  std::fill(sums, sums + rows * PANEL, 0.0f);
  if (rows <= TILE) return multiply_rows<Format>(rows, panel, x, blocks, sums);
  for (Index done = 0; done < blocks; done += CHUNK) {
    const Index some = std::min<Index>(CHUNK, blocks - done);
    unpack<Format>(panel + done * block_size<Format>(), some, scratch);
    for (int tile = 0; tile < tiles_of(rows); ++tile) {
      const int first = tile_start(rows, tile), count = tile_start(rows, tile + 1) - first;
      multiply_rows<Float32>(count, reinterpret_cast<uint8_t*>(scratch), x + (first * blocks + done * count) * BLOCK,
                             some, sums + first * PANEL);
    }
  }
}

struct Kernels {
  int block_size;
  void (*product)(const uint8_t*, int, const float*, Index, float*, float*);
  void (*embed)(const uint8_t*, int, Index, float*);
};
template <class Format> constexpr Kernels kernels_of() {
  return {block_size<Format>(), panel_product<Format>, embed<Format>};
}
constexpr Kernels KERNELS[] = {kernels_of<Float32>(), kernels_of<BFloat16>(), kernels_of<Q8_0>(), kernels_of<Q4_1>(),
                               kernels_of<Q4_0>()};

struct Range {
  Index begin, end;
  Range within(Index first, Index count) const {  // the part in [first, first + count), counted from first
    return {std::max<Index>(begin - first, 0), std::min(end - first, count)};
  }
};

struct Worker {  // one thread, and memory of its own
  Index index, count;
  float *normed, *arranged, *sums, *scratch;
  Range share(Index n) const { return {n * index / count, n * (index + 1) / count}; }
};

inline Index panels_of(const Matrix& weight) { return padded(weight.rows) / PANEL; }

// Some panels' columns of out (rows, stride) = or, with add, += x W^T + bias, where x is what the worker arranged.
void product(const Worker& worker, Range panels, const Matrix& weight, int rows, float* out, Index stride,
             const float* bias = nullptr, bool add = false) {
  const Kernels& kernels = KERNELS[weight.format];
  const Index blocks = padded(weight.columns) / BLOCK, size = blocks * kernels.block_size;
  for (Index panel = panels.begin; panel < panels.end; ++panel) {
    kernels.product(weight.data + panel * size, rows, worker.arranged, blocks, worker.sums, worker.scratch);
    const Index first = panel * PANEL, count = std::min<Index>(PANEL, weight.rows - first);
    for (int row = 0; row < rows; ++row)
      for (Index n = 0; n < count; ++n) {
        const float value = worker.sums[row * PANEL + n] + (bias ? bias[first + n] : 0.0f);
        float& to = out[row * stride + first + n];
        to = add ? to + value : value;
      }
  }
}

}  // namespace
