// Instead of CUDA's own, which brings the launches that cuda_on_host.h has.
#pragma once
#include <cuda_runtime_api.h>
