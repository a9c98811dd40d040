// The one layer of an EAGLE-3 head, for native.cpp: a decoder layer whose queries, keys and values read a token's
// embedding and a hidden state, each normed, side by side. Every row is written into the cache; attention and what
// follows it is for the last row of each sequence alone, as nothing else is asked of the others.

namespace {

struct HeadInput {  // embedded, hidden: (rows, hidden_size), a multiple of BLOCK
  const float *embedded, *hidden, *hidden_norm;
};

// Norms rows first, first + 1, ... of both and puts them side by side: (part.rows, 2 hidden_size), arranged.
void join_rows(const Worker& worker, const Pass<float>& part, const HeadInput& input) {
  const Model& model = part.model;
  const Index size = model.hidden_size;
  for (int row = 0; row < part.rows; ++row) {
    const Index from = (part.first + row) * size;
    float* const to = worker.normed + row * 2 * size;
    rms_norm(input.embedded + from, model.layers->attention_norm, size, model.rms_norm_eps, to);
    rms_norm(input.hidden + from, input.hidden_norm, size, model.rms_norm_eps, to + size);
  }
  arrange(worker.normed, part.rows, 2 * size / BLOCK, worker.arranged);
}

void head_forward(const Worker& worker, const Pass<float>& rows, const Pass<float>& ends, const HeadInput& input,
                  float* out) {
  const Index size = rows.model.hidden_size, q_size = rows.q_size(), queries = rows.queries, all = rows.batch * queries;
  Pass<float> part = rows;
  for (part.first = 0; part.first < all; part.first += PASS) {
    part.rows = static_cast<int>(std::min<Index>(PASS, all - part.first));
    part.positions = rows.positions + part.first;
    join_rows(worker, part, input);
    part.project(worker, 0);
    const Range mine = worker.share(part.rows);
    for (Index row = part.first + mine.begin; row < part.first + mine.end; ++row)
      if (row % queries == queries - 1) {
        std::copy_n(part.q + (row - part.first) * q_size, q_size, ends.q + row / queries * q_size);
        std::copy_n(input.hidden + row * size, size, ends.residual + row / queries * size);
      }
    barrier();
  }
  Pass<float> end = ends;
  for (end.first = 0; end.first < ends.batch; end.first += PASS) {
    end.rows = static_cast<int>(std::min<Index>(PASS, ends.batch - end.first));
    end.positions = ends.positions + end.first;
    end.q = ends.q + end.first * q_size, end.residual = ends.residual + end.first * size;
    end.finish(worker, 0);
  }
  const Range mine = worker.share(ends.batch);
  std::copy_n(ends.residual + mine.begin * size, (mine.end - mine.begin) * size, out + mine.begin * size);
}

}  // namespace

// out: (batch, hidden_size), of the last rows. 0; 2 for a position out of range (nothing is written then); 3 for no
// memory.
extern "C" int flashspec_head(const Model* model, const float* hidden_norm, const float* embedded, const float* hidden,
                              const Index* positions, Index batch, Index queries, float* keys, float* values,
                              Index capacity, Index bound, float* out, Index threads) {
  for (Index row = 0; row < batch * queries; ++row)
    if (positions[row] < 0 || positions[row] >= bound) return 2;
  const Index most = std::min<Index>(batch * queries, PASS);
  Pass<float> rows{*model, nullptr, positions, 0, queries, batch, capacity, 1, 0, keys, values, {}};
  const Index q_size = rows.q_size(), width = rows.width(), widest = std::max(rows.widest(), 2 * width);
  Buffers buffers(rows.floats(most) + batch * (q_size + width + 2) + threads * worker_floats(most, widest));
  if (buffers.failed()) return 3;
  rows.take(buffers, most);
  Pass<float> ends = rows;
  ends.queries = 1;
  ends.q = buffers.take(batch * q_size), ends.residual = buffers.take(batch * width);
  float* const memory = buffers.take(threads * worker_floats(most, widest));
  Index* const last = reinterpret_cast<Index*>(buffers.take(2 * batch));
  for (Index row = 0; row < batch; ++row) last[row] = positions[(row + 1) * queries - 1];
  ends.positions = last;
  const HeadInput input{embedded, hidden, hidden_norm};
  on_threads(threads, [=](Index index, Index count) {
    head_forward(make_worker(index, count, most, widest, memory), rows, ends, input, out);
  });
  return 0;
}
