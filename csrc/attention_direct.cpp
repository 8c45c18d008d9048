// Calls of the attention forward that were checked before, past torch's dispatcher: each is a function of Python's.
//
// Python is known by its stable ABI alone, looked up in the process, so one library serves every Python from 3.11 on.
#include <cstdint>
#include <string>
#include <type_traits>
#include <utility>

#include <dlfcn.h>

#include "current_stream.h"
#include "stattn.h"

#define STATTN_PUBLIC extern "C" __attribute__((visibility("default")))

namespace stattn {
namespace {

struct Object;  // PyObject

struct MethodDef {  // PyMethodDef
    const char* name;
    Object* (*call)(Object* self, Object* const* arguments, intptr_t count);
    int flags;
    const char* doc;
};
constexpr int FASTCALL = 0x80;

#define STATTN_FUNCTIONS(X)                                             \
    X(PyCFunction_NewEx, Object*, MethodDef*, Object*, Object*)         \
    X(PyCapsule_New, Object*, void*, const char*, void (*)(Object*))    \
    X(PyCapsule_GetPointer, void*, Object*, const char*)                \
    X(PyErr_Occurred, Object*)                                          \
    X(PyErr_SetString, void, Object*, const char*)                      \
    X(PyEval_RestoreThread, void, void*)                                \
    X(PyEval_SaveThread, void*)                                         \
    X(PyLong_AsUnsignedLongLong, unsigned long long, Object*)           \
    X(PyObject_Call, Object*, Object*, Object*, Object*)                \
    X(PyObject_CallFunctionObjArgs, Object*, Object*, ...)              \
    X(PyObject_IsTrue, int, Object*)                                    \
    X(PyTuple_GetItem, Object*, Object*, intptr_t)                      \
    X(PyTuple_Pack, Object*, intptr_t, ...)                             \
    X(PyTuple_Size, intptr_t, Object*)                                  \
    X(Py_DecRef, void, Object*)                                         \
    X(Py_IncRef, void, Object*)

struct Python {
#define STATTN_MEMBER(name, result, ...) result (*name)(__VA_ARGS__);
    STATTN_FUNCTIONS(STATTN_MEMBER)
#undef STATTN_MEMBER
    Object* none;
    Object** runtime_error;
    bool found;

    Python() {
        found = true;
        const auto find = [this](auto& to, const char* name) {
            to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(dlsym(RTLD_DEFAULT, name));
            found &= to != nullptr;
        };
#define STATTN_FIND(name, result, ...) find(name, #name);
        STATTN_FUNCTIONS(STATTN_FIND)
#undef STATTN_FIND
        find(none, "_Py_NoneStruct");
        find(runtime_error, "PyExc_RuntimeError");
    }
};

const Python& python() {
    static const Python found;
    return found;
}

// Owns a reference; empty where a call of Python's raised.
class Owned {
public:
    explicit Owned(Object* object) : object_(object) {}
    Owned(const Owned&) = delete;
    ~Owned() {
        if (object_) python().Py_DecRef(object_);
    }
    Object* get() const { return object_; }
    explicit operator bool() const { return object_ != nullptr; }

private:
    Object* object_;
};

constexpr const char* CAPSULE = "stattn.attention";

// What makes tensors: a function and its arguments for the output, LSE, and partial sums if there are any.
struct Makers {
    Object *function, *arguments[3];
};

struct Kept {
    AttentionForward call;
    AttentionPlan plan;
    int device;
    bool partial = false;
    Object* objects = nullptr;  // a tuple that holds those that follow
    Object *data_ptr = nullptr, *current_device = nullptr;
    Makers here{}, there{};
};

void release(Kept* kept) {
    if (kept->objects) python().Py_DecRef(kept->objects);
    delete kept;
}

Object* raise(const char* what) {
    python().PyErr_SetString(*python().runtime_error, what);
    return nullptr;
}

// An address that a number of Python's gives. Returns whether it does.
template <typename Pointer>
bool address(Object* number, Pointer* to) {
    const unsigned long long found = number ? python().PyLong_AsUnsignedLongLong(number) : 0;
    *to = reinterpret_cast<Pointer>(found);
    return number != nullptr && (found != ~0ull || python().PyErr_Occurred() == nullptr);
}

template <typename Pointer>
bool data_of(const Kept& kept, Object* tensor, Pointer* to) {
    const Owned number(python().PyObject_CallFunctionObjArgs(kept.data_ptr, tensor, nullptr));
    return address(number.get(), to);
}

// Launches on the device of the call, whichever is current.
cudaError_t launch(const AttentionForward& call, int device, cudaStream_t stream) {
    int current = device;
    cudaError_t error = cudaGetDevice(&current);
    if (error == cudaSuccess && current != device) error = cudaSetDevice(device);
    if (error == cudaSuccess) error = attention_forward(call, stream);
    if (current != device) cudaSetDevice(current);
    return error;
}

// call((where q, k and v begin), valid or None, whether LSE is asked for, whether new memory is to be filled) -> (output,
// LSE or None)
Object* call_kept(Object* self, Object* const* arguments, intptr_t count) {
    const Python& py = python();
    if (count != 4) return raise("stattn.attention: a kept call takes 4 arguments");
    auto* const kept = static_cast<const Kept*>(py.PyCapsule_GetPointer(self, CAPSULE));
    if (!kept) return nullptr;
    AttentionForward call = kept->call;
    AttentionPlan plan = kept->plan;
    if (call.plan) call.plan = &plan;
    for (auto [number, place] : {std::pair{0, &call.q.data}, {1, &call.k.data}, {2, &call.v.data}})
        if (!address(py.PyTuple_GetItem(arguments[0], number), place)) return nullptr;
    plan.valid = nullptr;
    if (arguments[1] != py.none && !data_of(*kept, arguments[1], &plan.valid)) return nullptr;
    const int lse = py.PyObject_IsTrue(arguments[2]), fill = py.PyObject_IsTrue(arguments[3]);
    if (lse < 0 || fill < 0) return nullptr;

    bool here = !fill;
    if (here && kept->current_device != py.none) {
        const Owned current(py.PyObject_CallFunctionObjArgs(kept->current_device, nullptr));
        if (!current) return nullptr;
        const unsigned long long device = py.PyLong_AsUnsignedLongLong(current.get());
        if (py.PyErr_Occurred()) return nullptr;
        here = device == static_cast<unsigned long long>(kept->device);
    }
    const Makers& make = here ? kept->here : kept->there;
    const auto made = [&](int which) { return py.PyObject_Call(make.function, make.arguments[which], nullptr); };
    const Owned out(made(0));
    if (!out || !data_of(*kept, out.get(), &call.out.data)) return nullptr;
    const Owned sums(lse ? made(1) : nullptr);
    if (lse && (!sums || !data_of(*kept, sums.get(), &call.lse))) return nullptr;
    const Owned partial(kept->partial ? made(2) : nullptr);
    if (kept->partial && (!partial || !data_of(*kept, partial.get(), &call.partial))) return nullptr;

    void* stream = nullptr;
    if (!stream_getter() || stream_getter()(kept->device, &stream) != 0)
        return raise("stattn.attention: torch has no current CUDA stream");
    void* const thread = py.PyEval_SaveThread();  // a full queue keeps launches back, but not other threads
    const cudaError_t error = launch(call, kept->device, static_cast<cudaStream_t>(stream));
    py.PyEval_RestoreThread(thread);
    if (error != cudaSuccess) return raise((std::string("stattn.attention: ") + cudaGetErrorString(error)).c_str());
    return py.PyTuple_Pack(2, out.get(), sums ? sums.get() : py.none);
}

MethodDef METHOD = {"attention", call_kept, FASTCALL, "Attention by a call that was checked before."};

void forget(Object* capsule) {
    if (auto* const kept = static_cast<Kept*>(python().PyCapsule_GetPointer(capsule, CAPSULE))) release(kept);
}

bool take_makers(Object* given, int count, Makers* to) {
    const Python& py = python();
    to->function = py.PyTuple_GetItem(given, 0);
    for (int i = 0; i < count; ++i) to->arguments[i] = py.PyTuple_GetItem(given, 1 + i);
    return !py.PyErr_Occurred();
}

}  // namespace

uint64_t attention_keep(const AttentionForward& call, int device) {
    auto* const kept = new Kept{call, {}, device};
    if (call.plan) kept->plan = *call.plan;
    return reinterpret_cast<uint64_t>(kept);
}

STATTN_PUBLIC int stattn_has_python() { return python().found; }

// Gives the function of a call that was kept, and owns the latter from then on. objects: a tuple of Tensor.data_ptr, what
// gives the current device or None if there is but one, the makers of tensors on the current device and on the call's
// (tuples of a function and its arguments), and what is to be held beside.
STATTN_PUBLIC Object* stattn_attention_function(uint64_t number, Object* objects) {
    const Python& py = python();
    auto* const kept = reinterpret_cast<Kept*>(number);
    py.Py_IncRef(objects);
    kept->objects = objects;
    const Owned capsule(py.PyCapsule_New(kept, CAPSULE, forget));
    if (!capsule) {
        release(kept);
        return nullptr;
    }
    kept->data_ptr = py.PyTuple_GetItem(objects, 0);
    kept->current_device = py.PyTuple_GetItem(objects, 1);
    Object* const here = py.PyTuple_GetItem(objects, 2);
    Object* const there = py.PyTuple_GetItem(objects, 3);
    if (!there) return nullptr;
    const int tensors = static_cast<int>(py.PyTuple_Size(here)) - 1;
    kept->partial = tensors == 3;
    if (!take_makers(here, tensors, &kept->here) || !take_makers(there, tensors, &kept->there)) return nullptr;
    return py.PyCFunction_NewEx(&METHOD, capsule.get(), nullptr);
}

}  // namespace stattn
