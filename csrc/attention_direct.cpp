// Calls of the attention forward that were checked before, for Python to make by ctypes, past torch's dispatcher.
#include <cstdint>
#include <cstring>

#include "stattn.h"

#define STATTN_PUBLIC extern "C" __attribute__((visibility("default")))

namespace stattn {
namespace {

struct Kept {
    AttentionForward call;
    AttentionPlan plan;
    int device;
};

// What a call says: 8 bytes each, the last three addresses may be null.
struct Numbers {
    const Kept* kept;
    const void *q, *k, *v, *out;
    float* lse;
    const uint8_t* valid;
    float* partial;
    cudaStream_t stream;
};
static_assert(sizeof(Numbers) == 72);

cudaError_t run(const Numbers& numbers) {
    AttentionForward call = numbers.kept->call;
    AttentionPlan plan = numbers.kept->plan;
    if (call.plan) call.plan = &plan;
    plan.valid = numbers.valid;
    call.q.data = numbers.q, call.k.data = numbers.k, call.v.data = numbers.v, call.out.data = numbers.out;
    call.lse = numbers.lse, call.partial = numbers.partial;
    return attention_forward(call, numbers.stream);
}

}  // namespace

uint64_t attention_keep(const AttentionForward& call, int device) {
    auto* const kept = new Kept{call, {}, device};
    if (call.plan) kept->plan = *call.plan;
    return reinterpret_cast<uint64_t>(kept);
}

STATTN_PUBLIC int stattn_attention(const char* packed) {
    Numbers numbers;
    std::memcpy(&numbers, packed, sizeof numbers);
    const int device = numbers.kept->device;
    int current = device;
    cudaError_t error = cudaGetDevice(&current);
    if (error == cudaSuccess && current != device) error = cudaSetDevice(device);
    if (error == cudaSuccess) error = run(numbers);
    if (current != device) cudaSetDevice(current);
    return error;
}

STATTN_PUBLIC void stattn_attention_forget(uint64_t kept) { delete reinterpret_cast<Kept*>(kept); }

STATTN_PUBLIC const char* stattn_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace stattn
