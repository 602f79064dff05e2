// Attention over few keys on CUDA devices: a block a head, its keys and values in shared memory, whole rows in
// registers.
//
//     O = dropout(softmax(scale * Q K^T + mask)) V,   lse = log sum exp(scale * Q K^T + mask)
//     dV = Pd^T dO,   dP = dropout(dO V^T),   dS = P (dP - rowsum(P dP) + dlse),   dQ = scale dS K,   dK = scale dS^T Q
//
// A block goes from head to head, and the keys and values of the next one are under way while it computes. Each warp
// has 16 queries at a time, and theirs come while those before are computed: with all keys of a row in registers there
// is one maximum and one sum, and nothing is computed twice. With a causal mask later queries see more keys: the warps
// take the tiles of queries in an order that goes back and forth, so that they have as much to do. Products are
// mma.sync of 16-bit numbers, sums are in float32; there are no atomics. More than 128 keys go by 128 at a time, for 64
// queries of a block (forward_chunked).
//
// The backward pass is one kernel, which reads neither the output nor anything else of the forward pass: q, k, v and dO
// in, dQ, dK and dV out; only where there are more than 128 keys it goes through them 128 at a time, and wants the
// output and lse. A block has a head of keys, and as many queries at a time as keys. First each warp has 16 queries: it
// computes their rows anew, whole, then dQ, and leaves P and dS in shared memory in 16 bits; then it has 16 keys, and
// adds to dK and dV, which stay in registers until all queries of all heads of the group have come by. Where an
// alignment loss supervises single pairs of query and key, in sentences of up to 64 tokens, their gradients are added
// to dS on the way: each warp lays them out as a table of its rows.
//
// Rows lie in shared memory with their 16-byte chunks exchanged (place_of), so that eight rows of a matrix are read
// from eight different places of its banks.
//
// Legend: B sequences, H query heads, L queries, S keys, D head size; i queries, j keys.
#include "../cuda_launch.h"
#include "attention_cuda_backward.h"
#include "attention_cuda_forward.h"

namespace nlpfast::cuda {
namespace {

void check_rows(const Tensor& x, const char* name, const Tensor& query, int64_t D) {
  check_on_device(x, name, query);
  STD_TORCH_CHECK(x.scalar_type() == query.scalar_type(), name, " must have the dtype of query");
  STD_TORCH_CHECK(x.dim() == query.dim() && x.size(x.dim() - 1) == D, name, " must have the head size of query");
  STD_TORCH_CHECK(rows_on_vectors(x), "the rows of ", name, " must begin at multiples of 16 bytes");
  for (int64_t dim = 0; dim + 1 < x.dim(); ++dim)
    STD_TORCH_CHECK(x.size(dim) <= 0x7fffffff && (x.size(dim) <= 1 || x.stride(dim) <= 0x7fffffff), name,
                    " has a size or a stride of over 2^31 - 1");
}

// Of [B, H, rows, D], or packed [total, H, D].
Rows rows_of(const Tensor& x) {
  char* data = static_cast<char*>(const_cast<void*>(x.const_data_ptr()));
  // a stride that nobody goes along may be anything
  const auto stride = [&](int64_t dim) { return x.size(dim) <= 1 ? 0 : static_cast<int>(x.stride(dim)); };
  if (x.dim() == 3) return {data, 0, stride(1), stride(0)};
  return {data, stride(0), stride(1), stride(2)};
}

const int64_t* integers_of(const std::optional<Tensor>& x, const char* name, const Tensor& query, int64_t n) {
  return x ? numbers_of<const int64_t>(*x, name, query, ScalarType::Long, n) : nullptr;
}

struct Sequences {
  const std::optional<Tensor>&key_lengths, &prefix_lengths, &cu_seq_q, &cu_seq_k, &seed;
  double dropout_p;
  int64_t causal;
  double scale;
};

Problem problem_of(const Tensor& query, const Tensor& key, const Tensor& value, const Sequences& options) {
  const bool packed = options.cu_seq_q.has_value();
  STD_TORCH_CHECK(query.dim() == (packed ? 3 : 4), "query must be [B, H, L, D], or packed [total, H, D]");
  STD_TORCH_CHECK(query.scalar_type() == ScalarType::BFloat16 || query.scalar_type() == ScalarType::Half,
                  "query must be bfloat16 or float16");
  const int64_t D = query.size(query.dim() - 1);
  STD_TORCH_CHECK(D == 32 || D == 64, "the head size must be 32 or 64, and is ", D);
  check_rows(query, "query", query, D), check_rows(key, "key", query, D), check_rows(value, "value", query, D);
  const int64_t H = query.size(1), Hk = key.size(1);
  STD_TORCH_CHECK(Hk > 0 && H % Hk == 0 && value.size(1) == Hk, "heads of query must be a multiple of key's");
  const int64_t B = packed ? options.cu_seq_q->numel() - 1 : query.size(0);
  STD_TORCH_CHECK(B * H <= 0x7fffffff, "there are too many heads");
  STD_TORCH_CHECK(options.causal >= 0 && options.causal <= 2, "causal must be 0, 1 or 2");
  Problem p{};
  p.q = rows_of(query), p.k = rows_of(key), p.v = rows_of(value);
  p.H = static_cast<int>(H), p.group = static_cast<int>(H / Hk), p.causal = static_cast<int>(options.causal);
  p.L = packed ? 0 : static_cast<int>(query.size(2)), p.S = packed ? 0 : static_cast<int>(key.size(2));
  p.scale = static_cast<float>(options.scale);
  p.key_lengths = integers_of(options.key_lengths, "key_lengths", query, B);
  p.prefix_lengths = integers_of(options.prefix_lengths, "prefix_lengths", query, B);
  p.cu_seq_q = integers_of(options.cu_seq_q, "cu_seq_q", query, B + 1);
  p.cu_seq_k = integers_of(options.cu_seq_k, "cu_seq_k", query, B + 1);
  STD_TORCH_CHECK(!p.cu_seq_q == !p.cu_seq_k, "cu_seq_q and cu_seq_k are given together");
  if (options.seed) {
    STD_TORCH_CHECK(options.dropout_p >= 0.0 && options.dropout_p <= 1.0, "dropout_p must be in [0, 1]");
    p.dropping = {integers_of(options.seed, "seed", query, 2), static_cast<int>(options.dropout_p * 65536.0 + 0.5),
                  options.dropout_p < 1.0 ? static_cast<float>(1.0 / (1.0 - options.dropout_p)) : 0.0f};
  }
  const int64_t rows = query.size(packed ? 0 : 2);
  STD_TORCH_CHECK(H * rows <= 0x7fffffff, "there are too many queries");
  p.lse_head = static_cast<int>(rows), p.lse_batch = packed ? 0 : static_cast<int>(H * rows);
  p.group_size = Divisor(static_cast<unsigned>(p.group));
  return p;
}

// Calls f.template operator()<E, D>() for the dtype and the head size.
template <class F>
void with_rows(const Tensor& query, F&& f) {
  const auto with = [&]<class E>() {
    query.size(query.dim() - 1) == 32 ? f.template operator()<E, 32>() : f.template operator()<E, 64>();
  };
  query.scalar_type() == ScalarType::BFloat16 ? with.template operator()<Bfloat16>()
                                              : with.template operator()<Float16>();
}

// max_q, max_k: queries and keys of a sequence at most. Writes out, and returns lse, [B, H, L] or packed [H, total].
Tensor cuda_attention_forward(const Tensor& query, const Tensor& key, const Tensor& value,
                              const std::optional<Tensor>& key_lengths, const std::optional<Tensor>& prefix_lengths,
                              const std::optional<Tensor>& cu_seq_q, const std::optional<Tensor>& cu_seq_k,
                              int64_t max_q, int64_t max_k, const std::optional<Tensor>& seed, double dropout_p,
                              int64_t causal, double scale, const Tensor& out) {
  Problem p =
      problem_of(query, key, value, {key_lengths, prefix_lengths, cu_seq_q, cu_seq_k, seed, dropout_p, causal, scale});
  check_rows(out, "out", query, query.size(query.dim() - 1));
  p.out = rows_of(out);
  const int64_t rows = p.lse_head, B = p.cu_seq_q ? cu_seq_q->numel() - 1 : query.size(0);
  Tensor lse = p.cu_seq_q ? new_empty(query, {p.H, rows}, ScalarType::Float)
                          : new_empty(query, {B, p.H, rows}, ScalarType::Float);
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  p.heads = static_cast<unsigned>(B * p.H), p.heads_each = Divisor(static_cast<unsigned>(p.H));
  if (p.heads == 0 || rows == 0) return lse;
  const OnDevice guard(query);
  with_rows(query, [&]<class E, int D>() {
    const auto run = [&]<int KEYS, int WARPS>() {
      const size_t shared = (4 * KEYS + WARPS * TILE) * D * sizeof(E);
      const unsigned most = multiprocessors(query) * static_cast<unsigned>(MAX_SHARED / shared);
      launch<&forward<E, D, KEYS, WARPS>>({p.heads < most ? p.heads : most}, {WARPS * 32}, shared, p);
    };
    if (max_k <= 64) return run.template operator()<64, 4>();
    if (max_k <= 128) return run.template operator()<128, 4>();
    constexpr int KEYS = 128, WARPS = 4, ROWS = WARPS * TILE;
    p.blocks = static_cast<unsigned>(((p.cu_seq_q ? max_q : query.size(2)) + ROWS - 1) / ROWS);
    STD_TORCH_CHECK(uint64_t{p.heads} * p.blocks <= 0x7fffffff, "there are too many queries");
    launch<&forward_chunked<E, D, KEYS, WARPS>>({p.heads * p.blocks}, {WARPS * 32}, (4 * KEYS + ROWS) * D * sizeof(E),
                                                p);
  });
  return lse;
}

// Where slopes are added to those of attention there is a head of keys for each of queries, and at most so many rows.
constexpr int ROWS_WITH_PAIRS = 64;

PairSlopes pairs_of(const Tensor& query, const std::optional<Tensor>& slopes, const std::optional<Tensor>& pairs,
                    const std::optional<Tensor>& order, const std::optional<Tensor>& begin,
                    const std::vector<int64_t>& heads, const Problem& p, int64_t max_k) {
  PairSlopes added{};
  if (!slopes) return added;
  STD_TORCH_CHECK(pairs && order && begin, "pairs, by_query and query_begin are given together with slopes");
  STD_TORCH_CHECK(p.group == 1 && query.dim() == 4 && p.L <= ROWS_WITH_PAIRS && max_k <= ROWS_WITH_PAIRS &&
                      heads.size() <= PairSlopes::MAX_HEADS,
                  "slopes are added for up to ", ROWS_WITH_PAIRS, " queries and keys and ", PairSlopes::MAX_HEADS,
                  " heads, each with keys of its own");
  const int64_t P = pairs->size(0), n = static_cast<int64_t>(heads.size());
  added.slopes = numbers_of<const float>(*slopes, "slopes", query, ScalarType::Float, P * n);
  added.pairs = numbers_of<const int64_t>(*pairs, "pairs", query, ScalarType::Long, 3 * P);
  added.order = numbers_of<const int>(*order, "by_query", query, ScalarType::Int, P);
  added.begin = numbers_of<const int>(*begin, "query_begin", query, ScalarType::Int, query.size(0) * p.L + 1);
  added.n = static_cast<int>(n);
  for (int64_t i = 0; i < n; ++i) added.heads[i] = static_cast<uint16_t>(heads[i]);
  return added;
}

// Writes the gradients of query, key and value.
void cuda_attention_backward(const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& query,
                             const Tensor& key, const Tensor& value, const std::optional<Tensor>& key_lengths,
                             const std::optional<Tensor>& prefix_lengths, const std::optional<Tensor>& cu_seq_q,
                             const std::optional<Tensor>& cu_seq_k, int64_t max_k, const std::optional<Tensor>& seed,
                             double dropout_p, int64_t causal, double scale, const std::optional<Tensor>& out,
                             const std::optional<Tensor>& lse, const std::optional<Tensor>& slopes,
                             const std::optional<Tensor>& pairs, const std::optional<Tensor>& by_query,
                             const std::optional<Tensor>& query_begin, std::vector<int64_t> heads,
                             const Tensor& d_query, const Tensor& d_key, const Tensor& d_value) {
  Problem p =
      problem_of(query, key, value, {key_lengths, prefix_lengths, cu_seq_q, cu_seq_k, seed, dropout_p, causal, scale});
  const bool chunked = max_k > 128;
  const int64_t size = query.size(query.dim() - 1);
  check_rows(grad_out, "grad_out", query, size), check_rows(d_query, "d_query", query, size);
  check_rows(d_key, "d_key", query, size), check_rows(d_value, "d_value", query, size);
  p.out = rows_of(grad_out), p.dq = rows_of(d_query), p.dk = rows_of(d_key), p.dv = rows_of(d_value);
  const int64_t B = p.cu_seq_q ? cu_seq_q->numel() - 1 : query.size(0);
  if (grad_lse) {
    check_on_device(*grad_lse, "grad_lse", query);
    STD_TORCH_CHECK(grad_lse->scalar_type() == ScalarType::Float && grad_lse->is_contiguous(),
                    "grad_lse must be contiguous float32");
    p.grad_lse = static_cast<const float*>(grad_lse->const_data_ptr());
  }
  if (chunked) {
    STD_TORCH_CHECK(out && lse, "with more than 128 keys out and lse are needed, and there are ", max_k);
    check_rows(*out, "out", query, size);
    check_on_device(*lse, "lse", query);
    STD_TORCH_CHECK(lse->scalar_type() == ScalarType::Float && lse->is_contiguous(), "lse must be contiguous float32");
    p.given = rows_of(*out), p.lse = static_cast<float*>(const_cast<void*>(lse->const_data_ptr()));
  }
  const PairSlopes added = pairs_of(query, slopes, pairs, by_query, query_begin, heads, p, max_k);
  p.heads = static_cast<unsigned>(B * key.size(1)), p.heads_each = Divisor(static_cast<unsigned>(key.size(1)));
  // of packed sequences there may be any number of queries
  const int64_t most_q = p.cu_seq_q ? query.size(0) : query.size(2);
  if (p.heads == 0) return;
  const OnDevice guard(query);
  with_rows(query, [&]<class E, int D>() {
    const auto launch_one = [&]<int KEYS, int STAGES, bool ONE, bool PAIRS = false, bool CHUNKED = false>() {
      const size_t table = PAIRS ? KEYS * SLOPES<KEYS> * sizeof(float) : 0;
      const size_t shared = (4 * STAGES * KEYS * D + 2 * KEYS * KEYS) * sizeof(E) + table;
      const unsigned most = multiprocessors(query) * static_cast<unsigned>(MAX_SHARED / shared);
      launch<&backward<E, D, KEYS, STAGES, ONE, PAIRS, CHUNKED>>({p.heads < most ? p.heads : most}, {KEYS * 2}, shared,
                                                                 p, added);
    };
    if (added.n > 0) return launch_one.template operator()<ROWS_WITH_PAIRS, 2, true, true>();
    const auto run = [&]<int KEYS, int STAGES>() {
      if constexpr (KEYS == 128)
        if (chunked) return launch_one.template operator()<KEYS, STAGES, false, false, true>();
      p.group == 1 && most_q <= KEYS ? launch_one.template operator()<KEYS, STAGES, true>()
                                     : launch_one.template operator()<KEYS, STAGES, false>();
    };
    if (max_k <= 64) return run.template operator()<64, 2>();
    // two stages of 128 keys of 64 columns are more than sm_80 has
    if constexpr (D > 32)
      if (shared_per_block(query) < MAX_SHARED) return run.template operator()<128, 1>();
    run.template operator()<128, 2>();
  });
}

}  // namespace
}  // namespace nlpfast::cuda

STABLE_TORCH_LIBRARY_IMPL(nlpfast, NLPFAST_CUDA_KEY, m) {
  m.impl("cuda_attention_forward", TORCH_BOX(&nlpfast::cuda::cuda_attention_forward));
  m.impl("cuda_attention_backward", TORCH_BOX(&nlpfast::cuda::cuda_attention_backward));
}
