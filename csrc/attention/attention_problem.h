// Checked arguments of the attention operations, as the kernels take them.
#pragma once

#include <vector>

#include "../stable.h"
#include "attention.h"

namespace nlpfast {

// Tensors that say what is visible and what is dropped, and the options of a call, as in the schemas of library.cpp.
struct AttentionOptions {
  const std::optional<Tensor>&attn_mask, &key_lengths, &prefix_lengths, &seed;
  double dropout_p;
  int64_t causal;
  double scale;
};

// A call on [B, H, L, D] tensors, checked.
AttentionProblem make_problem(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options);

// A call on packed [total, H, D] tensors, checked. L and S are max_q and max_k.
AttentionProblem make_packed_problem(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seq_q,
                                     const Tensor& cu_seq_k, int64_t max_q, int64_t max_k,
                                     const AttentionOptions& options);

// Raises unless `x` is a CPU tensor of this type and these sizes.
void check_shape(const Tensor& x, const char* name, ScalarType type, std::initializer_list<int64_t> shape);

Strided strided(const Tensor& x);         // [B, H, rows, columns]
Strided packed_strided(const Tensor& x);  // [total, H, columns]
Result result(const Tensor& x);           // contiguous [B, H, rows, columns]
Result packed_result(const Tensor& x);    // contiguous [total, H, columns]

inline float* floats(const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

// lse, lse_low and perhaps grad_lse as the backward reads them; the tensors keep contiguous copies alive.
struct RowStatistics {
  Tensor lse, lse_low;
  std::optional<Tensor> grad_lse;

  RowStatistics(AttentionBackward& p, const Tensor& lse, const Tensor& lse_low, const std::optional<Tensor>& grad_lse,
                std::initializer_list<int64_t> shape);
};

// Gradients at pairs as the backward reads them: the pairs' numbers, kept alive here, in the order of their queries.
class PairsByQuery {
 public:
  void set(AttentionBackward& p, const Tensor& pairs, const Tensor& values);

 private:
  std::vector<int64_t> order_, begin_;
};

// Divide the work among the threads and run the kernels.
void run_forward(AttentionForward& p);
void run_backward(AttentionBackward& p);

}  // namespace nlpfast
