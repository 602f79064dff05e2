// Binding of the CPU kernels of attention on packed sequences: outputs, and the operations' registration.
#include "attention_problem.h"

namespace nlpfast {
namespace {

std::tuple<Tensor, Tensor, Tensor> varlen_attention_forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                                            const Tensor& cu_seq_q, const Tensor& cu_seq_k,
                                                            int64_t max_q, int64_t max_k,
                                                            const std::optional<Tensor>& seed, double dropout_p,
                                                            int64_t causal, double scale) {
  AttentionForward p{};
  const std::optional<Tensor> none;
  static_cast<AttentionProblem&>(p) = make_packed_problem(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k,
                                                          {none, none, none, seed, dropout_p, causal, scale});
  Tensor out = new_empty(query, {query.size(0), p.H, p.E});
  Tensor lse = new_empty(query, {p.H, query.size(0)}, ScalarType::Float);
  Tensor lse_low = new_empty(query, {p.H, query.size(0)}, ScalarType::Float);
  p.out = packed_result(out), p.lse = floats(lse), p.lse_low = floats(lse_low);
  run_forward(p);
  return {out, lse, lse_low};
}

std::tuple<Tensor, Tensor, Tensor> varlen_attention_backward(
    const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& query, const Tensor& key,
    const Tensor& value, const Tensor& out, const Tensor& lse, const Tensor& lse_low, const Tensor& cu_seq_q,
    const Tensor& cu_seq_k, int64_t max_q, int64_t max_k, const std::optional<Tensor>& seed, double dropout_p,
    int64_t causal, double scale) {
  AttentionBackward p{};
  const std::optional<Tensor> none;
  static_cast<AttentionProblem&>(p) = make_packed_problem(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k,
                                                          {none, none, none, seed, dropout_p, causal, scale});
  check_shape(grad_out, "grad_out", query.scalar_type(), {query.size(0), p.H, p.E});
  check_shape(out, "out", query.scalar_type(), {query.size(0), p.H, p.E});
  p.grad_out = packed_strided(grad_out), p.out = packed_strided(out);
  const RowStatistics statistics(p, lse, lse_low, grad_lse, {p.H, query.size(0)});
  Tensor dq = new_empty(query, {query.size(0), p.H, p.D}), dk = new_empty(key, {key.size(0), key.size(1), p.D});
  Tensor dv = new_empty(value, {key.size(0), key.size(1), p.E});
  p.dq = packed_result(dq), p.dk = packed_result(dk), p.dv = packed_result(dv);
  run_backward(p);
  return {dq, dk, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nlpfast, CPU, m) {
  m.impl("varlen_attention_forward", TORCH_BOX(&varlen_attention_forward));
  m.impl("varlen_attention_backward", TORCH_BOX(&varlen_attention_backward));
}

}  // namespace nlpfast
