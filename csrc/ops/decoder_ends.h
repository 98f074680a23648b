// From tokens to what the first decoder layer reads.
#pragma once

#include "decoder_steps.h"
#include "linear.h"

namespace lmfuse {

// The dtype of the model, which is that of its embedding or, where that is quantized, of its norm.
inline DType embedded_type(const DecoderEnds& e, const Tensor& ids) {
  LMFUSE_CHECK(ids.scalar_type() == ScalarType::Long, "input_ids must be int64");
  const auto* id = static_cast<const int64_t*>(ids.const_data_ptr());
  for (int64_t i = 0; i < ids.numel(); ++i)
    LMFUSE_CHECK_VALUE(id[i] >= 0 && id[i] < e.embedding.n, "input_ids has ", id[i],
                       ", but the embedding has ", e.embedding.n, " rows");
  LMFUSE_CHECK_VALUE(!e.embedding.quantized || e.norm.weight.data,
                     "the norm must have a weight where the embedding is quantized");
  return e.embedding.quantized ? e.norm.weight.dtype : e.embedding.type;
}

// The positions of the first tokens of each sequence, if the embedding has rows for positions.
inline void check_positions(const DecoderCall& c, const std::vector<int64_t>& positions) {
  if (!c.ends->positions.data) return;
  const int64_t rows = c.ends->position_rows;
  LMFUSE_CHECK_VALUE(c.ends->positions.dtype == c.type,
                     "positions must have the dtype of the embedding");
  LMFUSE_CHECK_VALUE(static_cast<int64_t>(positions.size()) == c.batch, "there are ",
                     static_cast<int64_t>(positions.size()), " positions for ", c.batch,
                     " sequences");
  for (const int64_t p : positions)
    LMFUSE_CHECK_VALUE(p >= 0 && p <= rows - c.tokens, "positions has ", p, " for the first of ",
                       c.tokens, " tokens, but there are rows for ", rows, " positions");
}

// Into x, rounded as an embedding rounds, and again where it is scaled, where positions are added,
// and where it is normalised.
inline void embed(const DecoderCall& c, const int64_t* ids, const std::vector<int64_t>& positions) {
  const DecoderEnds& e = *c.ends;
  const DecoderLinear& from = e.embedding;
  const Kernels& k = kernels();
  const int64_t bytes = c.hidden * c.element();
  const AddScaledArgs scaled{c.x, {}, c.x, c.hidden, e.scale};
  if (e.plain) {
    for (int64_t r = 0; r < c.rows(); ++r)
      std::memcpy(static_cast<char*>(c.x.data) + r * bytes,
                  static_cast<const char*>(e.plain) + ids[r] * bytes, bytes);
  } else if (!from.quantized) {
    k.unpack_rows({from.panels, ids, c.x.data, c.type, c.hidden}, 0, c.rows());
  } else {
    if (from.weight.order) std::memset(c.embedded, 0, c.rows() * c.hidden * 4);
    const WoqFormat& format = from.weight.format;
    k.woq_values({format, from.panels, from.weight.order, ids, c.embedded, c.hidden}, 0, c.rows());
    const Matrix wide = rows_matrix(c.embedded, DType::f32, c.rows(), c.hidden);
    k.add_scaled({wide, {}, c.x, c.hidden, 1.0f}, 0, c.rows());
  }
  if (e.scale != 1.0f) k.add_scaled(scaled, 0, c.rows());
  for (int64_t r = 0; e.positions.data && r < c.rows(); ++r) {
    const int64_t position = positions[r / c.tokens] + r % c.tokens;
    const char* row = static_cast<const char*>(e.positions.data) + position * bytes;
    const Matrix x = rows_matrix(static_cast<char*>(c.x.data) + r * bytes, c.type, 1, c.hidden);
    k.add_scaled({rows_matrix(const_cast<char*>(row), c.type, 1, c.hidden), x, x, c.hidden, 1.0f},
                 0, 1);
  }
  if (e.embedded.kind != DecoderNorm::none)
    k.norm(norm_args(e.embedded, c.x, c.x, c.hidden), 0, c.rows());
}

}  // namespace lmfuse
