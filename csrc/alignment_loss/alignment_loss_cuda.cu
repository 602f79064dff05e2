// Attention's probabilities at pairs on CUDA devices, their gradients, and the most probable key of each query.
//
//     l_h = scale * q_ht . k_hs - lse_ht
//     dq_ht += c_h scale k_hs      dk_hs += c_h scale q_ht      dlse_ht -= c_h
//
// Forward a warp has a pair, with 16 bytes of a row in each lane and as many heads side by side as there is room for.
// For the gradients one kernel groups the pairs by query and by key, a block a batch entry: it lists the entry's pairs,
// then a warp counts, adds up and places them for either order, 32 at a time. After it a warp has a row, and goes
// through the row's pairs in the order in which they were given: each row has one writer, there are no atomics, and the
// bits are the same every time. Both take time of the order of pairs and rows; only the listing reads every pair once
// for each entry, so where there are very many of both the caller sorts instead (nlpfast/ops/pair_rows.py).
//
// A pair outside of batch, queries or keys reads and writes nothing; its l is NaN.
//
// Legend: B batch, H query heads, L queries, S keys, D head size, P pairs, n heads asked for.
#include "../cuda_launch.h"
#include "alignment_loss_cuda_group.h"

namespace nlpfast::cuda {
namespace {

void check_rows(const Tensor& x, const char* name, const Tensor& query) {
  check_on_device(x, name, query);
  STD_TORCH_CHECK(x.dim() == 4 && x.scalar_type() == query.scalar_type() && x.size(3) == query.size(3), name,
                  " must be [B, heads, rows, D] in the dtype of query");
  STD_TORCH_CHECK(x.size(3) == 1 || x.stride(3) == 1, "the elements of a row of ", name, " must lie together");
}

Rows rows_of(const Tensor& x) {
  return {static_cast<char*>(const_cast<void*>(x.const_data_ptr())), x.stride(0), x.stride(1), x.stride(2)};
}

Problem problem_of(const Tensor& query, const Tensor& key, const std::vector<int64_t>& heads, double scale) {
  floating_dtype(query, "query");
  check_rows(query, "query", query), check_rows(key, "key", query);
  Problem p{};
  const int64_t H = query.size(1), Hk = key.size(1), n = static_cast<int64_t>(heads.size());
  STD_TORCH_CHECK(key.size(0) == query.size(0) && Hk > 0 && H % Hk == 0 && H <= 65535,
                  "key must have the batch of query, and a divisor of its heads");
  STD_TORCH_CHECK(n > 0 && n <= MAX_HEADS, "there must be 1 to ", MAX_HEADS, " heads");
  for (int64_t i = 0; i < n; ++i) {
    STD_TORCH_CHECK(heads[i] >= 0 && heads[i] < H, "head ", heads[i], " lies outside of the heads");
    p.heads[i] = static_cast<uint16_t>(heads[i]), p.key_heads[i] = static_cast<uint16_t>(heads[i] / (H / Hk));
  }
  p.query = rows_of(query), p.key = rows_of(key);
  p.L = query.size(2), p.S = key.size(2);
  STD_TORCH_CHECK(query.size(0) <= 0x7fffffff && query.size(3) <= 0x7fffffff, "the batch is too large");
  p.B = static_cast<int>(query.size(0)), p.H = static_cast<int>(H), p.Hk = static_cast<int>(Hk);
  p.D = static_cast<int>(query.size(3)), p.n = static_cast<int>(n), p.scale = static_cast<float>(scale);
  // as many lanes as there are pieces in a row, up to 32
  const int pieces = static_cast<int>((p.D * static_cast<int64_t>(query.element_size()) + 15) / 16);
  while (1 << p.shift < pieces && p.shift < 5) ++p.shift;
  p.lanes = 1 << p.shift;
  return p;
}

// Calls f.template operator()<E, VECTORS>() for the dtype, and for whether 16 bytes are read at once.
template <class F>
void with_rows(const Tensor& query, bool vectors, F&& f) {
  const auto with = [&]<class E>() { vectors ? f.template operator()<E, true>() : f.template operator()<E, false>(); };
  const Dtype dtype = floating_dtype(query, "query");
  if (dtype == Dtype::float32) return with.template operator()<float>();
  dtype == Dtype::bfloat16 ? with.template operator()<Bfloat16>() : with.template operator()<Float16>();
}

// Warps have numbers of 32 bits.
unsigned blocks_of(int64_t warps) {
  STD_TORCH_CHECK(warps <= 0x7fffffff, "there are too many rows");
  return static_cast<unsigned>((warps + WARPS - 1) / WARPS);
}

int64_t check_pairs(const Tensor& pairs) {
  STD_TORCH_CHECK(pairs.dim() == 2 && pairs.size(1) == 3 && pairs.size(0) <= 0x7fffffff, "pairs must be [P, 3]");
  return pairs.size(0);
}

Tensor cuda_alignment_loss_forward(const Tensor& query, const Tensor& key, const Tensor& lse, const Tensor& pairs,
                                   std::vector<int64_t> heads, double scale) {
  Problem p = problem_of(query, key, heads, scale);
  p.P = check_pairs(pairs);
  p.pairs = numbers_of<const int64_t>(pairs, "pairs", query, ScalarType::Long, 3 * p.P);
  p.lse = numbers_of<const float>(lse, "lse", query, ScalarType::Float, int64_t{p.B} * p.H * p.L);
  Tensor terms = new_empty(query, {p.P, p.n}, ScalarType::Float);
  p.terms = static_cast<float*>(terms.mutable_data_ptr());
  if (p.P == 0) return terms;
  const OnDevice guard(query);
  with_rows(query, whole_vectors(query) && whole_vectors(key),
            [&]<class E, bool VECTORS>() { launch<&forward<E, VECTORS>>({blocks_of(p.P)}, {32, WARPS}, 0, p); });
  return terms;
}

// Pairs by query and by key (see Grouping): by_query [P], query_begin [B L + 1], by_key [P], key_begin [B S + 1].
std::tuple<Tensor, Tensor, Tensor, Tensor> cuda_group_pairs(const Tensor& pairs, int64_t B, int64_t L, int64_t S) {
  Grouping g{};
  g.P = check_pairs(pairs), g.L = L, g.S = S;
  const size_t shared = (static_cast<size_t>(L + S) + GROUP_THREADS / WARP_SIZE) * sizeof(int);
  STD_TORCH_CHECK(B > 0 && B <= 0x7fffffff && L >= 0 && S >= 0 && shared <= shared_per_block(pairs),
                  "there are too many rows");
  g.B = static_cast<int>(B);
  g.pairs = numbers_of<const int64_t>(pairs, "pairs", pairs, ScalarType::Long, 3 * g.P);
  const auto make = [&](int64_t n) { return new_empty(pairs, {n}, ScalarType::Int); };
  std::tuple<Tensor, Tensor, Tensor, Tensor> made{make(g.P), make(B * L + 1), make(g.P), make(B * S + 1)};
  const auto data = [](Tensor& x) { return static_cast<int*>(x.mutable_data_ptr()); };
  g.by_query = data(std::get<0>(made)), g.query_begin = data(std::get<1>(made));
  g.by_key = data(std::get<2>(made)), g.key_begin = data(std::get<3>(made));
  Tensor listed = make(g.P);
  g.listed = data(listed);
  const OnDevice guard(pairs);
  launch<&group_pairs>({static_cast<unsigned>(B)}, {GROUP_THREADS}, shared, g);
  return made;
}

// Adds the gradients to what is there, where it is given.
void cuda_alignment_loss_backward(const Tensor& coefficients, const Tensor& query, const Tensor& key,
                                  const Tensor& pairs, const Tensor& by_query, const Tensor& query_begin,
                                  const Tensor& by_key, const Tensor& key_begin, std::vector<int64_t> heads,
                                  double scale, const std::optional<Tensor>& d_query,
                                  const std::optional<Tensor>& d_key, const std::optional<Tensor>& d_lse) {
  Problem p = problem_of(query, key, heads, scale);
  p.P = check_pairs(pairs);
  p.pairs = numbers_of<const int64_t>(pairs, "pairs", query, ScalarType::Long, 3 * p.P);
  p.coefficients = numbers_of<const float>(coefficients, "coefficients", query, ScalarType::Float, p.P * p.n);
  const auto whole = [&](const Tensor& x, const char* name, int64_t n) {
    return numbers_of<const int>(x, name, query, ScalarType::Int, n);
  };
  p.by_query = whole(by_query, "by_query", p.P), p.query_begin = whole(query_begin, "query_begin", p.B * p.L + 1);
  p.by_key = whole(by_key, "by_key", p.P), p.key_begin = whole(key_begin, "key_begin", p.B * p.S + 1);
  bool vectors = whole_vectors(query) && whole_vectors(key);
  const auto gradient = [&](const std::optional<Tensor>& x, const Tensor& of, const char* name, Rows& to) {
    if (!x) return;
    check_rows(*x, name, query);
    for (int64_t dim = 0; dim < 3; ++dim) STD_TORCH_CHECK(x->size(dim) == of.size(dim), name, " has another shape");
    to = rows_of(*x), vectors = vectors && whole_vectors(*x);
  };
  gradient(d_query, query, "d_query", p.d_query), gradient(d_key, key, "d_key", p.d_key);
  if (d_lse) p.d_lse = numbers_of<float>(*d_lse, "d_lse", query, ScalarType::Float, int64_t{p.B} * p.H * p.L);
  const int64_t rows = (d_query || d_lse ? p.B * p.L : 0) + (d_key ? p.B * p.S : 0);
  if (p.P == 0 || rows == 0) return;
  const OnDevice guard(query);
  with_rows(query, vectors,
            [&]<class E, bool VECTORS>() { launch<&backward<E, VECTORS>>({blocks_of(rows)}, {32, WARPS}, 0, p); });
}

// The key of each query with the largest sum of probabilities, the first of equals; -1 where there are no keys.
Tensor cuda_hard_alignment(const Tensor& query, const Tensor& key, const Tensor& lse,
                           const std::optional<Tensor>& source_lengths, std::vector<int64_t> heads, double scale) {
  Problem p = problem_of(query, key, heads, scale);
  p.lse = numbers_of<const float>(lse, "lse", query, ScalarType::Float, int64_t{p.B} * p.H * p.L);
  if (source_lengths)
    p.lengths = numbers_of<const int64_t>(*source_lengths, "source_lengths", query, ScalarType::Long, p.B);
  Tensor found = new_empty(query, {p.B, p.L}, ScalarType::Long);
  p.found = static_cast<int64_t*>(found.mutable_data_ptr());
  if (found.numel() == 0) return found;
  const OnDevice guard(query);
  with_rows(query, whole_vectors(query) && whole_vectors(key), [&]<class E, bool VECTORS>() {
    launch<&largest<E, VECTORS>>({blocks_of(p.B * ((p.L + ROWS - 1) / ROWS))}, {32, WARPS}, 0, p);
  });
  return found;
}

}  // namespace
}  // namespace nlpfast::cuda

STABLE_TORCH_LIBRARY_IMPL(nlpfast, NLPFAST_CUDA_KEY, m) {
  m.impl("cuda_alignment_loss_forward", TORCH_BOX(&nlpfast::cuda::cuda_alignment_loss_forward));
  m.impl("cuda_group_pairs", TORCH_BOX(&nlpfast::cuda::cuda_group_pairs));
  m.impl("cuda_alignment_loss_backward", TORCH_BOX(&nlpfast::cuda::cuda_alignment_loss_backward));
  m.impl("cuda_hard_alignment", TORCH_BOX(&nlpfast::cuda::cuda_hard_alignment));
}
