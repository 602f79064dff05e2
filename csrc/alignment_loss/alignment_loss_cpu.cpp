// Binding of the CPU kernels of alignment_loss: argument checks, pairs by batch entry, threads, and registration.
#include <algorithm>
#include <vector>

#include "../cpu_capability.h"
#include "../stable.h"
#include "alignment_loss.h"

namespace nlpfast {

NLPFAST_DEFINE_CHOICE(AlignmentLossKernels, alignment_loss_kernels, alignment_loss)

namespace {

// Products of a query and a key that are worth a thread.
constexpr int64_t GRAIN = 256;

// A call's tensors and the pairs in the order of their batch entries.
struct Problem {
  int64_t B = 0, P = 0;
  std::vector<int64_t> by_query, by_key, begin;
};

// Sorts the pairs of each batch entry by their query (column 1) or key (2), equal ones in their order.
void sort_pairs(const AlignmentLoss& p, const Problem& problem, int64_t column, std::vector<int64_t>& order) {
  const auto before = [&](int64_t i, int64_t j) { return p.pairs[3 * i + column] < p.pairs[3 * j + column]; };
  for (int64_t b = 0; b < problem.B; ++b)
    std::stable_sort(order.begin() + problem.begin[b], order.begin() + problem.begin[b + 1], before);
}

Heads heads_of(const Tensor& x) {
  return {static_cast<char*>(x.mutable_data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

void check_heads(const Tensor& x, const char* name, ScalarType type) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4 && x.scalar_type() == type, name,
                  " must be a CPU tensor [B, heads, rows, D] in the dtype of query");
  STD_TORCH_CHECK(x.size(3) <= 1 || x.stride(3) == 1, "the elements of a row of ", name, " must lie together");
}

Problem set_problem(AlignmentLoss& p, const Tensor& query, const Tensor& key, const Tensor& pairs, const Tensor& heads,
                    double scale) {
  const ScalarType type = query.scalar_type();
  check_heads(query, "query", type);
  check_heads(key, "key", type);
  check_cpu(pairs, "pairs", ScalarType::Long, "int64", 2);
  check_cpu(heads, "heads", ScalarType::Long, "int64", 1);
  STD_TORCH_CHECK(pairs.size(1) == 3 && pairs.is_contiguous() && heads.is_contiguous(),
                  "pairs must be contiguous [P, 3] and heads contiguous");
  p.dtype = floating_dtype(query, "query");
  p.H = query.size(1), p.L = query.size(2), p.D = query.size(3), p.Hk = key.size(1), p.S = key.size(2);
  p.n = heads.numel();
  STD_TORCH_CHECK(key.size(0) == query.size(0) && key.size(3) == p.D && p.Hk > 0 && p.H % p.Hk == 0,
                  "key must have the batch and head size of query, and a divisor of its heads");
  p.query = heads_of(query), p.key = heads_of(key);
  p.pairs = static_cast<const int64_t*>(pairs.const_data_ptr());
  p.heads = static_cast<const int64_t*>(heads.const_data_ptr());
  p.scale = (float)scale;
  Problem problem;
  problem.B = query.size(0), problem.P = pairs.size(0);
  // Kernels index with them: a wrong one must not be read with.
  for (int64_t i = 0; i < p.n; ++i)
    STD_TORCH_CHECK(p.heads[i] >= 0 && p.heads[i] < p.H, "head ", p.heads[i], " lies outside of the heads");
  problem.begin.assign(problem.B + 1, 0), problem.by_query.resize(problem.P);
  for (int64_t i = 0; i < problem.P; ++i) {
    const int64_t *pair = p.pairs + 3 * i, b = pair[0];
    STD_TORCH_CHECK(b >= 0 && b < problem.B && pair[1] >= 0 && pair[1] < p.L && pair[2] >= 0 && pair[2] < p.S, "pair ",
                    i, " lies outside of batch, queries or keys");
    ++problem.begin[b + 1];
  }
  for (int64_t b = 0; b < problem.B; ++b) problem.begin[b + 1] += problem.begin[b];
  std::vector<int64_t> next(problem.begin.begin(), problem.begin.end() - 1);
  for (int64_t i = 0; i < problem.P; ++i) problem.by_query[next[p.pairs[3 * i]]++] = i;
  sort_pairs(p, problem, 1, problem.by_query);
  p.by_query = problem.by_query.data(), p.begin = problem.begin.data();
  return problem;
}

template <class F>
void for_units(const AlignmentLoss& p, const Problem& problem, F&& f) {
  const int64_t units = problem.B * p.Hk;
  if (units == 0 || problem.P == 0 || p.n == 0) return;
  const int64_t products = std::max<int64_t>(1, problem.P * p.n / units);
  parallel_for(0, units, std::max<int64_t>(1, GRAIN / products), f);
}

// [P, n] and [B, H, L] of float32.
float* floats_of(const Tensor& x, const char* name, std::initializer_list<int64_t> shape) {
  check_cpu(x, name, ScalarType::Float, "float32", (int64_t)shape.size());
  int64_t dim = 0;
  for (const int64_t size : shape) STD_TORCH_CHECK(x.size(dim++) == size, name, " has another shape");
  STD_TORCH_CHECK(x.is_contiguous(), name, " must be contiguous");
  return static_cast<float*>(x.mutable_data_ptr());
}

Tensor alignment_loss_forward(const Tensor& query, const Tensor& key, const Tensor& lse, const Tensor& pairs,
                              const Tensor& heads, double scale) {
  AlignmentLossForward p{};
  const Problem problem = set_problem(p, query, key, pairs, heads, scale);
  p.lse = floats_of(lse, "lse", {problem.B, p.H, p.L});
  Tensor terms = new_empty(query, {problem.P, p.n}, ScalarType::Float);
  p.terms = static_cast<float*>(terms.mutable_data_ptr());
  for_units(p, problem, [&](int64_t begin, int64_t end) { alignment_loss_kernels().forward(p, begin, end); });
  return terms;
}

void alignment_loss_backward(const Tensor& coefficients, const Tensor& query, const Tensor& key, const Tensor& pairs,
                             const Tensor& heads, double scale, const std::optional<Tensor>& d_query,
                             const std::optional<Tensor>& d_key, const std::optional<Tensor>& d_lse) {
  AlignmentLossBackward p{};
  Problem problem = set_problem(p, query, key, pairs, heads, scale);
  p.coefficients = floats_of(coefficients, "coefficients", {problem.P, p.n});
  const auto gradient = [&](const std::optional<Tensor>& x, const Tensor& of, const char* name, Heads& to) {
    if (!x) return;
    check_heads(*x, name, of.scalar_type());
    for (int64_t dim = 0; dim < 4; ++dim) STD_TORCH_CHECK(x->size(dim) == of.size(dim), name, " has another shape");
    to = heads_of(*x);
  };
  gradient(d_query, query, "d_query", p.d_query);
  gradient(d_key, key, "d_key", p.d_key);
  if (d_key) {
    problem.by_key = problem.by_query;
    // within a key in the order of the queries
    sort_pairs(p, problem, 2, problem.by_key);
    p.by_key = problem.by_key.data();
  }
  if (d_lse) p.d_lse = floats_of(*d_lse, "d_lse", {problem.B, p.H, p.L});
  for_units(p, problem, [&](int64_t begin, int64_t end) { alignment_loss_kernels().backward(p, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nlpfast, CPU, m) {
  m.impl("alignment_loss_forward", TORCH_BOX(&alignment_loss_forward));
  m.impl("alignment_loss_backward", TORCH_BOX(&alignment_loss_backward));
}

}  // namespace nlpfast
