/* The C interface of the native library: raw pointers, 64-bit counts, no torch and no Python.
 * swafast/backends/library.py states the same structures for ctypes. SWAFAST_ABI changes with any of them, and with the
 * rules. */
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

#define SWAFAST_ABI 10

/* dtype of a param */
enum { SWAFAST_FLOAT32 = 0, SWAFAST_BFLOAT16 = 1, SWAFAST_FLOAT16 = 2, SWAFAST_BYTES = 3, SWAFAST_NUM_DTYPES = 4 };

/* format of an average; swafast/terms/formats.py names the planes */
enum {
  SWAFAST_FORMAT_FLOAT32 = 0,     /* planes[0] float32 */
  SWAFAST_FORMAT_EXACT = 1,       /* planes[0] bfloat16, planes[1] int16 remainder */
  SWAFAST_FORMAT_MIRRORED = 2,    /* planes[0] float16 copy, planes[1] float32 average */
  SWAFAST_FORMAT_COPIED = 3,      /* planes[0] the bytes of the param, for SWAFAST_BYTES alone */
  SWAFAST_FORMAT_COMPACT = 4,     /* planes[0] bfloat16, planes[1] int8 remainder; rounded at random */
  SWAFAST_FORMAT_COMPENSATED = 5, /* planes[0] float32, planes[1] float32 compensation */
  SWAFAST_FORMAT_HALF = 6,        /* planes[0] bfloat16; rounded at random */
  SWAFAST_FORMAT_SPREAD = 7,      /* no average: planes[0] float32 variance, planes[1] a swafast_ring */
  SWAFAST_NUM_FORMATS = 8
};

enum {
  SWAFAST_RULE_CONSTANT = 0,     /* terms: weight */
  SWAFAST_RULE_EQUAL = 1,        /* terms: none */
  SWAFAST_RULE_POWER_WARMUP = 2, /* terms: lowest weight, highest weight, inv_gamma, power */
  SWAFAST_RULE_RATIO_WARMUP = 3, /* terms: lowest weight, highest weight */
  SWAFAST_RULE_POWER = 4,        /* terms: gamma */
  SWAFAST_RULE_RAMP_WARMUP = 5,  /* terms: lowest weight, highest weight, tau */
  SWAFAST_RULE_COSINE = 6,       /* terms: weight at the start, number of updates until it is 0 */
  SWAFAST_RULE_LINEAR = 7        /* terms: weight at the start, number of updates until it is 0 */
};

typedef struct {
  int64_t kind;
  double terms[4];
} swafast_rule;

/* How far the averages of one averaged model move: its rule, and the count of models in it already. */
typedef struct {
  swafast_rule rule;
  int64_t* num_averaged; /* read and advanced by an update; where the tensors are */
} swafast_pace;

/* The most averages that one launch moves over one read of the params. */
#define SWAFAST_MAX_PACES 16

/* One param and one of its averages. planes[0] always has the dtype of the averaged module's own parameter. Further
 * averages of the same param stand in the rows after it, alike in param, numel and dtype. */
typedef struct {
  void* param; /* read by an update, written by an exchange */
  void* planes[2];
  int64_t numel; /* bytes for SWAFAST_BYTES, elements otherwise */
  int32_t dtype;
  int32_t format;
  uint64_t key;      /* of the param's random bits, for formats that are rounded at random */
  int32_t pace;      /* index of the launch's pace by which this average moves */
  int32_t followers; /* how many rows after this one average the same param */
} swafast_tensor;

/* The last deviations of a param from its average, each a column: the addresses of num_columns arrays of numel
 * elements, in the param's order, come after this head. All of it is where the tensors are.
 *
 * A row of SWAFAST_FORMAT_SPREAD stands before the row of its average, which has the same param and pace. An update
 * reads param and average before it moves the average:
 *   deviation = param - new average, variance = lerp(variance, (param - old average) * deviation, weight),
 * with the new average as it is before it is rounded to its planes, and writes the deviation into the column
 * *num_averaged % num_columns. Both are 0 at weight 1. */
typedef struct {
  int32_t num_columns; /* 0: there is a variance alone */
  int32_t dtype;       /* of the columns: SWAFAST_FLOAT32, SWAFAST_BFLOAT16 or SWAFAST_FLOAT16 */
} swafast_ring;

/* A run of elements of one tensor and of its followers: the unit of work of a task or a block. */
typedef struct {
  int64_t tensor;
  int64_t offset;
  int64_t numel;
  int64_t first_index; /* of its first element in the whole param, row-major: what random bits go by */
  int64_t index_step;  /* from one element to the next; the upper 32 bits of the index are those of the first */
} swafast_chunk;

enum {
  SWAFAST_OK = 0,
  SWAFAST_BAD_COUNT = 1, /* a count is negative or exhausted */
  SWAFAST_BAD_TENSOR = 2,
  SWAFAST_CUDA_ERROR = 3,
  SWAFAST_BAD_PACE = 4 /* there is none, or more than SWAFAST_MAX_PACES, or a row names another */
};

SWAFAST_EXPORT int32_t swafast_abi(void);

/* SWAFAST_OK if an update serves every one of these tensors, and an exchange too if `exchange`. */
SWAFAST_EXPORT int32_t swafast_check(const swafast_tensor* tensors, int64_t num_tensors, int32_t exchange);

/* One line: compiler, and OpenMP or not. */
SWAFAST_EXPORT const char* swafast_build(void);

/* The weight that an update after num_averaged models gives to the newest one. */
SWAFAST_EXPORT double swafast_weight(const swafast_rule* rule, int64_t num_averaged);

/* Name of the instruction set in use. */
SWAFAST_EXPORT const char* swafast_cpu_isa(void);

/* Use this instruction set from now on; returns 0, or 1 where it was not compiled in or the processor lacks it. */
SWAFAST_EXPORT int32_t swafast_cpu_use_isa(const char* name);

/* Move every average towards its param by its pace's rule(*num_averaged), then count: *num_averaged += advance for
 * every pace. Tensors and counts are checked before the first byte is written. At most num_threads threads; one in a
 * forked child. */
SWAFAST_EXPORT int32_t swafast_cpu_update(const swafast_tensor* tensors, int64_t num_tensors,
                                          const swafast_chunk* chunks, int64_t num_chunks, const swafast_pace* paces,
                                          int64_t num_paces, int64_t advance, int32_t num_threads);

/* Ask for large pages behind this memory, best before it is first touched; where there are none, nothing happens. */
SWAFAST_EXPORT void swafast_cpu_want_large_pages(void* start, int64_t nbytes);

/* Exchange the bytes of every param with those of planes[0], unless *exchanged is `wanted` (0 or 1) already, then
 * *exchanged = wanted. The dtypes must agree. */
SWAFAST_EXPORT int32_t swafast_cpu_exchange(const swafast_tensor* tensors, int64_t num_tensors,
                                            const swafast_chunk* chunks, int64_t num_chunks, int32_t num_threads,
                                            int64_t wanted, int64_t* exchanged);

/* A point near an average: average + sum of coefficients[k] * column k + noise * sqrt(variance) * a normal number. */
typedef struct {
  const float* coefficients; /* of the first num_columns columns; where the tensors are */
  int32_t num_columns;
  uint32_t index; /* of the sample: the normal numbers go by it, the key of the average's row and the element's index */
  float noise;    /* 0: no random number is drawn */
} swafast_sample;

/* Write the point into every param whose row has SWAFAST_FORMAT_SPREAD, rounded once, to nearest. Each column is added
 * by one fma in the order of the columns, then the noise by another. The table must have no other rows than those and
 * the rows of their averages. SWAFAST_BAD_COUNT if a ring has fewer columns. */
SWAFAST_EXPORT int32_t swafast_cpu_draw(const swafast_tensor* tensors, int64_t num_tensors, const swafast_chunk* chunks,
                                        int64_t num_chunks, const swafast_sample* sample, int32_t num_threads);

/* *tensor = the lowest index of a tensor whose param holds a NaN or an infinity, or -1. Copied tensors do not count. */
SWAFAST_EXPORT int32_t swafast_cpu_first_nonfinite(const swafast_tensor* tensors, int64_t num_tensors,
                                                   const swafast_chunk* chunks, int64_t num_chunks, int32_t num_threads,
                                                   int64_t* tensor);

/* A box of a tensor: its corner is the word at `words`, and the word at coordinates c from there stands c * strides
 * words on in memory and has index first_index + c * index_strides in the whole tensor. */
typedef struct {
  const void* words;
  int64_t word_size; /* bytes: 1, 2, 4 or 8; an element of 16 bytes is two words */
  int64_t ndim;
  const int64_t* sizes;
  const int64_t* strides; /* any: a stride of 0 reads one word again */
  const int64_t* index_strides;
  int64_t first_index;
} swafast_box;

/* *sum = the sum over the box's words, modulo 2^64, of what csrc/checksum.h makes of index and word: the sums of boxes
 * which cut a tensor up add up to the sum of the whole. SWAFAST_BAD_TENSOR leaves *sum as it is. At most num_threads
 * threads; one in a forked child. */
SWAFAST_EXPORT int32_t swafast_cpu_checksum(const swafast_box* box, int32_t num_threads, uint64_t* sum);

/* dtype of the elements of a file that is averaged */
enum {
  SWAFAST_ELEMENT_FLOAT32 = 0,
  SWAFAST_ELEMENT_BFLOAT16 = 1,
  SWAFAST_ELEMENT_FLOAT16 = 2,
  SWAFAST_ELEMENT_FLOAT64 = 3,
  SWAFAST_NUM_ELEMENTS = 4
};

/* sums = coefficient * elements if `begin`, sums += coefficient * elements otherwise: product and sum rounded one by
 * one. In the calling thread. */
SWAFAST_EXPORT int32_t swafast_cpu_accumulate(double* sums, const void* elements, int64_t numel, int32_t element,
                                              double coefficient, int32_t begin);

/* out = sums / divisor, rounded once, ties to even. *nonfinite = the index of the first NaN or infinity in `out`, or
 * -1. In the calling thread. */
SWAFAST_EXPORT int32_t swafast_cpu_finish(const double* sums, void* out, int64_t numel, int32_t element, double divisor,
                                          int64_t* nonfinite);

/* What follows is there only where the library was built with a CUDA compiler.
 *
 * Each call launches on `stream` of `device` and returns: it waits for nothing, and the device that is current in the
 * calling thread stays so. The tables are on the device and checked before they went there (swafast_check). Every
 * launch says in which grid it runs. */

/* A chunk of one average, with all that a block needs of it: 64 bytes, in one line of the caches. */
typedef struct {
  void* param; /* of its first element, as the planes are */
  void* planes[2];
  int64_t numel;       /* bytes for SWAFAST_BYTES, elements otherwise */
  int64_t first_index; /* of SWAFAST_FORMAT_SPREAD: elements of the tensor before the chunk, for its ring is whole */
  uint64_t key;
  uint32_t tensor; /* index of the row that it was made of */
  uint32_t index_step;
  uint8_t dtype;
  uint8_t format;
  uint8_t pace;
  uint8_t unused;
  uint32_t follower; /* index of the descriptor of this chunk's next average; 0: there is none */
} swafast_descriptor;

/* Words in device memory that the launches of one table share; all zero at first. */
typedef struct {
  int64_t begun;     /* grows by 2^32 with each launch, whatever its grid */
  int64_t exchanged; /* 1 while params and averages have changed places */
  int64_t nonfinite; /* num_tensors - the lowest index of a tensor with a NaN or an infinity; 0: there is none */
  uint32_t claimed;  /* chunks that a launch under way has claimed; 0 between launches */
  uint32_t unused;
} swafast_state;

/* One launch's tables. The struct itself is on the host. */
typedef struct {
  const swafast_descriptor* descriptors; /* on a boundary of 16 bytes: one for each chunk, then all followers */
  int64_t num_chunks;
  int64_t num_tensors;
  swafast_state* state;
  int64_t device;
} swafast_table;

/* How many blocks of a launch there are, and how many threads each has: a multiple of 256, at most 1024. Two launches
 * of one table may differ in it if the first is over when the second begins: `claimed` would not end at 0. */
typedef struct {
  int32_t num_blocks;
  int32_t num_threads;
} swafast_grid;

/* One line: compiler and architectures. */
SWAFAST_EXPORT const char* swafast_cuda_build(void);

/* What went wrong in this thread's last call that returned SWAFAST_CUDA_ERROR. */
SWAFAST_EXPORT const char* swafast_cuda_error(void);

/* *num_blocks = how many blocks of so many threads are on the device at once. It fails where it cannot run them. It
 * loads all kernels onto the device: call it before a launch goes into a CUDA graph. */
SWAFAST_EXPORT int32_t swafast_cuda_blocks(int32_t device, int32_t num_threads, int32_t* num_blocks);

/* As swafast_cpu_update, with the counts on the device: the kernel reads them, and the last block to do so counts. A
 * negative or exhausted count leaves everything as it is, and so does state->nonfinite if `skip_nonfinite`. Rows of
 * SWAFAST_FORMAT_SPREAD are served only if `has_spread`: by a kernel of their own. The array of paces is on the host,
 * and free again once the call returns. *capturing = 1 if the launch went into a CUDA graph. */
SWAFAST_EXPORT int32_t swafast_cuda_update(const swafast_table* table, const swafast_pace* paces, int64_t num_paces,
                                           int64_t advance, int32_t skip_nonfinite, int32_t has_spread,
                                           const swafast_grid* grid, int32_t* capturing, void* stream);

/* As swafast_cpu_exchange, with state->exchanged for its memory. */
SWAFAST_EXPORT int32_t swafast_cuda_exchange(const swafast_table* table, int64_t wanted, const swafast_grid* grid,
                                             void* stream);

/* As swafast_cpu_draw; the coefficients are on the device, the struct itself is on the host, and free again once the
 * call returns. The caller sees to it that every ring has num_columns columns: the rings are on the device. */
SWAFAST_EXPORT int32_t swafast_cuda_draw(const swafast_table* table, const swafast_sample* sample,
                                         const swafast_grid* grid, void* stream);

/* Fill in state->nonfinite. Copied tensors do not count. */
SWAFAST_EXPORT int32_t swafast_cuda_first_nonfinite(const swafast_table* table, const swafast_grid* grid, void* stream);

#ifdef __cplusplus
}
#endif
