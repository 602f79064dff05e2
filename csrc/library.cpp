// Every operation of nlpfast and its schema. Kernels register themselves in csrc/<op>/<op>_{cpu,cuda}.*.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(nlpfast, m) {
  // causal: 0 none, 1 top-left (key j <= query i), 2 bottom-right (key j <= query i + S - L).
  // seed: int64 [2] (Philox seed, offset), needed iff dropout_p > 0. Returns out [B, H, L, E], lse [B, H, L] and what
  // rounding took from lse, which backward wants.
  m.def(
      "attention_forward(Tensor query, Tensor key, Tensor value, Tensor? key_lengths, Tensor? seed, "
      "float dropout_p, int causal, float scale) -> (Tensor, Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, "
      "Tensor lse, Tensor lse_low, Tensor? key_lengths, Tensor? seed, float dropout_p, int causal, float scale) "
      "-> (Tensor, Tensor, Tensor)");
}
