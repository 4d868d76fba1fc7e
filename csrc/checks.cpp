#include "checks.h"

#include <ATen/DimVector.h>
#include <ATen/EmptyTensor.h>
#include <ATen/TensorSubclassLikeUtils.h>

#include "layout.h"

namespace droppath_ext {
namespace {

bool is_half_precision(at::ScalarType dtype) { return dtype == at::kHalf || dtype == at::kBFloat16; }

// Whether a kernel for x of `dtype` reads this one beside it.
bool is_same_or_wider(at::ScalarType other, at::ScalarType dtype) {
  return other == dtype || (is_half_precision(dtype) && other == at::kFloat);
}

void check_dtype(const at::Tensor& tensor, const char* name) {
  const auto dtype = tensor.scalar_type();
  TORCH_CHECK_TYPE(is_half_precision(dtype) || dtype == at::kFloat || dtype == at::kDouble, name,
                   " must be float16, bfloat16, float32 or float64, but got ", c10::getDtypeNames(dtype).first);
  check_memory(tensor, name);
}

void check_device(const at::Tensor& tensor, const char* name, const at::Tensor& x, const char* x_name = "x") {
  TORCH_CHECK_VALUE(tensor.device() == x.device(), name, " must be on ", x.device(), ", where ", x_name,
                    " is, but got ", tensor.device());
}

// The dtypes and devices of the three.
void check_operands(const at::Tensor& x, const at::Tensor& residual, const std::optional<at::Tensor>& gamma) {
  check_input(x, "x");
  check_input(residual, "residual");
  check_device(residual, "residual", x);
  if (gamma) {
    check_dtype(*gamma, "gamma");
    check_device(*gamma, "gamma", x);
    gamma_dim(x, *gamma);
  }
}

void check_fused_mix(const at::Tensor& x, const at::Tensor& residual, const std::optional<at::Tensor>& gamma,
                     const char* function) {
  TORCH_CHECK_TYPE(is_fused_mix(x, residual, gamma), "no kernel combines x of dtype ", x.scalar_type(),
                   " with residual of dtype ", residual.scalar_type(),
                   gamma ? c10::str(" and gamma of dtype ", gamma->scalar_type()) : "", "; droppath_ext.", function,
                   " does");
}

// Only on the CPU: a GPU would have to be waited for, and its kernels read nothing that is not there.
void check_entries(const at::Tensor& index, int64_t samples) {
  const at::Tensor dense = dense_sources(index);
  const auto* data = dense.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < dense.numel(); ++i) {
    TORCH_CHECK_INDEX(data[i] >= kDropped && data[i] < samples, "an index must be between -1 and ", samples - 1,
                      ", but got ", data[i]);
  }
}

}  // namespace

void check_memory(const at::Tensor& tensor, const char* name) {
  const bool is_plain = (tensor.key_set() & at::kTensorSubclassLike).empty() && tensor.has_storage();
  if (!is_plain || tensor.numel() == 0) {
    return;
  }
  // As usual: nobody shall wait for the loop over the dimensions.
  const size_t needed = tensor.is_contiguous()
                            ? (tensor.storage_offset() + tensor.numel()) * tensor.itemsize()
                            : at::detail::computeStorageNbytes(tensor.sizes(), tensor.strides(), tensor.itemsize(),
                                                               tensor.storage_offset());
  TORCH_CHECK_VALUE(needed <= tensor.storage().nbytes(), name, " must have its ", needed,
                    " bytes of memory, but its storage was resized to ", tensor.storage().nbytes());
}

void check_input(const at::Tensor& x, const char* name) {
  check_dtype(x, name);
  TORCH_CHECK_VALUE(x.dim() > 0, name, " must have at least one dimension, the samples, but got a 0-dim tensor");
}

void check_drop_prob(double drop_prob) {
  TORCH_CHECK_VALUE(drop_prob >= 0.0 && drop_prob <= 1.0, "drop_prob must be in [0, 1], but got ", drop_prob);
}

void check_drawn_from(const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() > 0, "x must have at least one dimension, the samples, but got a 0-dim tensor");
}

void check_rate(const at::Tensor& drop_prob, const at::Tensor& x) {
  TORCH_CHECK_VALUE(drop_prob.dim() == 0, "drop_prob must have no dimension, but got shape ", drop_prob.sym_sizes());
  TORCH_CHECK_TYPE(drop_prob.scalar_type() == at::kFloat || drop_prob.scalar_type() == at::kDouble,
                   "drop_prob must be float32 or float64, but got ", c10::getDtypeNames(drop_prob.scalar_type()).first);
  check_device(drop_prob, "drop_prob", x);
  check_memory(drop_prob, "drop_prob");
}

void check_factor(const std::optional<at::Tensor>& factor, const at::Tensor& sources) {
  if (!factor) {
    return;
  }
  TORCH_CHECK_VALUE(factor->dim() == 0, "factor must have no dimension, but got shape ", factor->sym_sizes());
  TORCH_CHECK_TYPE(factor->scalar_type() == at::kDouble, "factor must be float64, but got ",
                   c10::getDtypeNames(factor->scalar_type()).first);
  check_device(*factor, "factor", sources, "sources");
  check_memory(*factor, "factor");
}

void check_count(const c10::SymInt& count, const c10::SymInt& samples) {
  TORCH_CHECK_VALUE(count >= 1 && count <= samples, "count must be between 1 and the ", samples,
                    " samples of x, but got ", count);
}

void check_samples(int64_t samples) {
  // Beyond that no memory could hold them, and twice their number no int64_t.
  TORCH_CHECK_VALUE(0 <= samples && samples <= INT64_MAX / 2, "size must be a number of samples, but got ", samples);
}

void check_keep(const at::Tensor& keep, int64_t samples) {
  check_samples(samples);
  TORCH_CHECK_TYPE(keep.scalar_type() == at::kBool, "keep must be bool, but got ",
                   c10::getDtypeNames(keep.scalar_type()).first);
  TORCH_CHECK_VALUE(keep.dim() == 1 && (keep.size(0) == samples || keep.size(0) == 1),
                    "keep must have an entry for each of the ", samples, " samples, or one, but got ", keep.sizes());
  check_memory(keep, "keep");
}

void check_sources(const at::Tensor& sources, const at::Tensor& x) {
  const bool is_mask = sources.scalar_type() == at::kBool;
  TORCH_CHECK_TYPE(is_mask || is_index(sources), "sources must be a keep mask, bool, or an index, int64, but got ",
                   c10::getDtypeNames(sources.scalar_type()).first);
  check_device(sources, "sources", x);
  check_memory(sources, "sources");
  const auto& samples = x.sym_size(0);
  TORCH_CHECK_VALUE(
      (is_mask && sources.sym_numel() == 0) ||
          (sources.dim() == 1 && (!is_mask || sources.sym_size(0) == 1 || sources.sym_size(0) == samples)),
      is_mask ? c10::str("a keep mask must have one entry for each of ", samples, " samples, one in all, or none")
              : "an index must have one dimension",
      ", but got shape ", sources.sym_sizes());
  if (!is_mask && sources.is_cpu() && !at::isTensorSubclassLike(sources)) {
    check_entries(sources, x.size(0));
  }
}

void check_add_inputs(const at::Tensor& x, const at::Tensor& residual, const std::optional<at::Tensor>& gamma) {
  check_operands(x, residual, gamma);
  TORCH_CHECK_VALUE(residual.sym_sizes().equals(x.sym_sizes()), "residual must have the shape of x, ", x.sym_sizes(),
                    ", but got ", residual.sym_sizes(), ": expand it first, say by residual.expand_as(x)");
  check_fused_mix(x, residual, gamma, "drop_path_add");
}

void check_add_kept_inputs(const at::Tensor& x, const at::Tensor& residual, const std::optional<at::Tensor>& gamma,
                           const at::Tensor& sources) {
  check_operands(x, residual, gamma);
  check_sources(sources, x);
  const auto& samples = is_index(sources) ? sources.sym_size(0) : x.sym_size(0);
  TORCH_CHECK_VALUE(samples == residual.sym_size(0), "residual must have the ", samples,
                    " samples that sources make of x, but got ", residual.sym_size(0));
  TORCH_CHECK_VALUE(x.sym_sizes().slice(1).equals(residual.sym_sizes().slice(1)),
                    "a sample of x must have the shape of one of residual, ", residual.sym_sizes().slice(1),
                    ", but got ", x.sym_sizes().slice(1));
  check_fused_mix(x, residual, gamma, "stochastic_depth");
}

void check_backward_inputs(const at::Tensor& grad, const std::optional<at::Tensor>& x,
                           const std::optional<at::Tensor>& gamma, const at::Tensor& sources, at::ScalarType dtype,
                           std::array<bool, 2> output_mask) {
  check_input(grad, "grad");
  check_sources(sources, grad);
  at::SymDimVector sizes(grad.sym_sizes());
  if (is_index(sources)) {
    sizes[0] = sources.sym_size(0);
  }
  TORCH_CHECK_TYPE(is_same_or_wider(grad.scalar_type(), dtype), "no kernel reads grad of dtype ", grad.scalar_type(),
                   " for x of dtype ", dtype);
  TORCH_CHECK_VALUE(!output_mask[1] || (x && gamma), "the gradient of gamma needs both x and gamma");
  if (gamma) {
    check_device(*gamma, "gamma", grad, "grad");
    TORCH_CHECK_TYPE(is_same_or_wider(gamma->scalar_type(), dtype), "no kernel reads gamma of dtype ",
                     gamma->scalar_type(), " for x of dtype ", dtype);
    gamma_dim(grad, *gamma);
    check_memory(*gamma, "gamma");
  }
  if (x) {
    check_device(*x, "x", grad, "grad");
    TORCH_CHECK_TYPE(x->scalar_type() == dtype, "x must be of dtype ", dtype, ", but got ", x->scalar_type());
    TORCH_CHECK_VALUE(x->sym_sizes().equals(sizes), "x must have the shape ", c10::SymIntArrayRef(sizes), ", but got ",
                      x->sym_sizes());
    check_memory(*x, "x");
  }
}

bool is_fused_mix(const at::Tensor& x, const at::Tensor& residual, const std::optional<at::Tensor>& gamma) {
  const auto dtype = x.scalar_type();
  return is_same_or_wider(residual.scalar_type(), dtype) &&
         (!gamma || (is_same_or_wider(gamma->scalar_type(), dtype) &&
                     // One without dimensions may be wider than the result.
                     c10::promoteTypes(residual.scalar_type(), gamma->scalar_type()) == add_dtype(x, residual, gamma)));
}

}  // namespace droppath_ext
