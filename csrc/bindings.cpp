// The one file that names torch: schemas, checks, and the way from a tensor to a raw pointer and a stream.
//
// Only PyTorch's stable ABI is used, so one library serves every Python and every torch from 2.11 on, CPU builds too.
#include <cstdint>
#include <cstring>

#include <dlfcn.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "stattn.h"

namespace {

using torch::stable::Tensor;

// The current CUDA stream of torch. Its getter lives in libtorch_cuda, which a CPU build of torch does not have: naming
// it would keep this library from loading there. A torch that made a CUDA tensor has loaded it, so the process has it.
cudaStream_t current_stream(int32_t device) {
    using Getter = AOTITorchError (*)(int32_t, void**);
    static const Getter getter = [] {
        void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
        return library ? reinterpret_cast<Getter>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
    }();
    STD_TORCH_CHECK(getter != nullptr, "stattn: no aoti_torch_get_current_cuda_stream in a loaded libtorch_cuda.so");
    void* stream = nullptr;
    STD_TORCH_CHECK(getter(device, &stream) == AOTI_TORCH_SUCCESS, "stattn: no current stream on device ", device);
    return static_cast<cudaStream_t>(stream);
}

void check_launch(cudaError_t error, const char* op) {
    STD_TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
}

// Returns the number of bytes to copy.
int64_t check_copy(const Tensor& src, const Tensor& dst) {
    STD_TORCH_CHECK(src.is_cuda() == dst.is_cuda() && src.get_device_index() == dst.get_device_index(),
                    "stattn::copy_bytes: src and dst are on different devices");
    STD_TORCH_CHECK(src.is_contiguous(), "stattn::copy_bytes: src must be contiguous");
    STD_TORCH_CHECK(dst.is_contiguous(), "stattn::copy_bytes: dst must be contiguous");
    const int64_t bytes = src.numel() * static_cast<int64_t>(src.element_size());
    const int64_t room = dst.numel() * static_cast<int64_t>(dst.element_size());
    STD_TORCH_CHECK(bytes == room, "stattn::copy_bytes: src has ", bytes, " bytes and dst ", room);
    const auto from = reinterpret_cast<uintptr_t>(src.const_data_ptr());
    const auto to = reinterpret_cast<uintptr_t>(dst.const_data_ptr());
    const bool apart = from + static_cast<uintptr_t>(bytes) <= to || to + static_cast<uintptr_t>(bytes) <= from;
    STD_TORCH_CHECK(bytes == 0 || apart, "stattn::copy_bytes: src and dst overlap");
    return bytes;
}

void copy_bytes_cpu(Tensor src, Tensor dst) {
    const int64_t bytes = check_copy(src, dst);
    if (bytes > 0) std::memcpy(dst.mutable_data_ptr(), src.const_data_ptr(), static_cast<size_t>(bytes));
}

void copy_bytes_cuda(Tensor src, Tensor dst) {
    const int64_t bytes = check_copy(src, dst);
    const int32_t device = src.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    const cudaStream_t stream = current_stream(device);
    check_launch(stattn::copy_bytes(src.const_data_ptr(), dst.mutable_data_ptr(), bytes, stream), "stattn::copy_bytes");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(stattn, m) {
    m.def("copy_bytes(Tensor src, Tensor(a!) dst) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(stattn, CPU, m) {
    m.impl("copy_bytes", TORCH_BOX(&copy_bytes_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(stattn, CUDA, m) {
    m.impl("copy_bytes", TORCH_BOX(&copy_bytes_cuda));
}
