// Every operation of nlpfast and its schema. Kernels register themselves in csrc/<op>/<op>_{cpu,cuda}.*.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(nlpfast, m) {
  // attn_mask: bool or floating, [B or 1, H or 1, L or 1, S or 1]. key_lengths, prefix_lengths: int64 [B].
  // causal: 0 none, 1 top-left (key j <= query i), 2 bottom-right (key j <= query i + S - L).
  // seed: int64 [2] (Philox seed, offset), needed iff dropout_p > 0. Returns out [B, H, L, E], lse [B, H, L] and what
  // rounding took from lse, which backward wants.
  m.def(
      "attention_forward(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? key_lengths, "
      "Tensor? prefix_lengths, Tensor? seed, float dropout_p, int causal, float scale) -> (Tensor, Tensor, Tensor)");
  // Returns dq, dk, dv and, if mask_gradient, the gradient of attn_mask as float32 of its sizes, else [0].
  // pair_gradients: float32 [P, H], added to the gradients of query . key at pairs, int64 [P, 3] of batch entry, query
  // and key.
  m.def(
      "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, "
      "Tensor lse, Tensor lse_low, Tensor? attn_mask, Tensor? key_lengths, Tensor? prefix_lengths, Tensor? seed, "
      "float dropout_p, int causal, float scale, bool mask_gradient, Tensor? pairs, Tensor? pair_gradients) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
  // Packed sequences: [total, H, D], cu_seq: int64 [B + 1]. lse and its companion are [H, total].
  m.def(
      "varlen_attention_forward(Tensor query, Tensor key, Tensor value, Tensor cu_seq_q, Tensor cu_seq_k, int max_q, "
      "int max_k, Tensor? seed, float dropout_p, int causal, float scale) -> (Tensor, Tensor, Tensor)");
  m.def(
      "varlen_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
      "Tensor out, Tensor lse, Tensor lse_low, Tensor cu_seq_q, Tensor cu_seq_k, int max_q, int max_k, Tensor? seed, "
      "float dropout_p, int causal, float scale) -> (Tensor, Tensor, Tensor)");
  // input: [B, T, V] of float32, bfloat16 or float16; target: int64 [B, T]. Returns loss, nll, correct [B, T] and
  // statistics [B, T, 2] (see csrc/cross_entropy/cross_entropy.h).
  m.def(
      "cross_entropy_forward(Tensor input, Tensor target, int ignore_index, int pad_index, float on_target, "
      "float on_other) -> (Tensor, Tensor, Tensor, Tensor)");
  // The same, and writes the gradient for an upstream gradient of grad_scale in every row; it may be the input.
  m.def(
      "cross_entropy_forward_out(Tensor input, Tensor target, int ignore_index, int pad_index, float on_target, "
      "float on_other, float grad_scale, Tensor(a!) gradient) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "cross_entropy_backward(Tensor grad_loss, Tensor input, Tensor target, Tensor statistics, int ignore_index, "
      "int pad_index, float on_target, float on_other) -> Tensor");
  m.def(
      "cross_entropy_backward_out(Tensor grad_loss, Tensor input, Tensor target, Tensor statistics, int ignore_index, "
      "int pad_index, float on_target, float on_other, Tensor(a!) gradient) -> ()");
  // pairs: int64 [P, 3] of batch entry, query and key; heads: int64 [n]. Returns the logarithm of each head's
  // probability at each pair, [P, n].
  m.def(
      "alignment_loss_forward(Tensor query, Tensor key, Tensor lse, Tensor pairs, Tensor heads, float scale) -> "
      "Tensor");
  // Adds the gradients for those of the upstream gradients [P, n] to what is there, where it is given.
  m.def(
      "alignment_loss_backward(Tensor coefficients, Tensor query, Tensor key, Tensor pairs, Tensor heads, float scale, "
      "Tensor(a!)? d_query, Tensor(b!)? d_key, Tensor(c!)? d_lse) -> ()");
}

// What stands between attention, losses and products of a training step.
STABLE_TORCH_LIBRARY_FRAGMENT(nlpfast, m) {
  // x: contiguous; threshold: of 65536, below which 16 random bits drop an element. Its own backward.
  m.def("dropout_forward(Tensor x, Tensor seed, int threshold) -> Tensor");
  m.def("dropout_backward(Tensor grad, Tensor seed, int threshold) -> Tensor");
  // part, residual: contiguous [N, C]; weight, bias: float32 [C]; seed as of attention, needed iff threshold > 0.
  // Returns their sum, its norm in out_dtype, and statistics [N, 2] (see csrc/add_layer_norm/add_layer_norm.h).
  m.def(
      "add_layer_norm_forward(Tensor part, Tensor residual, Tensor weight, Tensor? bias, Tensor? seed, int threshold, "
      "float eps, ScalarType out_dtype) -> (Tensor, Tensor, Tensor)");
  // Returns the gradients of part (in part_dtype), residual, weight and bias; that of part is the residual's if there
  // is no dropout and no other dtype, and then [0].
  m.def(
      "add_layer_norm_backward(Tensor grad_out, Tensor? grad_sum, Tensor sum, Tensor statistics, Tensor weight, "
      "Tensor? seed, int threshold, ScalarType part_dtype) -> (Tensor, Tensor, Tensor, Tensor)");
  // x: contiguous [N, C]; bias: float32 [C]; activation: 0 GELU, 1 GELU by tanh, 2 ReLU; seed and threshold as above.
  // Backward returns the gradients of x and bias.
  m.def("bias_gelu_forward(Tensor x, Tensor? bias, int activation, Tensor? seed, int threshold) -> Tensor");
  m.def(
      "bias_gelu_backward(Tensor grad, Tensor x, Tensor? bias, int activation, Tensor? seed, int threshold) -> "
      "(Tensor, Tensor)");
  // One step with lr / (1 - beta1^t) for rate and lr times the weight decay for decay; all float32, contiguous.
  m.def(
      "adamax_step(Tensor(a!) param, Tensor grad, Tensor(b!) mean, Tensor(c!) size, float beta1, float beta2, "
      "float eps, float rate, float decay) -> ()");
}

// Operations of CUDA devices that differ from those above in what they take: nothing in them waits for the device.
STABLE_TORCH_LIBRARY_FRAGMENT(nlpfast, m) {
  // gradient is written, for the upstream gradient grad_scale (float32, one number) in every row; it may be the input.
  m.def(
      "cuda_cross_entropy_forward(Tensor input, Tensor target, int ignore_index, int pad_index, float on_target, "
      "float on_other, Tensor? grad_scale, Tensor(a!)? gradient) -> (Tensor, Tensor, Tensor, Tensor)");
  // With grad_scale, gradient is already that for an upstream gradient of grad_scale, and is left alone in rows whose
  // own it is; with rescale it is multiplied in the others, as there are no logits any more.
  m.def(
      "cuda_cross_entropy_backward(Tensor grad_loss, Tensor input, Tensor target, Tensor statistics, "
      "Tensor? grad_scale, int ignore_index, int pad_index, float on_target, float on_other, bool rescale, "
      "Tensor(a!) gradient) -> ()");
  // query, key, value: [B, H, rows, D], or packed [total, H, D] with cu_seq: int64 [B + 1]; max_q, max_k: queries and
  // keys of a sequence at most. Returns lse, [B, H, L] or [H, total].
  m.def(
      "cuda_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? key_lengths, Tensor? prefix_lengths, "
      "Tensor? cu_seq_q, Tensor? cu_seq_k, int max_q, int max_k, Tensor? seed, float dropout_p, int causal, float "
      "scale, "
      "Tensor(a!) out) -> Tensor");
  // Writes the gradients; of the forward pass out and lse are needed for more than 128 keys alone. grad_lse: as lse.
  // slopes: gradients [P, n] of scale * query . key in `heads` at pairs, which are by_query and query_begin of
  // cuda_group_pairs.
  m.def(
      "cuda_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
      "Tensor? key_lengths, Tensor? prefix_lengths, Tensor? cu_seq_q, Tensor? cu_seq_k, int max_k, Tensor? seed, "
      "float dropout_p, int causal, float scale, Tensor? out, Tensor? lse, Tensor? slopes, Tensor? pairs, "
      "Tensor? by_query, Tensor? query_begin, "
      "int[] heads, Tensor(a!) d_query, Tensor(b!) d_key, Tensor(c!) d_value) -> ()");
  // pairs: contiguous; lse, coefficients: contiguous float32. A pair outside of batch, queries or keys has NaN.
  m.def(
      "cuda_alignment_loss_forward(Tensor query, Tensor key, Tensor lse, Tensor pairs, int[] heads, float scale) -> "
      "Tensor");
  // Pairs by query and by key, int32: those of row r of all are by_query[query_begin[r]] to before
  // by_query[query_begin[r + 1]], in the order in which they are given. Returns by_query, query_begin, by_key,
  // key_begin.
  m.def("cuda_group_pairs(Tensor pairs, int B, int L, int S) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "cuda_alignment_loss_backward(Tensor coefficients, Tensor query, Tensor key, Tensor pairs, Tensor by_query, "
      "Tensor query_begin, Tensor by_key, Tensor key_begin, int[] heads, float scale, Tensor(a!)? d_query, "
      "Tensor(b!)? d_key, Tensor(c!)? d_lse) -> ()");
  // The most probable key of each query, int64 [B, L].
  m.def(
      "cuda_hard_alignment(Tensor query, Tensor key, Tensor lse, Tensor? source_lengths, int[] heads, float scale) -> "
      "Tensor");
  m.def(
      "cuda_add_layer_norm_forward(Tensor part, Tensor residual, Tensor weight, Tensor? bias, Tensor? seed, "
      "int threshold, float eps, ScalarType out_dtype) -> (Tensor, Tensor, Tensor)");
  // Returns the gradients of part, or [0, C] as above, and residual, and sums [blocks, 2, C] of weight's and bias's.
  m.def(
      "cuda_add_layer_norm_backward(Tensor grad_out, Tensor? grad_sum, Tensor sum, Tensor statistics, Tensor weight, "
      "Tensor? seed, int threshold, ScalarType part_dtype) -> (Tensor, Tensor, Tensor)");
}
