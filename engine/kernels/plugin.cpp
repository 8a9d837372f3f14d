// How our kernels get called. ggml's CPU backend asks a list of "extra buffer types" for a kernel of their own
// before it takes its own (traits.h there); its repacked weights work so. kernels_install() puts one more such
// type at the head of the list, which holds no buffers and only answers.

#include "fits_cpu.h"
#include "plugin.h"

#include <vector>

Ggml ggml_functions;

namespace {

struct BufferType {
    const char * (*get_name)(BufferType *);
    void * (*alloc_buffer)(BufferType *, size_t);
    size_t (*get_alignment)(BufferType *);
    size_t (*get_max_size)(BufferType *);
    size_t (*get_alloc_size)(BufferType *, const ggml_tensor *);
    bool (*is_host)(BufferType *);
    void * device;
    void * context;
};

struct Answers : ggml::cpu::extra_buffer_type {
    bool supports_op(void *, const ggml_tensor *) override { return false; }  // no tensor lies in a buffer of it

    ggml::cpu::tensor_traits * get_tensor_traits(const ggml_tensor * op) override {
        switch (op->op) {
            case GGML_OP_FLASH_ATTN_EXT: return attention_for(op);
            case GGML_OP_MUL_MAT: return matmul_for(op);
            default: return nullptr;
        }
    }
};

Answers answers;
BufferType type = {};

}  // namespace

extern "C" {

// Before the first context computes, once a process.
void kernels_install(std::vector<void *> & (*extra_buffer_types)(), const Ggml * functions) {
    ggml_functions = *functions;
    type.get_name = [](BufferType *) { return "lq"; };
    type.context = &answers;
    auto & types = extra_buffer_types();
    types.insert(types.begin(), &type);
}

// The llama-cpp-python whose headers and private layouts this was compiled with.
const char * kernels_version() { return LLAMA_VERSION; }

bool kernels_fit_cpu() { return fits_cpu(); }
}
