// What a step does beside its forwards and its verdict, for native.cpp: reference.py and reference_fused.py are the
// twins, flashspec.kernels holds the contracts.

namespace {

enum Finish { RUNNING, STOP, LENGTH, FAILED };  // what core.FinishReason calls ERROR is FAILED here
constexpr Index HEAD = 5;                      // drafted, accepted, emitted, finish, faulty

struct Step {
  const Index *token_ids, *draft_lengths, *num_accepted, *next_token;
  const uint8_t *failed, *faulty;  // faulty: null for none
  Index *tokens, *lengths;
  const Index* limits;
  Index* finish;
  const Index* stop_ids;
  Index *cached, *packed;
  Index batch, gamma, tokens_stride, num_stops, num_readers;
};

bool stops(const Step& s, Index row, Index token) {
  const Index* first = s.stop_ids + row * s.num_stops;
  return std::find(first, first + s.num_stops, token) != first + s.num_stops;
}

void commit_row(const Step& s, Index row) {
  Index* const packed = s.packed + row * (HEAD + s.gamma + 1);
  Index* const emitted = packed + HEAD;
  const Index accepted = s.num_accepted[row], length = s.lengths[row];
  std::copy_n(s.token_ids + row * s.gamma, s.gamma, emitted);
  emitted[s.gamma] = emitted[accepted] = s.next_token[row];

  const bool running = s.finish[row] == RUNNING, failed = s.failed[row];
  const Index most = running ? std::min(accepted + !failed, s.limits[row] - length) : 0;
  Index count = 0, end = s.finish[row];
  bool stopped = false;
  while (count < most && !stopped) stopped = stops(s, row, emitted[count++]);
  const Index grown = length + count;
  if (running) end = stopped ? STOP : grown >= s.limits[row] ? LENGTH : failed ? FAILED : RUNNING;
  packed[0] = end == RUNNING ? s.draft_lengths[row] : std::min(s.draft_lengths[row], count);
  packed[1] = std::min(accepted, count);
  packed[2] = count;
  packed[3] = s.finish[row] = end;
  packed[4] = running && s.faulty && s.faulty[row];
  std::copy_n(emitted, s.gamma + 1, s.tokens + row * s.tokens_stride + length);
  s.lengths[row] = grown;
  for (Index reader = 0; reader < s.num_readers; ++reader) {
    Index& cached = s.cached[reader * s.batch + row];
    cached = std::min(cached, grown - 1);
  }
}

}  // namespace

extern "C" {

void flashspec_commit(const Step* step) {
  for (Index row = 0; row < step->batch; ++row) commit_row(*step, row);
}

void flashspec_window(const Index* tokens, const Index* lengths, const Index* draft, Index batch, Index gamma,
                      Index tokens_stride, Index capacity, Index* window, Index* positions, Index* cached) {
  for (Index row = 0; row < batch; ++row, window += gamma + 1, positions += gamma + 1) {
    const Index last = lengths[row] - 1;
    window[0] = tokens[row * tokens_stride + last];
    std::copy_n(draft + row * gamma, gamma, window + 1);
    for (Index i = 0; i <= gamma; ++i) positions[i] = std::min(last + i, capacity - 1);
    cached[row] = positions[gamma] + 1;
  }
}
}
