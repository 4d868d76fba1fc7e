// The native ops: the table of contents. Each stands in ops.cpp once, for all devices; derivatives are in autograd.cpp.
#include <torch/library.h>

TORCH_LIBRARY(droppath_ext, m) {
  // Draws a keep mask: one entry for each sample, or one in all.
  m.def(
      "drop_path(Tensor x, float drop_prob, bool scale_by_keep, bool per_sample, Generator? generator=None)"
      " -> (Tensor out, Tensor keep)",
      {at::Tag::nondeterministic_seeded});
  // residual + drop_path(gamma * x). keep has no entries if drop_prob is 0: there is no mask then.
  m.def(
      "drop_path_add(Tensor x, Tensor residual, Tensor? gamma, float drop_prob, bool scale_by_keep, bool per_sample,"
      " Generator? generator=None) -> (Tensor out, Tensor keep)",
      {at::Tag::nondeterministic_seeded});
  // A subset of `count` samples of x, of which only the number of samples and the device matter: for each sample its
  // place among the kept ones, or -1; and the kept ones in ascending order.
  m.def("draw_fixed(Tensor x, SymInt count, Generator? generator=None) -> (Tensor slots, Tensor kept)",
        {at::Tag::nondeterministic_seeded});

  // The mask that drop_path draws, at a rate that only the device knows, float32 or float64 [], clamped to [0, 1]; and
  // the scale that goes with it, float64 [], 1 if it is not asked for.
  m.def(
      "draw_keep(Tensor x, Tensor drop_prob, bool scale_by_keep, bool per_sample, Generator? generator=None)"
      " -> (Tensor keep, Tensor factor)",
      {at::Tag::nondeterministic_seeded});

  // The passes of which the others and their gradients consist. `sources` names a sample of the input for each sample
  // of the output: by a keep mask, bool, which names the same one or none (no entries keep every sample, one entry
  // serves them all); or by an index, int64, with an entry for each sample of the output, -1 for none. The scale is
  // multiplied by factor, float64 [], if there is one.

  // out[b] = x[source] * scale; zeros where there is no source.
  m.def("scale_kept(Tensor x, Tensor sources, float scale, Tensor? factor=None) -> Tensor");
  // out[b] = residual[b] + gamma * x[source] * scale; residual[b] where there is no source.
  m.def(
      "add_kept(Tensor x, Tensor residual, Tensor? gamma, Tensor sources, float scale, Tensor? factor=None)"
      " -> Tensor");
  // The gradients of x and gamma. `sources` names for each sample of x the sample of grad that it went into. x is read
  // for the gradient of gamma alone; dtype is that of x. What output_mask does not ask for comes back empty.
  m.def(
      "add_kept_backward(Tensor grad, Tensor? x, Tensor? gamma, Tensor sources, float scale, ScalarType dtype,"
      " bool[2] output_mask, Tensor? factor=None) -> (Tensor grad_x, Tensor grad_gamma)");
}
