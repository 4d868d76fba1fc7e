// The CUDA kernels, compiled for the host, in the place of the CPU's; and what tests ask of them.
#include <ATen/ops/empty.h>
#include <link.h>
#include <torch/library.h>

#include "cuda_on_host.h"

#include "csrc/backend.h"

// What is entered for DeviceType::CUDA is entered for the CPU.
#define CUDA CPU
#include "csrc/cuda/add_kept.cu"
#include "csrc/cuda/draws.cu"
#include "csrc/cuda/gamma_grad.cu"
#undef CUDA

#include "index_functions.h"
#include "tiny_kernels.h"

namespace cuda_on_host {

std::pair<char*, size_t> shared_memory() {
  static thread_local volatile char touched;
  touched = 0;  // a thread has no such memory before it needs it
  std::pair<char*, size_t> found;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t /*bytes*/, void* result) {
        size_t tls_bytes = 0;
        bool is_this_library = false;
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& segment = info->dlpi_phdr[i];
          tls_bytes = segment.p_type == PT_TLS ? segment.p_memsz : tls_bytes;
          const uintptr_t offset = reinterpret_cast<uintptr_t>(&shared_memory) - (info->dlpi_addr + segment.p_vaddr);
          is_this_library = is_this_library || (segment.p_type == PT_LOAD && offset < segment.p_memsz);
        }
        if (is_this_library) {
          *static_cast<std::pair<char*, size_t>*>(result) = {static_cast<char*>(info->dlpi_tls_data), tls_bytes};
        }
        return static_cast<int>(is_this_library);
      },
      &found);
  return found;
}

}  // namespace cuda_on_host

namespace {

using cuda_on_host::settings;

void configure(int64_t multiprocessors, bool reversed, int64_t shared_pattern) {
  settings.multiprocessors = static_cast<int>(multiprocessors);
  settings.reversed = reversed;
  settings.shared_pattern = static_cast<int>(shared_pattern);
}

void run_blocks(int64_t first, int64_t last) {
  settings.first_block = first;
  settings.last_block = last;
}

}  // namespace

TORCH_LIBRARY(cuda_on_host, m) {
  m.def("configure(int multiprocessors, bool reversed, int shared_pattern) -> ()", &configure);
  m.def("run_blocks(int first, int last) -> ()", &run_blocks);
  m.def("record_stores(bool records) -> ()", &cuda_on_host::record_stores);
  m.def("recorded_stores() -> int[]", &cuda_on_host::recorded_stores);
}
