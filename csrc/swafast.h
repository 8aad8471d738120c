/* The C interface of the native library: raw pointers, 64-bit counts, no torch and no Python.
 * swafast/backends/native.py states the same structures for ctypes; SWAFAST_ABI changes with any of them. */
#pragma once

#include <stdint.h>

#if defined(_WIN32)
#define SWAFAST_EXPORT __declspec(dllexport)
#else
#define SWAFAST_EXPORT __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define SWAFAST_ABI 3

/* dtype of a param */
enum { SWAFAST_FLOAT32 = 0, SWAFAST_BFLOAT16 = 1, SWAFAST_FLOAT16 = 2, SWAFAST_BYTES = 3, SWAFAST_NUM_DTYPES = 4 };

/* format of an average; swafast/formats.py names the planes */
enum {
  SWAFAST_FORMAT_FLOAT32 = 0,  /* planes[0] float32 */
  SWAFAST_FORMAT_EXACT = 1,    /* planes[0] bfloat16, planes[1] int16 remainder */
  SWAFAST_FORMAT_MIRRORED = 2, /* planes[0] float16 copy, planes[1] float32 average */
  SWAFAST_FORMAT_COPIED = 3,   /* planes[0] the bytes of the param, for SWAFAST_BYTES alone */
  SWAFAST_NUM_FORMATS = 4
};

enum {
  SWAFAST_RULE_CONSTANT = 0,     /* terms: weight */
  SWAFAST_RULE_EQUAL = 1,        /* terms: none */
  SWAFAST_RULE_POWER_WARMUP = 2, /* terms: lowest weight, highest weight, inv_gamma, power */
  SWAFAST_RULE_RATIO_WARMUP = 3, /* terms: lowest weight, highest weight */
  SWAFAST_RULE_POWER = 4         /* terms: gamma */
};

typedef struct {
  int64_t kind;
  double terms[4];
} swafast_rule;

/* One param and its average. planes[0] always has the dtype of the averaged module's own parameter. */
typedef struct {
  void* param; /* read by an update, written by an exchange */
  void* planes[2];
  int64_t numel; /* bytes for SWAFAST_BYTES, elements otherwise */
  int32_t dtype;
  int32_t format;
} swafast_tensor;

/* A run of elements of one tensor: the unit of work of a task or a block. */
typedef struct {
  int64_t tensor;
  int64_t offset;
  int64_t numel;
} swafast_chunk;

enum { SWAFAST_OK = 0, SWAFAST_BAD_COUNT = 1, SWAFAST_BAD_TENSOR = 2 };

SWAFAST_EXPORT int32_t swafast_abi(void);

/* One line: compiler, and OpenMP or not. */
SWAFAST_EXPORT const char* swafast_build(void);

/* The weight that an update after num_averaged models gives to the newest one. */
SWAFAST_EXPORT double swafast_weight(const swafast_rule* rule, int64_t num_averaged);

/* Name of the instruction set in use. */
SWAFAST_EXPORT const char* swafast_cpu_isa(void);

/* Use this instruction set from now on; returns 0, or 1 where it was not compiled in or the processor lacks it. */
SWAFAST_EXPORT int32_t swafast_cpu_use_isa(const char* name);

/* Move every average towards its param by rule(*num_averaged), then count: *num_averaged += advance. Tensors are
 * checked before the first byte is written. At most num_threads threads; one in a forked child. */
SWAFAST_EXPORT int32_t swafast_cpu_update(const swafast_tensor* tensors, int64_t num_tensors,
                                          const swafast_chunk* chunks, int64_t num_chunks, const swafast_rule* rule,
                                          int64_t* num_averaged, int64_t advance, int32_t num_threads);

/* Ask for large pages behind this memory, before it is first touched; where there are none, nothing happens. */
SWAFAST_EXPORT void swafast_cpu_want_large_pages(void* start, int64_t nbytes);

/* Exchange the bytes of every param with those of planes[0], then *exchanged ^= 1; the dtypes must agree. */
SWAFAST_EXPORT int32_t swafast_cpu_exchange(const swafast_tensor* tensors, int64_t num_tensors,
                                            const swafast_chunk* chunks, int64_t num_chunks, int32_t num_threads,
                                            int64_t* exchanged);

/* *tensor = the lowest index of a tensor whose param holds a NaN or an infinity, or -1. Copied tensors do not count. */
SWAFAST_EXPORT int32_t swafast_cpu_first_nonfinite(const swafast_tensor* tensors, int64_t num_tensors,
                                                   const swafast_chunk* chunks, int64_t num_chunks, int32_t num_threads,
                                                   int64_t* tensor);

#ifdef __cplusplus
}
#endif
