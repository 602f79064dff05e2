// Argument checks, the choice of instruction set, and how work is divided among threads.
#include "attention_problem.h"

#include <algorithm>

#include "../cpu_capability.h"

namespace nlpfast {

NLPFAST_DEFINE_CHOICE(AttentionKernels, attention_kernels, attention)

namespace {

constexpr int64_t MAX_HEAD_SIZE = 256;

Dtype dtype_of(const Tensor& x, const char* name) {
  if (x.scalar_type() == ScalarType::Float) return Dtype::float32;
  if (x.scalar_type() == ScalarType::BFloat16) return Dtype::bfloat16;
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Half, name, " must be float32, bfloat16 or float16");
  return Dtype::float16;
}

const char* bytes(const Tensor& x) { return static_cast<const char*>(x.const_data_ptr()); }

const int64_t* integers(const Tensor& x, const char* name, int64_t size) {
  check_cpu(x, name, ScalarType::Long, "int64", 1);
  STD_TORCH_CHECK(x.size(0) == size && x.is_contiguous(), name, " must be contiguous [", size, "]");
  return static_cast<const int64_t*>(x.const_data_ptr());
}

void set_heads(AttentionProblem& p, const Tensor& q, const Tensor& k, const Tensor& v, int64_t dims) {
  STD_TORCH_CHECK(q.is_cpu() && k.is_cpu() && v.is_cpu(), "query, key and value must be CPU tensors");
  p.dtype = dtype_of(q, "query");
  STD_TORCH_CHECK(k.scalar_type() == q.scalar_type(), "key must have the dtype of query");
  STD_TORCH_CHECK(v.scalar_type() == q.scalar_type(), "value must have the dtype of query");
  STD_TORCH_CHECK(q.dim() == dims, "query must have ", dims, " dimensions, got ", q.dim());
  STD_TORCH_CHECK(k.dim() == dims, "key must have ", dims, " dimensions, got ", k.dim());
  STD_TORCH_CHECK(v.dim() == dims, "value must have ", dims, " dimensions, got ", v.dim());
  p.H = q.size(1), p.D = q.size(dims - 1), p.E = v.size(dims - 1);
  const int64_t key_heads = k.size(1);
  STD_TORCH_CHECK(p.H == key_heads || (key_heads > 0 && p.H % key_heads == 0), "query has ", p.H,
                  " heads, which must be a multiple of the ", key_heads, " heads of key");
  STD_TORCH_CHECK(p.D <= MAX_HEAD_SIZE && p.E <= MAX_HEAD_SIZE, "head size must be at most ", MAX_HEAD_SIZE, ", got ",
                  p.D, " (query, key) and ", p.E, " (value)");
  p.G = key_heads > 0 ? p.H / key_heads : 1;
}

void set_mask(AttentionProblem& p, const Tensor& mask) {
  STD_TORCH_CHECK(mask.is_cpu(), "attn_mask must be a CPU tensor");
  STD_TORCH_CHECK(mask.dim() == 4, "attn_mask must have 4 dimensions, got ", mask.dim());
  p.mask_dtype = mask.scalar_type() == ScalarType::Bool ? Dtype::boolean : dtype_of(mask, "attn_mask, unless bool,");
  const int64_t full[] = {p.B, p.H, p.L, p.S};
  int64_t strides[4];
  for (int64_t d = 0; d < 4; ++d) {
    STD_TORCH_CHECK(mask.size(d) == 1 || mask.size(d) == full[d], "attn_mask has size ", mask.size(d), " in dimension ",
                    d, "; it must be 1 or ", full[d]);
    strides[d] = mask.size(d) == 1 ? 0 : mask.stride(d);
  }
  // Without elements there is nothing that it could hide.
  if (mask.numel() > 0) p.mask = {bytes(mask), strides[0], strides[1], strides[2], strides[3]};
}

const int64_t* lengths(const Tensor& x, const char* name, int64_t B, int64_t S) {
  const int64_t* values = integers(x, name, B);
  for (int64_t b = 0; b < B; ++b)
    STD_TORCH_CHECK(values[b] >= 0 && values[b] <= S, name, "[", b, "] is ", values[b], "; it must be within 0..", S,
                    ", the number of keys: pass the unpadded length of each row");
  return values;
}

void set_options(AttentionProblem& p, const AttentionOptions& options) {
  STD_TORCH_CHECK(options.causal >= 0 && options.causal <= 2, "causal must be 0, 1 or 2, got ", options.causal);
  STD_TORCH_CHECK(options.dropout_p >= 0 && options.dropout_p <= 1, "dropout_p must be in [0, 1], got ",
                  options.dropout_p);
  p.causal = static_cast<Causal>(options.causal);
  p.scale = static_cast<float>(options.scale);
  if (options.attn_mask) set_mask(p, *options.attn_mask);
  if (options.key_lengths) p.key_lengths = lengths(*options.key_lengths, "key_lengths", p.B, p.S);
  if (options.prefix_lengths) p.prefix_lengths = lengths(*options.prefix_lengths, "prefix_lengths", p.B, p.S);
  if (options.dropout_p == 0) return;
  STD_TORCH_CHECK(options.seed.has_value(), "seed must be given when dropout_p > 0");
  const int64_t* words = integers(*options.seed, "seed", 2);
  p.seed = static_cast<uint64_t>(words[0]);
  p.offset = static_cast<uint32_t>(words[1]);
  p.drop_threshold = static_cast<int32_t>(options.dropout_p * 65536.0 + 0.5);
  p.keep_scale = options.dropout_p == 1.0 ? 0.0f : static_cast<float>(1.0 / (1.0 - options.dropout_p));
}

// Where each packed sequence begins, and where the last one ends.
const int64_t* boundaries(const Tensor& x, const char* name, int64_t B, int64_t total, const char* max_name,
                          int64_t longest) {
  const int64_t* cu = integers(x, name, B + 1);
  STD_TORCH_CHECK(cu[0] == 0, name, "[0] is ", cu[0], "; it must be 0: prepend it");
  for (int64_t b = 0; b < B; ++b) {
    STD_TORCH_CHECK(cu[b] <= cu[b + 1], name, "[", b + 1, "] is ", cu[b + 1], ", less than the ", cu[b],
                    " before it; sequences must not overlap: pass the cumulative sum of their lengths");
    STD_TORCH_CHECK(cu[b + 1] - cu[b] <= longest, "sequence ", b, " of ", name, " has length ", cu[b + 1] - cu[b],
                    "; it must be at most ", max_name, " = ", longest, ": pass the longest length");
  }
  STD_TORCH_CHECK(cu[B] == total, name, "[", B, "] is ", cu[B], "; it must be ", total,
                  ", the number of packed rows: cut the rows, or add the missing sequence");
  return cu;
}

// Ranges of queries per head: one where the heads keep the threads busy, else a few per thread.
int64_t strips_per_head(const AttentionProblem& p, int64_t heads) {
  const int64_t threads = torch::stable::get_num_threads(), blocks = (p.L + QUERY_BLOCK - 1) / QUERY_BLOCK;
  if (threads <= 1 || heads >= 2 * threads || heads == 0) return 1;
  const int64_t wanted = (4 * threads + heads - 1) / heads;
  return std::max<int64_t>(1, std::min(wanted, blocks));
}

}  // namespace

void check_shape(const Tensor& x, const char* name, ScalarType type, std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(x.is_cpu(), name, " must be a CPU tensor");
  STD_TORCH_CHECK(x.scalar_type() == type, name, " must have ",
                  type == ScalarType::Float ? "float32" : "query's dtype");
  const auto dims = static_cast<int64_t>(shape.size());
  STD_TORCH_CHECK(x.dim() == dims, name, " must have ", dims, " dimensions, got ", x.dim());
  int64_t dim = 0;
  for (int64_t size : shape) {
    STD_TORCH_CHECK(x.size(dim) == size, name, " must have size ", size, " in dimension ", dim, ", got ", x.size(dim));
    ++dim;
  }
}

Strided strided(const Tensor& x) { return {bytes(x), x.stride(0), x.stride(1), x.stride(2), x.stride(3)}; }

Strided packed_strided(const Tensor& x) { return {bytes(x), 0, x.stride(1), x.stride(0), x.stride(2)}; }

Result result(const Tensor& x) {
  return {static_cast<char*>(x.mutable_data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

Result packed_result(const Tensor& x) {
  return {static_cast<char*>(x.mutable_data_ptr()), 0, x.stride(1), x.stride(0)};
}

AttentionProblem make_problem(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options) {
  AttentionProblem p{};
  set_heads(p, q, k, v, 4);
  p.B = q.size(0), p.L = q.size(2), p.S = k.size(2);
  check_shape(k, "key", q.scalar_type(), {p.B, k.size(1), p.S, p.D});
  check_shape(v, "value", q.scalar_type(), {p.B, k.size(1), p.S, p.E});
  p.q = strided(q), p.k = strided(k), p.v = strided(v);
  p.lse_batch = p.H * p.L, p.lse_head = p.L;
  set_options(p, options);
  return p;
}

AttentionProblem make_packed_problem(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seq_q,
                                     const Tensor& cu_seq_k, int64_t max_q, int64_t max_k,
                                     const AttentionOptions& options) {
  AttentionProblem p{};
  set_heads(p, q, k, v, 3);
  check_shape(k, "key", q.scalar_type(), {k.size(0), k.size(1), p.D});
  check_shape(v, "value", q.scalar_type(), {k.size(0), k.size(1), p.E});
  STD_TORCH_CHECK(cu_seq_q.dim() == 1 && cu_seq_q.size(0) > 0, "cu_seq_q must be [B + 1]");
  p.B = cu_seq_q.size(0) - 1, p.L = max_q, p.S = max_k;
  p.cu_q = boundaries(cu_seq_q, "cu_seq_q", p.B, q.size(0), "max_q", max_q);
  p.cu_k = boundaries(cu_seq_k, "cu_seq_k", p.B, k.size(0), "max_k", max_k);
  p.q = packed_strided(q), p.k = packed_strided(k), p.v = packed_strided(v);
  p.lse_head = q.size(0);
  set_options(p, options);
  return p;
}

RowStatistics::RowStatistics(AttentionBackward& p, const Tensor& lse_, const Tensor& lse_low_,
                             const std::optional<Tensor>& grad_lse_, std::initializer_list<int64_t> shape)
    : lse(torch::stable::contiguous(lse_)), lse_low(torch::stable::contiguous(lse_low_)) {
  check_shape(lse, "lse", ScalarType::Float, shape);
  check_shape(lse_low, "lse_low", ScalarType::Float, shape);
  p.lse = floats(lse), p.lse_low = floats(lse_low);
  if (!grad_lse_) return;
  check_shape(*grad_lse_, "grad_lse", ScalarType::Float, shape);
  grad_lse = torch::stable::contiguous(*grad_lse_);
  p.grad_lse = floats(*grad_lse);
}

void PairsByQuery::set(AttentionBackward& p, const Tensor& pairs, const Tensor& values) {
  check_cpu(pairs, "pairs", ScalarType::Long, "int64", 2);
  const int64_t P = pairs.size(0);
  STD_TORCH_CHECK(pairs.size(1) == 3 && pairs.is_contiguous(), "pairs must be contiguous [P, 3]");
  check_shape(values, "pair_gradients", ScalarType::Float, {P, p.H});
  STD_TORCH_CHECK(values.is_contiguous(), "pair_gradients must be contiguous");
  const auto* rows = static_cast<const int64_t*>(pairs.const_data_ptr());
  begin_.assign(p.B * p.L + 1, 0), order_.resize(P);
  // The kernels index with them: a wrong one must not be written with.
  for (int64_t n = 0; n < P; ++n) {
    const int64_t b = rows[3 * n], i = rows[3 * n + 1], j = rows[3 * n + 2];
    STD_TORCH_CHECK(b >= 0 && b < p.B && i >= 0 && i < p.L && j >= 0 && j < p.S, "pair ", n,
                    " lies outside of batch, queries or keys");
    ++begin_[b * p.L + i + 1];
  }
  for (int64_t row = 0; row < p.B * p.L; ++row) begin_[row + 1] += begin_[row];
  std::vector<int64_t> next(begin_.begin(), begin_.end() - 1);
  for (int64_t n = 0; n < P; ++n) order_[next[rows[3 * n] * p.L + rows[3 * n + 1]]++] = n;
  p.extra = {rows, floats(values), order_.data(), begin_.data()};
}

void run_forward(AttentionForward& p) {
  const int64_t heads = p.B * p.H;
  p.strips = strips_per_head(p, heads);
  if (p.L == 0 || heads == 0) return;
  parallel_for(0, heads * p.strips, 1, [&](int64_t begin, int64_t end) { attention_kernels().forward(p, begin, end); });
}

void run_backward(AttentionBackward& p) {
  const int64_t heads = p.B * p.H, shared = p.H > 0 ? heads / p.G : 0;
  const int64_t threads = torch::stable::get_num_threads(), key_blocks = (p.S + KEY_BLOCK - 1) / KEY_BLOCK;
  const auto run = [&](Gradients wanted, int64_t units) {
    parallel_for(0, units, 1, [&](int64_t begin, int64_t end) { attention_kernels().backward(p, wanted, begin, end); });
  };
  // Too few heads for the threads: two passes that recompute the tiles (7 products for 5), same bits.
  if (shared < threads && (key_blocks > 1 || p.L > QUERY_BLOCK)) {
    p.strips = strips_per_head(p, heads);
    run(Gradients::key_value, shared * key_blocks);
    if (p.L > 0) run(Gradients::query, heads * p.strips);
  } else {
    run(Gradients::all, shared);
  }
  const MaskGradient& m = p.dmask;
  if (m.data)
    run(Gradients::mask,
        m.batch * m.head * ((m.rows + QUERY_BLOCK - 1) / QUERY_BLOCK) * ((m.columns + KEY_BLOCK - 1) / KEY_BLOCK));
}

}  // namespace nlpfast
