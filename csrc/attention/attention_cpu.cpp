// Binding of the CPU attention kernels: argument checks, outputs, choice of instruction set, threads.
#include "../cpu_capability.h"
#include "../stable.h"
#include "attention.h"

namespace nlpfast {

#define NLPFAST_DECLARE_KERNELS(isa)       \
  namespace isa {                          \
  extern const AttentionKernels attention; \
  }
NLPFAST_DECLARE_KERNELS(baseline)
#if defined(__x86_64__)
NLPFAST_DECLARE_KERNELS(avx2)
NLPFAST_DECLARE_KERNELS(avx512)
NLPFAST_DECLARE_KERNELS(avx512_amx)
#endif

const AttentionKernels& attention_kernels() {
#if defined(__x86_64__)
  switch (cpu_capability()) {
    case CpuCapability::avx512_amx:
      return avx512_amx::attention;
    case CpuCapability::avx512:
      return avx512::attention;
    case CpuCapability::avx2:
      return avx2::attention;
    default:
      break;
  }
#endif
  return baseline::attention;
}

namespace {

using torch::stable::new_empty;
using torch::stable::parallel_for;

constexpr int64_t MAX_HEAD_SIZE = 256;

Strided strided(const Tensor& x) {
  return {static_cast<const float*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

const float* contiguous_data(const Tensor& x) { return static_cast<const float*>(x.const_data_ptr()); }

float* output_data(const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

void check_shape(const Tensor& x, const char* name, std::initializer_list<int64_t> shape) {
  check_cpu(x, name, ScalarType::Float, "float32", static_cast<int64_t>(shape.size()));
  int64_t dim = 0;
  for (int64_t size : shape) {
    STD_TORCH_CHECK(x.size(dim) == size, name, " must have size ", size, " in dimension ", dim, ", got ", x.size(dim));
    ++dim;
  }
}

// The part of the problem that forward and backward share, checked.
AttentionProblem make_problem(const Tensor& q, const Tensor& k, const Tensor& v,
                              const std::optional<Tensor>& key_lengths, const std::optional<Tensor>& seed,
                              double dropout_p, int64_t causal, double scale) {
  check_cpu(q, "query", ScalarType::Float, "float32", 4);
  check_cpu(k, "key", ScalarType::Float, "float32", 4);
  check_cpu(v, "value", ScalarType::Float, "float32", 4);
  AttentionProblem p{};
  p.B = q.size(0), p.H = q.size(1), p.L = q.size(2), p.D = q.size(3), p.S = k.size(2), p.E = v.size(3);
  const int64_t key_heads = k.size(1);
  STD_TORCH_CHECK(p.H == key_heads || (key_heads > 0 && p.H % key_heads == 0), "query has ", p.H,
                  " heads, which must be a multiple of the ", key_heads, " heads of key");
  check_shape(k, "key", {p.B, key_heads, p.S, p.D});
  check_shape(v, "value", {p.B, key_heads, p.S, p.E});
  STD_TORCH_CHECK(p.D <= MAX_HEAD_SIZE && p.E <= MAX_HEAD_SIZE, "head size must be at most ", MAX_HEAD_SIZE, ", got ",
                  p.D, " (query, key) and ", p.E, " (value)");
  STD_TORCH_CHECK(causal >= 0 && causal <= 2, "causal must be 0, 1 or 2, got ", causal);
  STD_TORCH_CHECK(dropout_p >= 0 && dropout_p <= 1, "dropout_p must be in [0, 1], got ", dropout_p);
  p.G = key_heads > 0 ? p.H / key_heads : 1;
  p.q = strided(q), p.k = strided(k), p.v = strided(v);
  p.causal = causal != 0, p.diagonal = causal == 2 ? p.S - p.L : 0;
  p.scale = static_cast<float>(scale);
  if (key_lengths) {
    check_cpu(*key_lengths, "key_lengths", ScalarType::Long, "int64", 1);
    STD_TORCH_CHECK(key_lengths->size(0) == p.B && key_lengths->is_contiguous(), "key_lengths must be contiguous [",
                    p.B, "]");
    p.key_lengths = static_cast<const int64_t*>(key_lengths->const_data_ptr());
    for (int64_t b = 0; b < p.B; ++b)
      STD_TORCH_CHECK(p.key_lengths[b] >= 0 && p.key_lengths[b] <= p.S, "key_lengths[", b, "] is ", p.key_lengths[b],
                      "; it must be within 0..", p.S, ", the number of keys: pass the unpadded length of each row");
  }
  if (dropout_p > 0) {
    STD_TORCH_CHECK(seed.has_value(), "seed must be given when dropout_p > 0");
    check_cpu(*seed, "seed", ScalarType::Long, "int64", 1);
    STD_TORCH_CHECK(seed->size(0) == 2 && seed->is_contiguous(), "seed must be contiguous [2]");
    const int64_t* words = static_cast<const int64_t*>(seed->const_data_ptr());
    p.seed = static_cast<uint64_t>(words[0]);
    p.offset = static_cast<uint32_t>(words[1]);
    p.drop_threshold = static_cast<int32_t>(dropout_p * 65536.0 + 0.5);
    p.keep_scale = dropout_p == 1.0 ? 0.0f : static_cast<float>(1.0 / (1.0 - dropout_p));
  }
  return p;
}

// Ranges of queries per head: one where the heads keep the threads busy, else a few per thread.
int64_t strips_per_head(const AttentionProblem& p, int64_t heads) {
  const int64_t threads = torch::stable::get_num_threads(), blocks = (p.L + QUERY_BLOCK - 1) / QUERY_BLOCK;
  if (threads <= 1 || heads >= 2 * threads || heads == 0) return 1;
  const int64_t wanted = (4 * threads + heads - 1) / heads;
  return wanted < blocks ? wanted : blocks;
}

std::tuple<Tensor, Tensor, Tensor> attention_forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                                     const std::optional<Tensor>& key_lengths,
                                                     const std::optional<Tensor>& seed, double dropout_p,
                                                     int64_t causal, double scale) {
  AttentionForward p{make_problem(query, key, value, key_lengths, seed, dropout_p, causal, scale), 1, nullptr, nullptr,
                     nullptr};
  Tensor out = new_empty(query, {p.B, p.H, p.L, p.E}), lse = new_empty(query, {p.B, p.H, p.L});
  Tensor lse_low = new_empty(query, {p.B, p.H, p.L});
  p.out = output_data(out), p.lse = output_data(lse), p.lse_low = output_data(lse_low);
  const int64_t heads = p.B * p.H;
  p.strips = strips_per_head(p, heads);
  if (p.L > 0 && heads > 0)
    parallel_for(0, heads * p.strips, 1,
                 [&](int64_t begin, int64_t end) { attention_kernels().forward(p, begin, end); });
  return {out, lse, lse_low};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& grad_out, const std::optional<Tensor>& grad_lse,
                                                      const Tensor& query, const Tensor& key, const Tensor& value,
                                                      const Tensor& out, const Tensor& lse, const Tensor& lse_low,
                                                      const std::optional<Tensor>& key_lengths,
                                                      const std::optional<Tensor>& seed, double dropout_p,
                                                      int64_t causal, double scale) {
  const AttentionProblem problem = make_problem(query, key, value, key_lengths, seed, dropout_p, causal, scale);
  AttentionBackward p{problem, 1, {}, {}, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
  check_shape(grad_out, "grad_out", {p.B, p.H, p.L, p.E});
  check_shape(out, "out", {p.B, p.H, p.L, p.E});
  check_shape(lse, "lse", {p.B, p.H, p.L});
  check_shape(lse_low, "lse_low", {p.B, p.H, p.L});
  const Tensor lse_rows = torch::stable::contiguous(lse), low_rows = torch::stable::contiguous(lse_low);
  std::optional<Tensor> grad_lse_rows;
  if (grad_lse) {
    check_shape(*grad_lse, "grad_lse", {p.B, p.H, p.L});
    grad_lse_rows = torch::stable::contiguous(*grad_lse);
    p.grad_lse = contiguous_data(*grad_lse_rows);
  }
  p.grad_out = strided(grad_out), p.out = strided(out), p.lse = contiguous_data(lse_rows);
  p.lse_low = contiguous_data(low_rows);
  const int64_t key_heads = key.size(1), heads = p.B * p.H, shared = p.B * key_heads;
  Tensor dq = new_empty(query, {p.B, p.H, p.L, p.D}), dk = new_empty(key, {p.B, key_heads, p.S, p.D});
  Tensor dv = new_empty(value, {p.B, key_heads, p.S, p.E});
  p.dq = output_data(dq), p.dk = output_data(dk), p.dv = output_data(dv);

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
  return {dq, dk, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nlpfast, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&attention_forward));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}

}  // namespace nlpfast
