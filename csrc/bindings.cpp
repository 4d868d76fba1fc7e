// The Python module: eager entry points that skip torch.ops' schema matching, and what the binary was built with.
#include <ATen/ops/empty.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#ifdef DROPPATH_EXT_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

#include <cstring>

#include "checks.h"
#include "draws.h"
#include "layout.h"
#include "ops.h"

namespace droppath_ext {

// _native.py greps this from a .so that fails to load. Mutable and extern: gcc would split a constant into immediates.
extern char built_with[];
char built_with[] = "droppath_ext built with torch " DROPPATH_EXT_TORCH_VERSION;

}  // namespace droppath_ext

namespace {

#ifdef DROPPATH_EXT_WITH_CUDA
constexpr bool kHasCuda = true;
#else
constexpr bool kHasCuda = false;
#endif

bool has_kernels(const at::Tensor& x) { return x.is_cpu() || (kHasCuda && x.is_cuda()); }

// Whether the kernels serve x, here and now: plain strided CPU and CUDA tensors. The C++ autograd functions know
// neither the transforms of torch.func nor forward-mode AD; subclasses and other devices have semantics of their own;
// what torch.jit.trace records shall be ATen's ops, which run where this package is missing. A tensor of a transform
// that has ended gets ATen's sentence.
bool uses_fused_path(py::handle x) {
  constexpr c10::DispatchKeySet kRecorded{c10::DispatchKey::FuncTorchDynamicLayerFrontMode, c10::DispatchKey::Tracer};
  if (!THPVariable_CheckExact(x.ptr()) || c10::impl::tls_local_dispatch_key_set().included_.has_any(kRecorded)) {
    return false;
  }
  const at::Tensor& tensor = THPVariable_Unpack(x.ptr());
  constexpr c10::DispatchKeySet kTransformed{c10::DispatchKey::FuncTorchBatched,
                                             c10::DispatchKey::FuncTorchGradWrapper};
  return tensor.layout() == at::kStrided && !tensor.key_set().has_any(kTransformed) && !tensor.is_nested() &&
         !tensor.is_quantized() && has_kernels(tensor) && !tensor._fw_grad(/*level=*/0).defined();
}

// Nothing where the composite path has to serve x: the check costs less inside this call than one of its own.
std::optional<at::Tensor> drop_path(py::handle x, double drop_prob, bool scale_by_keep, bool per_sample,
                                    const std::optional<at::Generator>& generator) {
  if (!uses_fused_path(x)) {
    return std::nullopt;
  }
  const at::Tensor& tensor = THPVariable_Unpack(x.ptr());
  py::gil_scoped_release no_gil;
  return std::get<0>(droppath_ext::drop_path(tensor, drop_prob, scale_by_keep, per_sample, generator));
}

struct Operands {
  const at::Tensor& x;
  const at::Tensor& residual;
  std::optional<at::Tensor> gamma;
};

// What residual + gamma * x is made of, or nothing where the composite path has to serve it.
std::optional<Operands> fused_operands(py::handle x, py::handle residual, py::handle gamma) {
  if (!uses_fused_path(x) || !uses_fused_path(residual) || !(gamma.is_none() || uses_fused_path(gamma))) {
    return std::nullopt;
  }
  Operands operands{THPVariable_Unpack(x.ptr()), THPVariable_Unpack(residual.ptr()), std::nullopt};
  if (!gamma.is_none()) {
    operands.gamma = THPVariable_Unpack(gamma.ptr());
  }
  if (!droppath_ext::is_fused_mix(operands.x, operands.residual, operands.gamma)) {
    return std::nullopt;
  }
  return operands;
}

std::optional<at::Tensor> drop_path_add(py::handle x, py::handle residual, py::handle gamma, double drop_prob,
                                        bool scale_by_keep, bool per_sample,
                                        const std::optional<at::Generator>& generator) {
  const auto operands = fused_operands(x, residual, gamma);
  if (!operands) {
    return std::nullopt;
  }
  py::gil_scoped_release no_gil;
  return std::get<0>(droppath_ext::drop_path_add(operands->x, operands->residual, operands->gamma, drop_prob,
                                                 scale_by_keep, per_sample, generator));
}

// The gathered samples, and x for whatever else is computed from it.
std::optional<std::tuple<at::Tensor, at::Tensor>> gather(py::handle x, const at::Tensor& index,
                                                         const at::Tensor& inverse) {
  if (!uses_fused_path(x)) {
    return std::nullopt;
  }
  const at::Tensor& tensor = THPVariable_Unpack(x.ptr());
  py::gil_scoped_release no_gil;
  return droppath_ext::gather_with_x(tensor, index, inverse);
}

// Without slots and kept, y has all samples.
std::optional<at::Tensor> scatter_add(py::handle y, py::handle residual, py::handle gamma,
                                      const std::optional<at::Tensor>& slots, const std::optional<at::Tensor>& kept,
                                      double scale, const std::optional<at::Tensor>& factor) {
  const auto operands = fused_operands(y, residual, gamma);
  if (!operands) {
    return std::nullopt;
  }
  py::gil_scoped_release no_gil;
  const auto sources = [&](const std::optional<at::Tensor>& index) {
    return index ? *index : droppath_ext::allocate({0}, at::kBool, operands->x);
  };
  return droppath_ext::scatter_add(operands->x, operands->residual, operands->gamma, sources(slots), sources(kept),
                                   scale, factor);
}

struct WithoutTransforms : c10::impl::ExcludeDispatchKeyGuard {
  WithoutTransforms()
      : ExcludeDispatchKeyGuard(c10::DispatchKeySet{c10::DispatchKey::FuncTorchDynamicLayerFrontMode,
                                                    c10::DispatchKey::FuncTorchDynamicLayerBackMode}) {}
};

// What is drawn knows of x only how many samples it has, and where: it is what it is at every level of torch.func.
template <typename F>
auto draw_for(const at::Tensor& x, const F& draw) {
  py::gil_scoped_release no_gil;
  const WithoutTransforms guard;
  return draw(at::empty_symint({x.sym_size(0)}, at::TensorOptions().dtype(at::kFloat).device(x.device())));
}

// The mask that drop_path would draw for x, where the composite path serves it; nothing where there is no kernel.
std::optional<at::Tensor> draw_keep(const at::Tensor& x, double drop_prob, bool per_sample,
                                    const std::optional<at::Generator>& generator) {
  if (!has_kernels(x)) {
    return std::nullopt;
  }
  return draw_for(x, [&](const at::Tensor& samples) {
    return std::get<1>(droppath_ext::drop_path(samples, drop_prob, /*scale_by_keep=*/false, per_sample, generator));
  });
}

// The same at a rate that only the device knows, and the scale that goes with it.
std::optional<std::tuple<at::Tensor, at::Tensor>> draw_keep_at(const at::Tensor& x, const at::Tensor& drop_prob,
                                                               bool scale_by_keep, bool per_sample,
                                                               const std::optional<at::Generator>& generator) {
  if (!has_kernels(x)) {
    return std::nullopt;
  }
  return draw_for(x, [&](const at::Tensor& samples) {
    return droppath_ext::draw_keep(samples, drop_prob, scale_by_keep, per_sample, generator);
  });
}

// x where it is kept, times scale.
std::optional<at::Tensor> scale_kept(py::handle x, py::handle keep, double scale,
                                     const std::optional<at::Tensor>& factor) {
  if (!uses_fused_path(x) || !uses_fused_path(keep)) {
    return std::nullopt;
  }
  const at::Tensor& tensor = THPVariable_Unpack(x.ptr());
  const at::Tensor& mask = THPVariable_Unpack(keep.ptr());
  py::gil_scoped_release no_gil;
  return droppath_ext::scale_kept_by_mask(tensor, mask, scale, factor);
}

std::tuple<at::Tensor, at::Tensor, int64_t> draw_bernoulli(int64_t size, double drop_prob, at::Device device,
                                                           const std::optional<at::Generator>& generator,
                                                           bool per_sample) {
  droppath_ext::check_samples(size);
  droppath_ext::check_drop_prob(drop_prob);
  py::gil_scoped_release no_gil;
  return droppath_ext::draw_bernoulli(size, drop_prob, device, generator, per_sample);
}

std::tuple<at::Tensor, at::Tensor, int64_t> index_kept(const at::Tensor& keep, int64_t size, at::Device device) {
  py::gil_scoped_release no_gil;
  const WithoutTransforms guard;
  droppath_ext::check_keep(keep, size);
  return droppath_ext::index_kept(keep.cpu().contiguous(), size, device);
}

std::optional<std::tuple<at::Tensor, at::Tensor>> draw_fixed(py::handle x, int64_t count,
                                                             const std::optional<at::Generator>& generator) {
  if (!uses_fused_path(x)) {
    return std::nullopt;
  }
  const at::Tensor& tensor = THPVariable_Unpack(x.ptr());
  py::gil_scoped_release no_gil;
  return droppath_ext::draw_fixed(tensor, count, generator);
}

// What draw_fixed would draw for x, where the composite path serves it; nothing where there is no kernel.
std::optional<std::tuple<at::Tensor, at::Tensor>> draw_fixed_for(const at::Tensor& x, int64_t count,
                                                                 const std::optional<at::Generator>& generator) {
  if (!has_kernels(x)) {
    return std::nullopt;
  }
  return draw_for(x, [&](const at::Tensor& samples) { return droppath_ext::draw_fixed(samples, count, generator); });
}

// What drop_path and draw_fixed draw with this state of the generator.
at::Tensor keep_mask(uint64_t seed, uint64_t offset, int64_t size, double drop_prob) {
  droppath_ext::check_drop_prob(drop_prob);
  at::Tensor keep = at::empty({size}, at::kBool);
  droppath_ext::draw_keep_mask(keep, seed, offset, drop_prob);
  return keep;
}

at::Tensor fixed_slots(uint64_t seed, uint64_t offset, int64_t size, int64_t count) {
  droppath_ext::check_count(count, size);
  at::Tensor slots = at::empty({size}, at::kLong);
  droppath_ext::draw_fixed(slots, at::empty({count}, at::kLong), seed, offset);
  return slots;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("has_cuda") = kHasCuda;
  m.attr("torch_version") = std::strrchr(droppath_ext::built_with, ' ') + 1;
#ifdef DROPPATH_EXT_WITH_CUDA
  m.attr("cuda_version") = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION / 10 % 100);
  m.attr("cuda_archs") = DROPPATH_EXT_CUDA_ARCHS;
#else
  m.attr("cuda_version") = py::none();
  m.attr("cuda_archs") = py::none();
#endif

  m.def("uses_fused_path", &uses_fused_path, py::arg("x"));
  m.def("drop_path", &drop_path, py::arg("x"), py::arg("drop_prob"), py::arg("scale_by_keep"), py::arg("per_sample"),
        py::arg("generator") = py::none());
  m.def("drop_path_add", &drop_path_add, py::arg("x"), py::arg("residual"), py::arg("gamma"), py::arg("drop_prob"),
        py::arg("scale_by_keep"), py::arg("per_sample"), py::arg("generator") = py::none());
  m.def("draw_keep", &draw_keep, py::arg("x"), py::arg("drop_prob"), py::arg("per_sample"),
        py::arg("generator") = py::none());
  m.def("draw_keep_at", &draw_keep_at, py::arg("x"), py::arg("drop_prob"), py::arg("scale_by_keep"),
        py::arg("per_sample"), py::arg("generator") = py::none());
  m.def("scale_kept", &scale_kept, py::arg("x"), py::arg("keep"), py::arg("scale"), py::arg("factor") = py::none());
  m.def("index_kept", &index_kept, py::arg("keep"), py::arg("size"), py::arg("device"));
  m.def("gather", &gather, py::arg("x"), py::arg("index"), py::arg("inverse"));
  m.def("scatter_add", &scatter_add, py::arg("y"), py::arg("residual"), py::arg("gamma"), py::arg("slots"),
        py::arg("kept"), py::arg("scale"), py::arg("factor") = py::none());
  m.def("add_kept_", &droppath_ext::add_kept_, py::arg("residual"), py::arg("x"), py::arg("slots"));
  m.def("draw_bernoulli", &draw_bernoulli, py::arg("size"), py::arg("drop_prob"), py::arg("device"),
        py::arg("generator") = py::none(), py::arg("per_sample") = true);
  m.def("draw_fixed", &draw_fixed, py::arg("x"), py::arg("count"), py::arg("generator") = py::none());
  m.def("draw_fixed_for", &draw_fixed_for, py::arg("x"), py::arg("count"), py::arg("generator") = py::none());
  m.def("fixed_slots", &fixed_slots, py::arg("seed"), py::arg("offset"), py::arg("size"), py::arg("count"));
  m.def("keep_mask", &keep_mask, py::arg("seed"), py::arg("offset"), py::arg("size"), py::arg("drop_prob"));
}
