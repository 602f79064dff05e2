// Binding of the CPU kernels of attention on [B, H, L, D] tensors: outputs, and the operations' registration.
#include "attention_problem.h"

namespace nlpfast {
namespace {

std::tuple<Tensor, Tensor, Tensor> attention_forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                                     const std::optional<Tensor>& attn_mask,
                                                     const std::optional<Tensor>& key_lengths,
                                                     const std::optional<Tensor>& prefix_lengths,
                                                     const std::optional<Tensor>& seed, double dropout_p,
                                                     int64_t causal, double scale) {
  AttentionForward p{};
  static_cast<AttentionProblem&>(p) =
      make_problem(query, key, value, {attn_mask, key_lengths, prefix_lengths, seed, dropout_p, causal, scale});
  Tensor out = new_empty(query, {p.B, p.H, p.L, p.E});
  Tensor lse = new_empty(query, {p.B, p.H, p.L}, ScalarType::Float);
  Tensor lse_low = new_empty(query, {p.B, p.H, p.L}, ScalarType::Float);
  p.out = result(out), p.lse = floats(lse), p.lse_low = floats(lse_low);
  run_forward(p);
  return {out, lse, lse_low};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& query, const Tensor& key,
    const Tensor& value, const Tensor& out, const Tensor& lse, const Tensor& lse_low,
    const std::optional<Tensor>& attn_mask, const std::optional<Tensor>& key_lengths,
    const std::optional<Tensor>& prefix_lengths, const std::optional<Tensor>& seed, double dropout_p, int64_t causal,
    double scale, bool mask_gradient, const std::optional<Tensor>& pairs, const std::optional<Tensor>& pair_gradients) {
  AttentionBackward p{};
  static_cast<AttentionProblem&>(p) =
      make_problem(query, key, value, {attn_mask, key_lengths, prefix_lengths, seed, dropout_p, causal, scale});
  check_shape(grad_out, "grad_out", query.scalar_type(), {p.B, p.H, p.L, p.E});
  check_shape(out, "out", query.scalar_type(), {p.B, p.H, p.L, p.E});
  p.grad_out = strided(grad_out), p.out = strided(out);
  const RowStatistics statistics(p, lse, lse_low, grad_lse, {p.B, p.H, p.L});
  Tensor dq = new_empty(query, {p.B, p.H, p.L, p.D}), dk = new_empty(key, {p.B, key.size(1), p.S, p.D});
  Tensor dv = new_empty(value, {p.B, key.size(1), p.S, p.E});
  p.dq = result(dq), p.dk = result(dk), p.dv = result(dv);
  STD_TORCH_CHECK(!mask_gradient || (attn_mask && p.mask_dtype != Dtype::boolean),
                  "mask_gradient needs a floating attn_mask");
  const bool wanted = mask_gradient && attn_mask->numel() > 0;
  Tensor dmask = mask_gradient
                     ? new_empty(lse, {attn_mask->size(0), attn_mask->size(1), attn_mask->size(2), attn_mask->size(3)})
                     : new_empty(lse, {0});
  if (wanted) p.dmask = {floats(dmask), attn_mask->size(0), attn_mask->size(1), attn_mask->size(2), attn_mask->size(3)};
  STD_TORCH_CHECK(pairs.has_value() == pair_gradients.has_value(), "pairs and pair_gradients belong together");
  PairsByQuery by_query;
  if (pairs) by_query.set(p, *pairs, *pair_gradients);
  run_backward(p);
  return {dq, dk, dv, dmask};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nlpfast, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&attention_forward));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}

}  // namespace nlpfast
