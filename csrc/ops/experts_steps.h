// A mixture of experts as a worker of a team runs it: the tokens of each expert together, over
// packed or quantized weights.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "buffers.h"
#include "decoder_rows.h"
#include "team.h"

namespace lmfuse {

struct Expert {
  DecoderLinear gate, up, down;
  int64_t first, count;      // its rows: the tokens that chose it
  char *ready, *down_ready;  // these as the products read them
};

// All that the workers share. A row is one choice of one token; those of an expert lie together.
struct ExpertsCall {
  int64_t tokens, chosen, n, k;
  DType type;
  Matrix y;  // the result
  // What `choose` fills in.
  std::vector<Expert> experts;
  std::vector<int64_t> token;  // of each row
  std::vector<int64_t> row;    // of each choice, token by token
  std::vector<float> weights;  // of each choice
  Activation act;
  float slope, limit;
  bool joined;  // gate and up as one product
  bool alone;   // one token: each worker makes its row ready for itself, once for all experts
  // What `carve` finds room for.
  Matrix gathered, inner, gate_up, out;
  // The tokens as products over quantized weights read them, from where rows are taken; of one
  // token, from one worker's copy to the next.
  char* ready;
  int64_t ready_step;
  char* forms;  // rows of all experts as the products read them
  int64_t forms_bytes;
  char* scratch;
  int64_t scratch_step;

  int64_t rows() const { return tokens * chosen; }
  bool quantized() const { return experts[0].gate.quantized; }
  int64_t element() const { return type == DType::f32 ? 4 : 2; }
  DecoderRows form(const DecoderLinear& l, int64_t count, bool joint) const {
    return {l, l.quantized ? type : l.type, count, joint};
  }

  // What the rows of this mixture need, however they fall to its experts, at most so many to one.
  void size(const Mixture& m, int64_t most_rows) {
    const DecoderLinear gate = m.gate_up.at(0), down = m.down.at(0);
    const int64_t most = std::min(rows(), m.down.count);  // experts
    const auto room = [&](const DecoderLinear& l, bool joint) {
      return form(l, std::max<int64_t>(rows(), 2), joint).bytes() + most * 4 * kLine;
    };
    forms_bytes = std::max(forms_bytes, room(gate, m.joined()) + room(down, false));
    ready_step = std::max(ready_step, lines(form(gate, tokens, m.joined()).bytes()));
    for (int64_t count = 1; count <= std::min(most_rows, kRowBlock); ++count)
      for (const DecoderRows& rows : {form(gate, count, m.joined()), form(down, count, false)})
        scratch_step = std::max(scratch_step, lines(rows.scratch_bytes()));
  }

  void carve(Buffers& b, int64_t threads) {
    gathered = wide_rows(b, k);
    inner = wide_rows(b, n);
    gate_up = wide_rows(b, 2 * n);
    out = wide_rows(b, k);
    ready = b.take((tokens == 1 ? threads : 1) * ready_step);
    forms = b.take(forms_bytes);
    scratch = b.take(threads * scratch_step);
  }

  // Which rows are whose, by counting: those of an expert in the order of their tokens.
  void choose(const Mixture& m, const int64_t* index) {
    std::vector<int64_t> first(m.down.count + 1);
    for (int64_t i = 0; i < rows(); ++i) ++first[index[i] + 1];
    experts.clear();
    char* at = forms;
    const auto take = [&](const DecoderRows& rows) {
      char* mine = at;
      at += lines(rows.bytes());
      return mine;
    };
    act = m.act;
    slope = m.slope;
    limit = m.limit;
    joined = m.joined();
    for (int64_t e = 0; e < m.down.count; ++e) {
      const int64_t count = first[e + 1];
      if (count) {
        Expert x{m.gate_up.at(2 * e),
                 m.gate_up.at(2 * e + 1),
                 m.down.at(e),
                 first[e],
                 count,
                 nullptr,
                 nullptr};
        x.ready = take(form(x.gate, count, joined));
        x.down_ready = take(form(x.down, count, false));
        experts.push_back(x);
      }
      first[e + 1] += first[e];
    }
    token.resize(rows());
    row.resize(rows());
    for (int64_t i = 0; i < rows(); ++i) {
      row[i] = first[index[i]]++;
      token[row[i]] = i / chosen;
    }
    alone = tokens == 1 && static_cast<int64_t>(experts.size()) == chosen;  // none of them twice
  }

 private:
  static constexpr int64_t kLine = 64;
  static int64_t lines(int64_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

  Matrix wide_rows(Buffers& b, int64_t width) const {
    const int64_t stride = row_stride(width, rows());
    const Matrix m = rows_matrix(b.take(rows() * stride * element()), type, rows(), stride);
    if (m.data) pad_rows(m, width);
    return m;
  }
};

class ExpertsWorker {
 public:
  // x: the tokens; of one token a worker may have a copy of its own.
  ExpertsWorker(const ExpertsCall& call, Worker& worker, const Matrix& x)
      : c_(call), w_(worker), k_(kernels()), x_(x) {}

  void run() {
    gather();
    const int64_t parts = c_.joined ? 1 : 2;
    multiply(parts * panel_count(c_.n),
             [&](const Expert& e, int64_t begin, int64_t end) { gate_up(e, begin, end); });
    if (!c_.joined) activate();
    collect();
    multiply(panel_count(c_.k), [&](const Expert& e, int64_t begin, int64_t end) {
      run(e, e.down, down_rows(e), at(c_.out, e.first), begin, end);
    });
    const auto [begin, end] = w_.share(c_.tokens);
    k_.mix({c_.out, c_.y, c_.row.data(), c_.weights.data(), c_.chosen, c_.k}, begin, end);
  }

 private:
  float* scratch() const {
    return reinterpret_cast<float*>(c_.scratch + w_.index * c_.scratch_step);
  }
  static Matrix at(Matrix m, int64_t row, int64_t column = 0) {
    const int64_t first = row * m.rows.stride[0] + column;
    m.data = static_cast<char*>(m.data) + first * (m.dtype == DType::f32 ? 4 : 2);
    return m;
  }

  static Matrix of(const Expert& e, Matrix m) {
    m = at(m, e.first);
    m.rows.size[0] = e.count;
    return m;
  }

  // Rows of an expert for gate and up, and for down.
  DecoderRows rows(const Expert& e) const {
    DecoderRows rows = c_.form(e.gate, e.count, c_.joined);
    const bool kept = e.gate.quantized || e.gate.type == c_.type;
    if (c_.alone) {
      rows.place(x_, false, c_.ready + w_.index * c_.ready_step);
    } else {
      rows.place(c_.quantized() ? x_ : of(e, c_.gathered), kept, e.ready);
    }
    return rows;
  }
  DecoderRows down_rows(const Expert& e) const {
    DecoderRows rows = c_.form(e.down, e.count, false);
    rows.place(of(e, c_.inner), e.down.quantized || e.down.type == c_.type, e.down_ready);
    return rows;
  }

  // f(expert, begin, end) for those of this worker's rows that are the expert's, counted from its
  // first.
  template <class F>
  void each_share(const F& f) const {
    const auto [begin, end] = w_.share(c_.rows());
    for (const Expert& e : c_.experts) {
      const int64_t from = std::max(begin - e.first, int64_t{0});
      const int64_t to = std::min(end - e.first, e.count);
      if (from < to) f(e, from, to);
    }
  }

  void gather() {
    if (c_.alone) return rows(c_.experts[0]).make(0, 1, scratch());
    if (c_.quantized()) {
      take();
    } else {
      each_share([&](const Expert& e, int64_t begin, int64_t end) {
        for (int64_t r = e.first + begin; r < e.first + end; ++r)
          std::memcpy(at(c_.gathered, r).data, at(x_, c_.token[r]).data, c_.k * c_.element());
        rows(e).make(begin, end, scratch());
      });
    }
    w_.sync();
  }

  // Each token is made ready once, not for each of its experts.
  void take() {
    DecoderRows tokens = c_.form(c_.experts[0].gate, c_.tokens, c_.joined);
    tokens.place(x_, false, c_.ready);
    const auto [first, last] = w_.share(c_.tokens);
    tokens.make(first, last, scratch());
    w_.sync();
    each_share([&](const Expert& e, int64_t begin, int64_t end) {
      const DecoderRows mine = rows(e);
      for (int64_t r = begin; r < end; ++r) mine.take(r, tokens, c_.token[e.first + r]);
    });
  }

  void collect() {
    bool waits = false;
    each_share([&](const Expert& e, int64_t begin, int64_t end) {
      down_rows(e).make(begin, end, scratch());
    });
    for (const Expert& e : c_.experts) waits = waits || !down_rows(e).as_is();
    if (waits) w_.sync();
  }

  // This worker's part of the products of all experts, `panels` of each: f(expert, begin, end) in
  // panels of row blocks. A panel is read for a few rows as for one: they count as eight.
  template <class F>
  void multiply(int64_t panels, const F& f) {
    const auto cost = [](const Expert& e) { return std::clamp<int64_t>(e.count, 8, kRowBlock); };
    const auto pieces = [&](const Expert& e) { return row_blocks(e) * panels; };
    int64_t all = 0, at = 0;
    for (const Expert& e : c_.experts) all += cost(e) * pieces(e);
    const auto [begin, end] = w_.share(all);
    for (const Expert& e : c_.experts) {
      const int64_t each = cost(e), whole = each * pieces(e);
      const auto piece = [&](int64_t until) {
        return (std::clamp<int64_t>(until - at, 0, whole) + each - 1) / each;
      };
      const int64_t from = piece(begin), to = piece(end);
      if (from < to) f(e, from, to);
      at += whole;
    }
    w_.sync();
  }

  static int64_t row_blocks(const Expert& e) { return (e.count + kRowBlock - 1) / kRowBlock; }

  DecoderProduct product(const Expert& e, const DecoderLinear& l, const DecoderRows& rows,
                         const Matrix& out) const {
    DecoderProduct a(l, rows, e.count);
    a.out = out;
    a.scratch = scratch();
    return a;
  }
  void run(const Expert& e, const DecoderLinear& l, const DecoderRows& rows, const Matrix& out,
           int64_t begin, int64_t end) const {
    if (begin < end) product(e, l, rows, out).run(begin, end);
  }

  void gate_up(const Expert& e, int64_t begin, int64_t end) const {
    const DecoderRows mine = rows(e);
    if (c_.joined) {
      DecoderProduct a = product(e, e.gate, mine, at(c_.inner, e.first));
      a.post = PostOp::gate_up;
      a.weight2 = e.up.panels;
      a.bias2 = e.up.bias;
      return a.run(begin, end);
    }
    const int64_t half = row_blocks(e) * panel_count(c_.n);
    run(e, e.gate, mine, at(c_.gate_up, e.first), begin, std::min(end, half));
    run(e, e.up, mine, at(c_.gate_up, e.first, c_.n), std::max(begin - half, int64_t{0}),
        end - half);
  }

  void activate() {
    const auto [begin, end] = w_.share(c_.rows());
    const Matrix up = at(c_.gate_up, 0, c_.n);
    k_.gated({c_.gate_up, up, c_.inner, c_.n, c_.act, false, c_.slope, c_.limit}, begin, end);
    w_.sync();
  }

  const ExpertsCall& c_;
  Worker& w_;
  const Kernels& k_;
  const Matrix x_;
};

}  // namespace lmfuse
