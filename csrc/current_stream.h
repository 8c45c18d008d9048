// The current CUDA stream of torch. Its getter lives in libtorch_cuda, which a CPU build of torch does not have: naming
// it would keep this library from loading there. A torch that made a CUDA tensor has loaded it, so the process has it.
#pragma once

#include <cstdint>

#include <cuda_runtime_api.h>
#include <dlfcn.h>

namespace stattn {

using StreamGetter = int32_t (*)(int32_t device, void** stream);  // returns 0 where it found one

inline StreamGetter stream_getter() {
    static const StreamGetter getter = [] {
        void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
        return library ? reinterpret_cast<StreamGetter>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
    }();
    return getter;
}

}  // namespace stattn
