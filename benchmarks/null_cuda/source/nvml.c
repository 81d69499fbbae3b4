/* NVML, for who asks the driver before, or without, using CUDA. It sees one process only: the one that asks. */
#include "null_cuda.h"

#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7 }; /* nvmlReturn_t */

__attribute__((used)) static int does_nothing(void) { return SUCCESS; }
__attribute__((used)) static int not_supported(void) { return NOT_SUPPORTED; }

/* A handle is the device's index, counted from one. The UUID is that of cudaGetDeviceProperties: "null_cuda_devica". */
static int index_of(const void *device) { return (int)(intptr_t)device - 1; }
static int open_device(unsigned index, void **device) {
    *device = (void *)(intptr_t)(index + 1);
    return index < (unsigned)gpu.count ? SUCCESS : INVALID_ARGUMENT;
}
static void write_uuid(char *uuid, size_t length, int index) {
    snprintf(uuid, length, "GPU-6e756c6c-5f63-7564-615f-6465766963%02x", 'a' + index);
}

int nvmlDeviceGetCount_v2(unsigned *count) { return *count = gpu.count, SUCCESS; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) { return open_device(index, device); }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
    char known[64];
    for (int index = 0; index < gpu.count; index++) {
        write_uuid(known, sizeof known, index);
        if (!strcmp(uuid, known)) return open_device(index, device);
    }
    return NOT_FOUND;
}
int nvmlDeviceGetHandleByPciBusId_v2(const char *bus, void **device) {
    unsigned domain, number;
    return sscanf(bus, "%x:%x:", &domain, &number) == 2 && number > 0 ? open_device(number - 1, device) : NOT_FOUND;
}
int nvmlDeviceGetIndex(void *device, unsigned *index) { return *index = index_of(device), SUCCESS; }
int nvmlDeviceGetName(void *device, char *name, unsigned length) {
    return snprintf(name, length, "%s", gpu.name), SUCCESS;
}
int nvmlDeviceGetUUID(void *device, char *uuid, unsigned length) {
    return write_uuid(uuid, length, index_of(device)), SUCCESS;
}
int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) {
    return *major = gpu.major, *minor = gpu.minor, SUCCESS;
}
int nvmlSystemGetDriverVersion(char *version, unsigned length) {
    return snprintf(version, length, "null device"), SUCCESS;
}
int nvmlSystemGetCudaDriverVersion_v2(int *version) { return *version = CUDART_VERSION, SUCCESS; }

static size_t in_use(void *device) { return has_context() ? gpu.context_bytes + memory_in_use(index_of(device)) : 0; }

/* What NVML counts and cudaMemGetInfo does not, the driver keeps. */
int nvmlDeviceGetMemoryInfo(void *device, unsigned long long memory[3]) { /* total, free, used */
    memory[0] = gpu.nvml_bytes;
    memory[2] = in_use(device) + (gpu.nvml_bytes > gpu.total_bytes ? gpu.nvml_bytes - gpu.total_bytes : 0);
    memory[1] = memory[0] > memory[2] ? memory[0] - memory[2] : 0;
    return SUCCESS;
}

typedef struct { unsigned pid; unsigned long long bytes; } Process;                        /* its first version */
typedef struct { Process process; unsigned instance, compute_instance; } PartitionProcess; /* its third */

int nvmlDeviceGetComputeRunningProcesses(void *device, unsigned *count, Process *processes) {
    const unsigned room = *count;
    *count = has_context() ? 1 : 0;
    if (!has_context()) return SUCCESS;
    if (!room) return INSUFFICIENT_SIZE;
    *processes = (Process){(unsigned)getpid(), in_use(device)};
    return SUCCESS;
}
int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *count, PartitionProcess *processes) {
    if (*count) processes->instance = processes->compute_instance = 0xffffffff;
    return nvmlDeviceGetComputeRunningProcesses(device, count, &processes->process);
}
const char *nvmlErrorString(int error) { return error ? "not served by the null device" : "success"; }
DOES_NOTHING(nvmlInit)
DOES_NOTHING(nvmlInit_v2)
DOES_NOTHING(nvmlInitWithFlags)
DOES_NOTHING(nvmlShutdown)
SAME_AS(nvmlDeviceGetNvLinkRemoteDeviceType, not_supported)
SAME_AS(nvmlDeviceGetNvLinkRemotePciInfo_v2, not_supported)
SAME_AS(nvmlDeviceGetGpuFabricInfoV, not_supported)
