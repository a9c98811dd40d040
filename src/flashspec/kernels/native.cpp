// One forward of a Llama-family decoder on a CPU, for a few tokens at a time: every weight is read once, packed as it
// is stored, and all arithmetic is float32. Sums run in the same order whatever the number of rows, so a token's
// result does not depend, by a single bit, on the tokens that share its call.
#include "native_weights.cpp"
#include "native_vectors.cpp"

#include <cmath>
#include <cstdlib>
#include <utility>
#ifdef _OPENMP
#include <omp.h>
#endif

extern "C" {  // what native.py fills in
struct Layer {
  const float *attention_norm, *mlp_norm, *q_norm, *k_norm, *q_bias, *k_bias, *v_bias, *o_bias;  // null: none
  Matrix q, k, v, o, gate, up, down;
};
struct Model {
  Index hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim, sliding_window, max_position;
  double rms_norm_eps;
  const Layer* layers;
  const float *final_norm, *cos, *sin;  // cos, sin: (max_position, head_dim / 2)
  Matrix embedding;
};
}

namespace {

constexpr int PASS = 64;    // rows that go through the layers together
constexpr int QUERIES = 8;  // rows that share a read of keys and values
constexpr int SLOTS = 64;   // keys between two updates of the running softmax

void rms_norm(const float* x, const float* weight, Index n, double eps, float* out) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (Index i = 0; i < n; ++i) sum += x[i] * x[i];
  const float scale = 1.0f / std::sqrt(sum / static_cast<float>(n) + static_cast<float>(eps));
  for (Index i = 0; i < n; ++i) out[i] = x[i] * scale * weight[i];
}

inline void barrier() {
#pragma omp barrier
}

template <class Body> void on_threads(Index threads, Body body) {
#ifdef _OPENMP
#pragma omp parallel num_threads(static_cast<int>(threads))
  body(static_cast<Index>(omp_get_thread_num()), static_cast<Index>(omp_get_num_threads()));
#else
  (void)threads;
  body(Index{0}, Index{1});
#endif
}

class Buffers {  // zeroed, 64-byte aligned float arrays cut from one piece
 public:
  explicit Buffers(Index floats) : memory_(std::calloc(floats * sizeof(float) + 64, 1)) {
    next_ = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory_) + 63) / 64 * 64);
  }
  ~Buffers() { std::free(memory_); }
  Buffers(const Buffers&) = delete;
  bool failed() const { return memory_ == nullptr; }
  float* take(Index floats) { return std::exchange(next_, next_ + floats); }

 private:
  void* memory_;
  float* next_;
};

struct Query {  // one head of one row: its softmax up to here
  const float* at;
  float* out;
  Index position;
  float largest, sum;
};

struct Recorded {  // to: (B, capacity, count, hidden_size), where the hidden states that enter some layers go
  const Index* layers;
  Index count;
  float* to;
};

// A call's rows, PASS at a time. KV: float, or uint16_t for bfloat16. Every array is (rows, padded size).
template <class KV> struct Pass {
  const Model& model;
  const Index *token_ids, *positions;
  Index first, queries, batch, capacity, num_layers;
  int rows;
  KV *keys, *values;
  Recorded recorded;
  float *residual = nullptr, *q = nullptr, *k = nullptr, *v = nullptr, *mixed = nullptr;
  float *gate = nullptr, *up = nullptr, *hidden = nullptr;

  Index width() const { return padded(model.hidden_size); }
  Index q_size() const { return padded(model.num_heads * model.head_dim); }
  Index kv_size() const { return padded(model.num_kv_heads * model.head_dim); }
  Index sequence(int row) const { return (first + row) / queries; }
  // What its arrays take, and cutting them.
  Index floats(Index most) const {
    return most * (width() + 2 * q_size() + 2 * kv_size() + 2 * padded(model.intermediate_size));
  }
  void take(Buffers& buffers, Index most) {
    const Index mlp_size = padded(model.intermediate_size);
    for (auto [array, size] : {std::pair(&residual, width()), {&q, q_size()}, {&mixed, q_size()}, {&k, kv_size()},
                               {&v, kv_size()}, {&gate, mlp_size}, {&up, mlp_size}})
      *array = buffers.take(most * size);
  }
  Index widest() const { return std::max({width(), q_size(), padded(model.intermediate_size)}); }  // input of a product
  Index cache(Index layer, int row, Index kv_head) const {  // where the slots of a head start
    return ((layer * batch + sequence(row)) * model.num_kv_heads + kv_head) * capacity * model.head_dim;
  }

  // Normalises (if there is a weight), rotates and scales one head in place.
  void rotate(float* head, const float* norm, Index position, float scale) const {
    const Index half = model.head_dim / 2;
    const float *cos = model.cos + position * half, *sin = model.sin + position * half;
    if (norm) rms_norm(head, norm, model.head_dim, model.rms_norm_eps, head);
    for (Index i = 0; i < half; ++i) {
      const float x = head[i] * scale, y = head[i + half] * scale;
      head[i] = x * cos[i] - y * sin[i];
      head[i + half] = y * cos[i] + x * sin[i];
    }
  }

  void write_cache(const Worker& worker, Index layer) const {
    const Range units = worker.share(rows * model.num_kv_heads);
    for (Index unit = units.begin; unit < units.end; ++unit) {
      const int row = static_cast<int>(unit / model.num_kv_heads);
      const Index head = unit % model.num_kv_heads, position = positions[row];
      const Index at = row * kv_size() + head * model.head_dim;
      if (row + 1 < rows && sequence(row + 1) == sequence(row) && positions[row + 1] == position)
        continue;  // of rows that stay at a limit the last one writes: no slot has two writers
      rotate(k + at, model.layers[layer].k_norm, position, 1.0f);
      const Index slot = cache(layer, row, head) + position * model.head_dim;
      for (Index i = 0; i < model.head_dim; i += LANES) {
        write(keys + slot + i, load<vec>(k + at + i));
        write(values + slot + i, load<vec>(v + at + i));
      }
    }
  }

  // Attention of one head of some rows of a sequence, SLOTS at a time; a row sees `window` slots, its own the last.
  void attend(Index layer, int row, int count, Index head) const {
    const Index window = model.sliding_window ? model.sliding_window : capacity;
    const Index slots = cache(layer, row, head * model.num_kv_heads / model.num_heads);
    Query query[QUERIES];
    Index begin = capacity, end = 0;
    for (int i = 0; i < count; ++i) {
      const Index at = (row + i) * q_size() + head * model.head_dim, position = positions[row + i];
      rotate(q + at, model.layers[layer].q_norm, position, 1.0f / std::sqrt(static_cast<float>(model.head_dim)));
      std::fill_n(mixed + at, model.head_dim, 0.0f);
      query[i] = {q + at, mixed + at, position, -INFINITY, 0.0f};
      begin = std::min(begin, std::max<Index>(position + 1 - window, 0));
      end = std::max(end, position + 1);
    }
    for (Index tile = begin / SLOTS * SLOTS; tile < end; tile += SLOTS)
      for (int i = 0; i < count; ++i) {
        const Index from = std::max<Index>(query[i].position + 1 - window - tile, 0);
        const Index to = std::min<Index>(query[i].position + 1 - tile, SLOTS);
        if (from < to)
          attend_tile(query[i], keys + slots, values + slots, tile, static_cast<int>(from), static_cast<int>(to));
      }
    for (int i = 0; i < count; ++i)
      for (Index d = 0; d < model.head_dim; ++d) query[i].out[d] /= query[i].sum;
  }

  // Adds slots tile + [from, to) to a query's running softmax.
  void attend_tile(Query& query, const KV* keys, const KV* values, Index tile, int from, int to) const {
    const Index size = model.head_dim;
    const ivec lane = load<ivec>(IOTA);
    float weights[SLOTS];
    vec most = broadcast(query.largest), sums = {};
    keys += tile * size, values += tile * size;
    for (int slot = 0; slot < to; slot += LANES) {
      vec dots[LANES];
      for (int j = 0; j < LANES; ++j) {
        const KV* key = keys + std::min(slot + j, to - 1) * size;
        dots[j] = vec{};
        for (Index d = 0; d < size; d += LANES) dots[j] += load<vec>(query.at + d) * read(key + d);
      }
      const ivec seen = (lane >= from - slot) & (lane < to - slot);
      const vec score = seen ? totals(dots) : broadcast(-INFINITY);
      most = larger(score, most);
      store(weights + slot, score);
    }
    const float largest = fold(most, larger);
    const float kept = exponential(broadcast(query.largest - largest))[0];
    for (int slot = 0; slot < to; slot += LANES) {
      const vec weight = exponential(load<vec>(weights + slot) - largest);
      store(weights + slot, weight);
      sums += weight;
    }
    query.largest = largest;
    query.sum = query.sum * kept + fold(sums, plus);
    for (Index d = 0; d < size; d += LANES) {
      vec parts[4] = {load<vec>(query.out + d) * kept};  // four sums: the latency of an addition is four
      int slot = from;
      for (; slot + 4 <= to; slot += 4)
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) parts[j] += weights[slot + j] * read(values + (slot + j) * size + d);
      for (; slot < to; ++slot) parts[0] += weights[slot] * read(values + slot * size + d);
      store(query.out + d, (parts[0] + parts[1]) + (parts[2] + parts[3]));
    }
  }

  void attention(const Worker& worker, Index layer) const {
    int starts[PASS + 1] = {0}, tiles = 0;  // rows of one sequence, at most QUERIES together
    for (int row = 1; row <= rows; ++row)
      if (row == rows || sequence(row) != sequence(row - 1) || row - starts[tiles] == QUERIES) starts[++tiles] = row;
    const Range units = worker.share(tiles * model.num_heads);
    for (Index unit = units.begin; unit < units.end; ++unit) {
      const Index tile = unit / model.num_heads;
      attend(layer, starts[tile], starts[tile + 1] - starts[tile], unit % model.num_heads);
    }
  }

  // Keeps `from`, (rows, stride), of a worker's rows. Of rows that stay at a limit the last one writes, as above.
  void record(const Range& mine, Index layer, const float* from, Index stride) const {
    for (Index i = 0; i < recorded.count; ++i)
      for (Index row = mine.begin; recorded.layers[i] == layer && row < mine.end; ++row) {
        const int at = static_cast<int>(row);
        if (at + 1 < rows && sequence(at + 1) == sequence(at) && positions[at + 1] == positions[at]) continue;
        const Index slot = (sequence(at) * capacity + positions[at]) * recorded.count + i;
        std::copy_n(from + row * stride, model.hidden_size, recorded.to + slot * model.hidden_size);
      }
  }

  // Every worker normalises all rows for itself: cheaper than a barrier.
  void norm_rows(const Worker& worker, const float* weight) const {
    for (int row = 0; row < rows; ++row)
      rms_norm(residual + row * width(), weight, model.hidden_size, model.rms_norm_eps, worker.normed + row * width());
    arrange(worker.normed, rows, width() / BLOCK, worker.arranged);
  }

  // From what is arranged to the cache.
  void project(const Worker& worker, Index index) const {
    const Layer& layer = model.layers[index];
    const Index q_panels = panels_of(layer.q), kv_panels = panels_of(layer.k);
    const Range qkv = worker.share(q_panels + 2 * kv_panels);
    product(worker, qkv.within(0, q_panels), layer.q, rows, q, q_size(), layer.q_bias);
    product(worker, qkv.within(q_panels, kv_panels), layer.k, rows, k, kv_size(), layer.k_bias);
    product(worker, qkv.within(q_panels + kv_panels, kv_panels), layer.v, rows, v, kv_size(), layer.v_bias);
    barrier();
    write_cache(worker, index);
    barrier();
  }

  // From q and the cache to the residual stream.
  void finish(const Worker& worker, Index index) const {
    const Layer& layer = model.layers[index];
    const Range mlp = worker.share(panels_of(layer.gate));
    attention(worker, index);
    barrier();
    arrange(mixed, rows, q_size() / BLOCK, worker.arranged);
    product(worker, worker.share(panels_of(layer.o)), layer.o, rows, residual, width(), layer.o_bias, true);
    barrier();
    norm_rows(worker, layer.mlp_norm);
    const Index mlp_size = padded(model.intermediate_size);
    product(worker, mlp, layer.gate, rows, gate, mlp_size);
    product(worker, mlp, layer.up, rows, up, mlp_size);
    for (int row = 0; row < rows; ++row)
      for (Index i = row * mlp_size + mlp.begin * PANEL; i < row * mlp_size + mlp.end * PANEL; i += LANES) {
        const vec x = load<vec>(gate + i);
        store(gate + i, x / (1.0f + exponential(-x)) * load<vec>(up + i));
      }
    barrier();
    arrange(gate, rows, mlp_size / BLOCK, worker.arranged);
    product(worker, worker.share(panels_of(layer.down)), layer.down, rows, residual, width(), nullptr, true);
    barrier();
  }

  void forward(const Worker& worker) const {
    const Kernels& kernels = KERNELS[model.embedding.format];
    const Index blocks = width() / BLOCK, panel_size = blocks * kernels.block_size;
    const Range mine = worker.share(rows);
    for (Index row = mine.begin; row < mine.end; ++row)
      kernels.embed(model.embedding.data + token_ids[row] / PANEL * panel_size,
                    static_cast<int>(token_ids[row] % PANEL), blocks, residual + row * width());
    barrier();
    for (Index layer = 0; layer < num_layers; ++layer) {
      record(mine, layer, residual, width());
      norm_rows(worker, model.layers[layer].attention_norm);
      project(worker, layer);
      finish(worker, layer);
    }
    for (Index row = mine.begin; row < mine.end; ++row)
      rms_norm(residual + row * width(), model.final_norm, model.hidden_size, model.rms_norm_eps,
               hidden + row * model.hidden_size);
    record(mine, num_layers, hidden, model.hidden_size);
    barrier();
  }
};

// `size` is the widest input of a product.
inline Index worker_floats(Index rows, Index size) { return rows * (2 * size + PANEL) + CHUNK * BLOCK * PANEL; }
inline Worker make_worker(Index index, Index count, Index rows, Index size, float* memory) {
  float *const own = memory + index * worker_floats(rows, size), *const arranged = own + rows * size;
  return {index, count, own, arranged, arranged + rows * size, arranged + rows * (size + PANEL)};
}

template <class KV>
int run(const Model& model, const Index* token_ids, const Index* positions, Index batch, Index queries,
        Index num_layers, KV* keys, KV* values, Index capacity, float* hidden, Recorded recorded, Index threads) {
  const Index all = batch * queries, most = std::min<Index>(all, PASS);
  Pass<KV> pass{model, token_ids, positions, 0, queries, batch, capacity, num_layers, 0, keys, values, recorded};
  const Index widest = pass.widest();
  Buffers buffers(pass.floats(most) + threads * worker_floats(most, widest));
  if (buffers.failed()) return 3;
  pass.take(buffers, most);
  float* const memory = buffers.take(0);
  on_threads(threads, [=](Index index, Index count) {
    const Worker worker = make_worker(index, count, most, widest, memory);
    Pass<KV> part = pass;
    for (part.first = 0; part.first < all; part.first += PASS) {
      part.rows = static_cast<int>(std::min<Index>(PASS, all - part.first));
      part.token_ids = token_ids + part.first, part.positions = positions + part.first;
      part.hidden = hidden + part.first * model.hidden_size;
      part.forward(worker);
    }
  });
  return 0;
}

}  // namespace

extern "C" {

// 0; 1 for a token id, 2 for a position out of range (nothing is written then); 3 for no memory.
int flashspec_forward(const Model* model, const Index* token_ids, const Index* positions, Index batch, Index queries,
                      Index num_layers, void* keys, void* values, Index bfloat16, Index capacity, Index bound,
                      float* hidden, const Index* recorded_layers, Index num_recorded, float* features, Index threads) {
  const Recorded recorded{recorded_layers, num_recorded, features};
  for (Index row = 0; row < batch * queries; ++row) {
    if (token_ids[row] < 0 || token_ids[row] >= model->embedding.rows) return 1;
    if (positions[row] < 0 || positions[row] >= bound) return 2;
  }
  if (bfloat16)
    return run(*model, token_ids, positions, batch, queries, num_layers, static_cast<uint16_t*>(keys),
               static_cast<uint16_t*>(values), capacity, hidden, recorded, threads);
  return run(*model, token_ids, positions, batch, queries, num_layers, static_cast<float*>(keys),
             static_cast<float*>(values), capacity, hidden, recorded, threads);
}

// out (all, N) = x (all, K) times the transpose of a weight, or with norm (K,) of RMS-normed x. 0; 3 for no memory.
int flashspec_product(const Matrix* weight, const float* norm, double eps, const float* x, Index all, float* out,
                      Index threads) {
  const Index most = std::min<Index>(all, PASS), columns = weight->columns, width = padded(columns);
  Buffers buffers(threads * worker_floats(most, width));
  if (buffers.failed()) return 3;
  float* const memory = buffers.take(0);
  on_threads(threads, [=](Index index, Index count) {
    const Worker worker = make_worker(index, count, most, width, memory);
    for (Index first = 0; first < all; first += PASS) {
      const int rows = static_cast<int>(std::min<Index>(PASS, all - first));
      for (int row = 0; row < rows; ++row) {
        const float* const from = x + (first + row) * columns;
        float* const to = worker.normed + row * width;
        if (norm) rms_norm(from, norm, columns, eps, to);
        else std::copy_n(from, columns, to);
      }
      arrange(worker.normed, rows, width / BLOCK, worker.arranged);
      product(worker, worker.share(panels_of(*weight)), *weight, rows, out + first * weight->rows, weight->rows);
    }
  });
  return 0;
}
}

#include "native_head.cpp"
#include "native_verify.cpp"
#include "native_choose.cpp"
#include "native_step.cpp"
