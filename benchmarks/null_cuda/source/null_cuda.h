/* null_cuda: a CUDA device that computes nothing, under PyTorch's real CUDA build, on a machine without a GPU.
 *
 * Preloaded, the library stands in front of libcudart (runtime.c, memory.c), of the parts of cuBLAS, cuSOLVER and NCCL
 * that PyTorch calls (libraries.c), of the driver functions that PyTorch asks for by name (driver.c) and, through a link
 * called libnvidia-ml.so.1, of NVML (nvml.c). Addresses are real but lead nowhere; a kernel launch does nothing; what is
 * read back from the device is zero, or what was just sent there. Everything on the host is PyTorch's own: operators, autograd, caching allocator.
 * So what torch.cuda reports of memory is what it would report on the GPU.
 *
 * Which GPU is pretended stands in the environment, where device.py puts it from the product's catalogue of GPUs:
 *
 *   NULL_CUDA_NAME                        as the driver names it
 *   NULL_CUDA_COMPUTE_CAPABILITY          such as 8.6
 *   NULL_CUDA_MULTIPROCESSORS             of the GPU
 *   NULL_CUDA_THREADS_PER_MULTIPROCESSOR  resident at a time, at most
 *   NULL_CUDA_NVML_BYTES                  memory as NVML reports it
 *   NULL_CUDA_TOTAL_BYTES                 memory as cudaMemGetInfo reports it; beyond it cudaMalloc fails
 *   NULL_CUDA_CONTEXT_BYTES               in use as soon as the device is
 *   NULL_CUDA_COUNT                       how many of them there are; 1 if not set
 *   NULL_CUDA_TRUTH                       what a single byte read back is, other than of "any" and "all": 1, a truth
 *                                         value is true, if not set; or 0
 *   NULL_CUDA_LOG                         1: print what allocates, frees or reads back, and what is not served
 *
 * The headers are those of the CUDA wheels that PyTorch depends on, so structures and numbers are its own.
 */
#pragma once
#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <stddef.h>

#define MIB (1024ULL * 1024)
#define MAX_DEVICES 16

typedef struct {
    char name[128];
    int major, minor;
    int multiprocessors, threads_per_multiprocessor;
    size_t nvml_bytes, total_bytes, context_bytes;
    int count; /* of equal devices */
} Gpu;

/* gpu.c */
extern Gpu gpu;
extern int default_byte; /* NULL_CUDA_TRUTH */
void log_call(const char *format, ...) __attribute__((format(printf, 1, 2)));
int device_attribute(int which);

/* memory.c */
extern _Thread_local int current_device;
cudaError_t failed(cudaError_t error);
void *reserve_addresses(size_t bytes, int device);
int take_memory(size_t bytes, int device);
void give_memory_back(size_t bytes, int device);
size_t memory_in_use(int device); /* without the context */
size_t in_pages(size_t bytes);
void open_context(void);
void forget_uploads(void);
int has_context(void); /* whether this process has one */

/* runtime.c */
void *new_handle(void);
void note_decomposition(void);
int byte_read_back(void);

/* A function with nothing to do but to return a constant needs no signature of its own: its name is made in assembler,
 * so the headers may declare it with any arguments, or not at all. */
#define SAME_AS(name, function) __asm__(".globl " #name "\n.type " #name ", @function\n.set " #name ", " #function);
#define DOES_NOTHING(name) SAME_AS(name, does_nothing)
