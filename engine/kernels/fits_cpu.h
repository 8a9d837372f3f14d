#pragma once

// Whether this CPU has what the compiler was allowed to use, of what it may use by itself.
inline bool fits_cpu() {
#define NEED(feature) if (!__builtin_cpu_supports(feature)) return false
#if defined(__AVX512F__)
    NEED("avx512f");
#endif
#if defined(__AVX512BW__)
    NEED("avx512bw");
#endif
#if defined(__AVX512DQ__)
    NEED("avx512dq");
#endif
#if defined(__AVX512VL__)
    NEED("avx512vl");
#endif
#if defined(__AVX512VNNI__)
    NEED("avx512vnni");
#endif
#if defined(__AVX512VBMI__)
    NEED("avx512vbmi");
#endif
#if defined(__AVX512VBMI2__)
    NEED("avx512vbmi2");
#endif
#if defined(__AVX512BITALG__)
    NEED("avx512bitalg");
#endif
#if defined(__AVX512VPOPCNTDQ__)
    NEED("avx512vpopcntdq");
#endif
#if defined(__AVX512FP16__)
    NEED("avx512fp16");
#endif
#if defined(__AVX2__)
    NEED("avx2");
#endif
#if defined(__FMA__)
    NEED("fma");
#endif
#if defined(__BMI2__)
    NEED("bmi2");
#endif
#undef NEED
    return true;
}
