/* Which GPU is pretended, from the environment, and what its architecture implies. */
#include "null_cuda.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

Gpu gpu;
int default_byte = 1;
static int logging;

void log_call(const char *format, ...) {
    if (!logging) return;
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "null_cuda: ");
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
}

static const char *required(const char *name) {
    const char *text = getenv(name);
    if (text && *text) return text;
    fprintf(stderr, "null_cuda: %s is not set; use python -m benchmarks.null_cuda, which sets it\n", name);
    _exit(2);
}

static size_t required_number(const char *name) {
    char *end;
    const char *text = required(name);
    const size_t number = strtoull(text, &end, 10);
    if (!*end && number > 0) return number;
    fprintf(stderr, "null_cuda: %s is %s, which is no positive number\n", name, text);
    _exit(2);
}

static size_t number_or(const char *name, size_t otherwise) {
    const char *text = getenv(name);
    return text && *text ? strtoull(text, NULL, 10) : otherwise;
}

/* How many devices CUDA_VISIBLE_DEVICES leaves: entries up to the first that names none. */
static int visible(int count) {
    const char *text = getenv("CUDA_VISIBLE_DEVICES");
    if (!text) return count;
    int found = 0;
    while (*text && found < count) {
        char *end;
        const long index = strtol(text, &end, 10);
        if (strncmp(text, "GPU-", 4) && (end == text || index < 0 || index >= count)) break;
        found++;
        text = strchr(text, ',');
        if (!text) break;
        text++;
    }
    return found;
}

__attribute__((constructor)) static void read_environment(void) {
    snprintf(gpu.name, sizeof gpu.name, "%s", required("NULL_CUDA_NAME"));
    const char *capability = required("NULL_CUDA_COMPUTE_CAPABILITY");
    if (sscanf(capability, "%d.%d", &gpu.major, &gpu.minor) != 2) {
        fprintf(stderr, "null_cuda: NULL_CUDA_COMPUTE_CAPABILITY is %s, which is not like 8.6\n", capability);
        _exit(2);
    }
    gpu.multiprocessors = (int)required_number("NULL_CUDA_MULTIPROCESSORS");
    gpu.threads_per_multiprocessor = (int)required_number("NULL_CUDA_THREADS_PER_MULTIPROCESSOR");
    gpu.nvml_bytes = required_number("NULL_CUDA_NVML_BYTES");
    gpu.total_bytes = required_number("NULL_CUDA_TOTAL_BYTES");
    gpu.context_bytes = number_or("NULL_CUDA_CONTEXT_BYTES", 0);
    gpu.count = (int)number_or("NULL_CUDA_COUNT", 1);
    if (gpu.count > MAX_DEVICES) {
        fprintf(stderr, "null_cuda: NULL_CUDA_COUNT is %d, more than %d\n", gpu.count, MAX_DEVICES);
        _exit(2);
    }
    gpu.count = visible(gpu.count);
    default_byte = (int)number_or("NULL_CUDA_TRUTH", 1);
    logging = (int)number_or("NULL_CUDA_LOG", 0);
}

/* Shared memory by compute capability: the table of technical specifications in the CUDA C++ Programming Guide. */
static int shared_memory_kib(void) {
    switch (gpu.major * 10 + gpu.minor) {
    case 70: return 96;
    case 75: return 64;
    case 80: return 164;
    case 86: case 89: return 100;
    case 87: return 164;
    case 90: case 100: case 103: return 228;
    default: return 100;
    }
}

static int shared_memory_per_block_kib(void) { /* from 8.0 on the system keeps 1 KiB of each block */
    return gpu.major >= 8 ? shared_memory_kib() - 1 : shared_memory_kib();
}

static int blocks_per_multiprocessor(void) { /* the same table */
    switch (gpu.major * 10 + gpu.minor) {
    case 75: case 86: case 87: return 16;
    case 89: return 24;
    default: return gpu.threads_per_multiprocessor == 2048 ? 32 : 24;
    }
}

int device_attribute(int which) {
    switch (which) {
    case cudaDevAttrMaxThreadsPerBlock: return 1024;
    case cudaDevAttrMaxBlockDimX: case cudaDevAttrMaxBlockDimY: return 1024;
    case cudaDevAttrMaxBlockDimZ: return 64;
    case cudaDevAttrMaxGridDimX: return 0x7fffffff;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 48 * 1024;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return shared_memory_per_block_kib() * 1024;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return shared_memory_kib() * 1024;
    case cudaDevAttrReservedSharedMemoryPerBlock: return gpu.major >= 8 ? 1024 : 0;
    case cudaDevAttrMaxRegistersPerBlock: case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMultiProcessorCount: return gpu.multiprocessors;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return gpu.threads_per_multiprocessor;
    case cudaDevAttrMaxBlocksPerMultiprocessor: return blocks_per_multiprocessor();
    case cudaDevAttrComputeCapabilityMajor: return gpu.major;
    case cudaDevAttrComputeCapabilityMinor: return gpu.minor;
    case CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED: return 1; /* same numbers as the runtime's */
    case cudaDevAttrUnifiedAddressing: case cudaDevAttrCooperativeLaunch: case cudaDevAttrMemoryPoolsSupported: return 1;
    case cudaDevAttrTextureAlignment: return 512;
    default: log_call("device attribute %d is 0 here", which); return 0;
    }
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr which, int device) {
    return *value = device_attribute(which), cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device) {
    struct cudaDeviceProp found = {0};
    /* Whatever writes down on what it was measured, writes this; NVML's name, by which a GPU is found, is the real one. */
    snprintf(found.name, sizeof found.name, "%.200s (null device)", gpu.name);
    memcpy(found.uuid.bytes, "null_cuda_device", 16);
    found.uuid.bytes[15] = (char)('a' + device);
    found.totalGlobalMem = gpu.total_bytes;
    found.sharedMemPerBlock = 48 * 1024;
    found.sharedMemPerBlockOptin = shared_memory_per_block_kib() * 1024;
    found.sharedMemPerMultiprocessor = shared_memory_kib() * 1024;
    found.reservedSharedMemPerBlock = gpu.major >= 8 ? 1024 : 0;
    found.regsPerBlock = found.regsPerMultiprocessor = 65536;
    found.warpSize = 32;
    found.memPitch = 0x7fffffff;
    found.maxThreadsPerBlock = 1024;
    found.maxThreadsDim[0] = found.maxThreadsDim[1] = 1024, found.maxThreadsDim[2] = 64;
    found.maxGridSize[0] = 0x7fffffff, found.maxGridSize[1] = found.maxGridSize[2] = 65535;
    found.totalConstMem = 65536;
    found.major = gpu.major, found.minor = gpu.minor;
    found.textureAlignment = 512, found.texturePitchAlignment = 32, found.surfaceAlignment = 512;
    found.multiProcessorCount = gpu.multiprocessors;
    found.maxThreadsPerMultiProcessor = gpu.threads_per_multiprocessor;
    found.maxBlocksPerMultiProcessor = blocks_per_multiprocessor();
    found.canMapHostMemory = found.unifiedAddressing = found.managedMemory = found.concurrentKernels = 1;
    found.asyncEngineCount = 2;
    found.streamPrioritiesSupported = found.globalL1CacheSupported = found.localL1CacheSupported = 1;
    found.concurrentManagedAccess = found.computePreemptionSupported = found.cooperativeLaunch = 1;
    found.hostRegisterSupported = found.memoryPoolsSupported = found.unifiedFunctionPointers = 1;
    found.clusterLaunch = gpu.major >= 9;
    found.pciBusID = 1 + device;
    *properties = found;
    return cudaSuccess;
}
