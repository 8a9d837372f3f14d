// What ggml's CPU backend and our kernels say to each other: the layouts of its traits.h, ggml-cpu-impl.h and
// ggml-backend-impl.h, which are not installed. engine/kernels/__init__.py sees to it that the versions agree.

#pragma once

#include <ggml.h>
#include <ggml-backend.h>

#include <cstddef>

struct ggml_threadpool;

struct ggml_compute_params {
    int ith, nth;
    size_t wsize;
    void * wdata;
    ggml_threadpool * threadpool;
    bool use_ref;
};

namespace ggml::cpu {
struct tensor_traits {
    virtual ~tensor_traits() {}
    virtual bool work_size(int n_threads, const ggml_tensor * op, size_t & size) = 0;
    virtual bool compute_forward(ggml_compute_params * params, ggml_tensor * op) = 0;
};

struct extra_buffer_type {
    virtual ~extra_buffer_type() {}
    virtual bool supports_op(void * device, const ggml_tensor * op) = 0;
    virtual tensor_traits * get_tensor_traits(const ggml_tensor * op) = 0;
};
}  // namespace ggml::cpu

// ggml's own functions, given to kernels_install().
struct Ggml {
    void (*barrier)(ggml_threadpool *);            // all threads of a call wait for each other
    void (*chunk_set)(ggml_threadpool *, int);     // they share out work: where the counter stands
    int (*chunk_add)(ggml_threadpool *, int);      // its value before so much was added
    const char * (*buffer_name)(ggml_backend_buffer_t);
    bool (*is_host)(ggml_backend_buffer_t);        // its tensors lie there as they are in a file
};
extern Ggml ggml_functions;

// A kernel for an operation, or null: then ggml takes its own.
ggml::cpu::tensor_traits * attention_for(const ggml_tensor * op);
ggml::cpu::tensor_traits * matmul_for(const ggml_tensor * op);
