/* Vectors of 16 floats in GCC's vector extension: the compiler splits them where the machine's are shorter. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <omp.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define LANES 16
/* Loops over registers must vanish before the compiler decides what lives in memory. */
#define UNROLL _Pragma("GCC unroll 8")
#define INLINE static inline __attribute__((always_inline))
#define RARE static __attribute__((noinline, unused))
#define EXPORT __attribute__((visibility("default")))

/* One library for one type of activations: PD_DTYPE is 0 for float32, 1 for bfloat16, 2 for float16. */
#define F32 0
#define BF16 1
#define F16 2
#if PD_DTYPE == F32
#define XT float
#define X f32
#elif PD_DTYPE == BF16
#define XT bf16
#define X bf16
#else
#define XT f16
#define X f16
#endif
#define GLUE_(a, b) a##b
#define GLUE(a, b) GLUE_(a, b)
#define XLOAD GLUE(load_, X)
#define XLOAD_N GLUE(GLUE(load_, X), _n)
#define XSTORE GLUE(store_, X)
#define XSTORE_N GLUE(GLUE(store_, X), _n)

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));
#if PD_DTYPE == 2
typedef _Float16 f16;
#endif
typedef uint16_t bf16;

INLINE int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE vf splat(float value) { return value - (vf){0}; }

INLINE vf load_f32(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE vf load_bf16(const bf16 *p) {
    vh h;
    memcpy(&h, p, sizeof h);
    return (vf)(__builtin_convertvector(h, vu) << 16);
}
#if PD_DTYPE == F16
#ifdef __AVX512F__
INLINE vf load_f16(const f16 *p) { return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
INLINE void store_f16(f16 *p, vf v) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
INLINE vf load_f16(const f16 *p) {
    vf v;
    for (int i = 0; i < LANES; i++) v[i] = p[i];
    return v;
}
INLINE void store_f16(f16 *p, vf v) {
    for (int i = 0; i < LANES; i++) p[i] = v[i];
}
#endif
#endif

/* 32 bf16 values as their even and odd elements: half the work of widening them in order. */
INLINE void load_bf16_split(const bf16 *p, vf *even, vf *odd) {
    vu both;
    memcpy(&both, p, sizeof both);
    *even = (vf)(both << 16);
    *odd = (vf)(both & 0xffff0000);
}
/* The nearest bf16 (ties to even) in the lower half of each element; a NaN stays one. */
#ifdef __AVX512BF16__
INLINE vf dot_pairs(vf sum, vf a, vf b) { return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
INLINE vu round_bf16(vf v) { return (vu)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)v)); }
#else
INLINE vu round_bf16(vf v) {
    vu bits = (vu)v, nan = (vu)((vi)(bits & 0x7fffffff) > 0x7f800000);
    return (((bits + 0x7fff + ((bits >> 16) & 1)) & ~nan) | (nan & 0x7fc00000)) >> 16;
}
#endif
INLINE void store_bf16_split(bf16 *p, vf even, vf odd) {
    vu both = round_bf16(even) | round_bf16(odd) << 16;
    memcpy(p, &both, sizeof both);
}

INLINE void store_f32(float *p, vf v) { memcpy(p, &v, sizeof v); }
INLINE void store_bf16(bf16 *p, vf v) {
    vh h = __builtin_convertvector(round_bf16(v), vh);
    memcpy(p, &h, sizeof h);
}

/* The first n of 16 elements; the others read as zero and are not written. */
#define PARTIAL(NAME, T)                                                        \
    RARE vf load_##NAME##_n(const T *p, int64_t n) {                            \
        T whole[LANES] = {0};                                                   \
        memcpy(whole, p, n * sizeof(T));                                        \
        return load_##NAME(whole);                                              \
    }                                                                           \
    RARE void store_##NAME##_n(T *p, vf v, int64_t n) {                         \
        T whole[LANES];                                                         \
        store_##NAME(whole, v);                                                 \
        memcpy(p, whole, n * sizeof(T));                                        \
    }
PARTIAL(f32, float)
PARTIAL(bf16, bf16)
#if PD_DTYPE == F16
PARTIAL(f16, f16)
#endif

/* The vector with its lanes exchanged in groups of S: after S = 8, 4, 2, 1 every lane has met every other. */
#define LANE_NUMBERS ((vi){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15})
#define EXCHANGED(v, S) __builtin_shuffle(v, LANE_NUMBERS ^ S)

INLINE float sum(vf v) {
    v += EXCHANGED(v, 8);
    v += EXCHANGED(v, 4);
    v += EXCHANGED(v, 2);
    v += EXCHANGED(v, 1);
    return v[0];
}
/* Lanes of a where the mask is set, else those of b. */
INLINE vf pick(vi mask, vf a, vf b) { return (vf)(((vi)a & mask) | ((vi)b & ~mask)); }
INLINE vf larger(vf a, vf b) { return pick(a > b, a, b); }
INLINE float largest(vf v) {
    v = larger(v, EXCHANGED(v, 8));
    v = larger(v, EXCHANGED(v, 4));
    v = larger(v, EXCHANGED(v, 2));
    v = larger(v, EXCHANGED(v, 1));
    return v[0];
}

/* Memory of the calling thread that is kept from call to call. */
INLINE float *scratch(size_t count) {
    static __thread float *memory;
    static __thread size_t size;
    if (count > size) {
        free(memory);
        memory = aligned_alloc(64, (count * sizeof(float) + 63) / 64 * 64);
        size = memory ? count : 0;
    }
    return memory;
}
