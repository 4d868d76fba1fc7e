#pragma once
#define C10_CUDA_CHECK(call) static_cast<void>(call)
