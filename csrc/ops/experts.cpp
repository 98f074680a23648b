// Mixtures of experts over packed or quantized weights: all the experts that some token has chosen,
// each with its tokens together, in one parallel region.
#include <vector>

#include "buffers.h"
#include "decoder_rows.h"
#include "linear.h"
#include "team.h"

namespace lmfuse {
namespace {

// The matrices [n, k] of all experts, one after the other.
class Matrices {
 public:
  // how: -1 if they are packed, each a row of bytes; else 2 * compute + block_scales for one
  // quantized weight, in which each takes whole panels.
  Matrices(const Tensor& t, int64_t n, int64_t k, int64_t how, const char* name)
      : n_(n), k_(k), name_(name) {
    LMFUSE_CHECK(n > 0 && k > 0 && how >= -1 && how < 6, "there are no such experts");
    if (how < 0) {
      LMFUSE_CHECK(
          t.is_cpu() && t.dim() == 2 && t.scalar_type() == ScalarType::Byte && t.is_contiguous(),
          name, " must be packed weights: a contiguous CPU tensor of bytes");
      count = t.size(0);
      each_ = t.size(1);
      data_ = static_cast<const char*>(t.const_data_ptr());
      LMFUSE_CHECK_VALUE(count > 0, name, " is empty");
      type = open(data_, each_, name).dtype;
    } else {
      const Quantized all = open_quantized(t, name);
      const int64_t rows = panel_count(n) * kPanel;
      LMFUSE_CHECK_VALUE(all.k == k && all.format.n % rows == 0 && !all.order, name, " is ",
                         all.format.n, " by ", all.k, ", but must be a multiple of ", rows, " by ",
                         k, ", with its columns in order");
      like_.quantized = true;
      like_.how = checked_how(all, how / 2, how % 2);
      like_.weight = all;
      like_.weight.format.n = n;
      count = all.format.n / rows;
      each_ = panel_count(n) * all.format.panel_bytes();
      data_ = all.panels;
    }
  }

  DecoderLinear at(int64_t i) const {
    DecoderLinear l = like_;
    l.n = n_;
    l.k = k_;
    l.panels = data_ + i * each_;
    l.weight.panels = l.panels;
    if (!l.quantized) {
      const Packed w = open(l.panels, each_, name_);
      LMFUSE_CHECK_VALUE(w.n == n_ && w.k == k_ && w.dtype == type, name_, " holds a weight ", w.n,
                         " by ", w.k, ", but all must be ", n_, " by ", k_, " and of one dtype");
      l.panels = w.panels;
      l.type = w.dtype;
    }
    return l;
  }

  int64_t count;
  DType type = DType::f32;  // of packed ones

 private:
  DecoderLinear like_{};
  int64_t n_, k_, each_;
  const char *data_, *name_;
};

struct Expert {
  DecoderLinear gate, up, down;
  int64_t first, count;      // its rows: the tokens that chose it
  char *ready, *down_ready;  // these as the products read them
};

// All that the workers share. A row is one choice of one token; those of an expert lie together.
struct ExpertsCall {
  std::vector<Expert> experts;
  std::vector<int64_t> token;  // of each row
  std::vector<int64_t> row;    // of each choice, token by token
  const float* weights;
  int64_t tokens, chosen, n, k;
  DType type;
  Activation act;
  bool joined;  // gate and up as one product
  bool alone;   // one token: each worker makes its row ready for itself, once for all experts
  Matrix x, y, gathered, inner, gate_up, out;
  // The tokens as products over quantized weights read them, from where rows are taken; of one
  // token, from one worker's copy to the next.
  char* ready;
  int64_t ready_step;
  char* scratch;
  int64_t scratch_step;

  int64_t rows() const { return tokens * chosen; }
  bool quantized() const { return experts[0].gate.quantized; }
  int64_t element() const { return type == DType::f32 ? 4 : 2; }
  DecoderRows form(const DecoderLinear& l, int64_t count, bool joint) const {
    return {l, l.quantized ? type : l.type, count, joint};
  }
};

class ExpertsWorker {
 public:
  ExpertsWorker(const ExpertsCall& call, Worker& worker) : c_(call), w_(worker), k_(kernels()) {}

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
    k_.mix({c_.out, c_.y, c_.row.data(), c_.weights, c_.chosen, c_.k}, begin, end);
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
      rows.place(c_.x, false, c_.ready + w_.index * c_.ready_step);
    } else {
      rows.place(c_.quantized() ? c_.x : of(e, c_.gathered), kept, e.ready);
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
          std::memcpy(at(c_.gathered, r).data, at(c_.x, c_.token[r]).data, c_.k * c_.element());
        rows(e).make(begin, end, scratch());
      });
    }
    w_.sync();
  }

  // Each token is made ready once, not for each of its experts.
  void take() {
    DecoderRows tokens = c_.form(c_.experts[0].gate, c_.tokens, c_.joined);
    tokens.place(c_.x, false, c_.ready);
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
  // panels of row blocks. A panel is read for a few rows as for one: they cost as much as eight.
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
      return a.run(begin, end);
    }
    const int64_t half = row_blocks(e) * panel_count(c_.n);
    run(e, e.gate, mine, at(c_.gate_up, e.first), begin, std::min(end, half));
    run(e, e.up, mine, at(c_.gate_up, e.first, c_.n), std::max(begin - half, int64_t{0}),
        end - half);
  }

  void activate() {
    const auto [begin, end] = w_.share(c_.rows());
    k_.gated({c_.gate_up, at(c_.gate_up, 0, c_.n), c_.inner, c_.n, c_.act, false}, begin, end);
    w_.sync();
  }

  const ExpertsCall& c_;
  Worker& w_;
  const Kernels& k_;
};

// Which rows are whose, by counting: those of an expert in the order of their tokens.
void group(ExpertsCall& c, const Integers& index, const Matrices& gate_up, const Matrices& down) {
  std::vector<int64_t> first(down.count + 1);
  for (int64_t i = 0; i < c.rows(); ++i) {
    LMFUSE_CHECK_VALUE(index[i] >= 0 && index[i] < down.count, "index has ", index[i],
                       ", but there are ", down.count, " experts");
    ++first[index[i] + 1];
  }
  for (int64_t e = 0; e < down.count; ++e) {
    if (first[e + 1])
      c.experts.push_back({gate_up.at(2 * e), gate_up.at(2 * e + 1), down.at(e), first[e],
                           first[e + 1], nullptr, nullptr});
    first[e + 1] += first[e];
  }
  c.token.resize(c.rows());
  c.row.resize(c.rows());
  for (int64_t i = 0; i < c.rows(); ++i) {
    c.row[i] = first[index[i]]++;
    c.token[c.row[i]] = i / c.chosen;
  }
}

Matrix wide_rows(Buffers& b, const ExpertsCall& c, int64_t width) {
  const int64_t stride = row_stride(width, c.rows());
  const Matrix m = rows_matrix(b.take(c.rows() * stride * c.element()), c.type, c.rows(), stride);
  if (m.data) pad_rows(m, width);
  return m;
}

void carve(Buffers& b, ExpertsCall& c, int64_t threads) {
  if (!c.alone && !c.quantized()) c.gathered = wide_rows(b, c, c.k);
  c.inner = wide_rows(b, c, c.n);
  if (!c.joined) c.gate_up = wide_rows(b, c, 2 * c.n);
  c.out = wide_rows(b, c, c.k);
  const auto take = [&](const DecoderRows& rows, bool own) {
    c.scratch_step = std::max(c.scratch_step, (rows.scratch_bytes() + 63) / 64 * 64);
    return own ? b.take(rows.bytes()) : nullptr;
  };
  for (Expert& e : c.experts) {
    e.ready = take(c.form(e.gate, e.count, c.joined), !c.alone);
    e.down_ready = take(c.form(e.down, e.count, false), true);
  }
  const int64_t tokens = c.form(c.experts[0].gate, c.tokens, c.joined).bytes();
  if (c.alone) {
    c.ready_step = (tokens + 63) / 64 * 64;
    c.ready = b.take(threads * c.ready_step);
  } else if (c.quantized()) {
    c.ready = b.take(tokens);
  }
  c.scratch = b.take(threads * c.scratch_step);
}

// See functional/experts.py.
Tensor experts(Tensor x, Tensor index, Tensor weights, Tensor gate_up, Tensor down, int64_t n,
               int64_t k, int64_t how, int64_t act) {
  LMFUSE_CHECK(x.is_cpu() && x.dim() == 2 && x.size(1) == k, "x must be a CPU tensor [tokens, ", k,
               "]");
  LMFUSE_CHECK(index.dim() == 2 && same_sizes(index, weights) && index.size(0) == x.size(0),
               "index and weights must be [tokens, chosen]");
  LMFUSE_CHECK(act >= 0 && act <= static_cast<int64_t>(Activation::gelu_tanh),
               "act is unknown: ", act);
  const Matrices of_gate_up(gate_up, n, k, how, "gate_up"), of_down(down, k, n, how, "down");
  LMFUSE_CHECK_VALUE(of_gate_up.count == 2 * of_down.count && of_gate_up.type == of_down.type,
                     "gate_up has ", of_gate_up.count, " matrices for ", of_down.count,
                     " experts, or another dtype than down");
  ExpertsCall c{};
  c.type = dtype(x, "x");
  LMFUSE_CHECK_VALUE(
      how >= 0 || of_down.type == c.type || (c.type == DType::f32 && of_down.type == DType::bf16),
      "x must have the dtype of the weights, or be float32 over bfloat16");
  c.tokens = x.size(0);
  c.chosen = index.size(1);
  c.n = n;
  c.k = k;
  c.act = static_cast<Activation>(act);
  Tensor y = new_result(x, k);
  if (!c.rows()) {
    std::memset(y.mutable_data_ptr(), 0, c.tokens * k * c.element());
    return y;
  }
  x = torch::stable::contiguous(x);
  c.x = rows_matrix(const_cast<void*>(x.const_data_ptr()), c.type, c.tokens, k);
  c.y = rows_matrix(y.mutable_data_ptr(), c.type, c.tokens, k);
  weights = torch::stable::contiguous(torch::stable::to(weights, ScalarType::Float));
  c.weights = static_cast<const float*>(weights.const_data_ptr());
  group(c, Integers(index, "index"), of_gate_up, of_down);
  const Expert& first = c.experts[0];
  c.joined = c.act == Activation::silu && first.gate.joins(first.up);
  c.alone = c.tokens == 1 && first.count == 1 &&
            static_cast<int64_t>(c.experts.size()) == c.chosen;  // none of them twice
  const int64_t most = c.rows() * 3 * n * k >> 18;  // 256k products each, or a thread is not worth
  const int64_t threads = std::min(thread_count(), std::max<int64_t>(most, 1));  // waking
  const Buffers buffers([&](Buffers& b) { carve(b, c, threads); });
  together(threads, [&](Worker& w) { ExpertsWorker(c, w).run(); });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lmfuse, m) {
  m.def(
      "experts(Tensor x, Tensor index, Tensor weights, Tensor gate_up, Tensor down, int n, int k,"
      " int how, int act) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lmfuse, CPU, m) { m.impl("experts", TORCH_BOX(&experts)); }

}  // namespace lmfuse
