/* The driver functions that PyTorch asks for by name: virtual memory, which expandable segments are made of. */
#include "null_cuda.h"

#include <dlfcn.h>
#include <stdint.h>

__attribute__((used)) static int does_nothing(void) { return 0; }

#undef cuCtxPushCurrent /* the header renames these to their second versions; PyTorch asks for them as they are */
#undef cuCtxPopCurrent
#undef cuStreamWriteValue32

CUresult cuMemAddressReserve(CUdeviceptr *address, size_t bytes, size_t alignment, CUdeviceptr hint,
                             unsigned long long flags) {
    *address = (CUdeviceptr)reserve_addresses(bytes, current_device);
    log_call("cuMemAddressReserve(%zu)", bytes);
    return *address ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}
/* The handle says what to give back, and to whom: a multiple of a page, plus the device. */
CUresult cuMemCreate(CUmemGenericAllocationHandle *memory, size_t bytes, const CUmemAllocationProp *properties,
                     unsigned long long flags) {
    const int device = properties->location.id;
    const int taken = take_memory(bytes, device);
    *memory = in_pages(bytes) + (size_t)device;
    log_call("cuMemCreate(%zu) %s, %zu in use", bytes, taken ? "taken" : "refused", memory_in_use(device));
    return taken ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}
CUresult cuMemRelease(CUmemGenericAllocationHandle memory) {
    const int device = (int)(memory % MAX_DEVICES);
    give_memory_back(memory - device, device);
    return CUDA_SUCCESS;
}
CUresult cuMemGetAllocationGranularity(size_t *bytes, const CUmemAllocationProp *properties,
                                       CUmemAllocationGranularity_flags which) {
    return *bytes = in_pages(1), CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice *device, int index) { return *device = index, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { return *count = gpu.count, CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { return *version = CUDART_VERSION, CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice device) {
    return *value = device_attribute((int)which), CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    return *flags = 0, *active = has_context(), CUDA_SUCCESS;
}
/* A context is its device, counted from one. */
CUresult cuCtxGetCurrent(CUcontext *current) {
    return *current = (CUcontext)(intptr_t)(current_device + 1), CUDA_SUCCESS;
}
CUresult cuCtxPopCurrent(CUcontext *current) { return cuCtxGetCurrent(current); }
CUresult cuCtxGetDevice(CUdevice *device) { return *device = current_device, CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char **text) {
    return *text = error == CUDA_ERROR_OUT_OF_MEMORY ? "out of memory" : "not served by the null device", CUDA_SUCCESS;
}
CUresult cuGetErrorName(CUresult error, const char **text) {
    return *text = error == CUDA_ERROR_OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR", CUDA_SUCCESS;
}
DOES_NOTHING(cuInit)
DOES_NOTHING(cuMemMap)
DOES_NOTHING(cuMemUnmap)
DOES_NOTHING(cuMemSetAccess)
DOES_NOTHING(cuMemAddressFree)
DOES_NOTHING(cuCtxSetCurrent)
DOES_NOTHING(cuCtxPushCurrent)
DOES_NOTHING(cuMemsetD32Async)
DOES_NOTHING(cuStreamWriteValue32)

static int not_supported(void) { return CUDA_ERROR_NOT_SUPPORTED; }

/* PyTorch asks for driver functions by name. One that is not above says that it is not supported. */
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                             unsigned long long flags, enum cudaDriverEntryPointQueryResult *status) {
    Dl_info self;
    void *library = dladdr(&gpu, &self) ? dlopen(self.dli_fname, RTLD_LAZY | RTLD_NOLOAD) : NULL;
    *function = library ? dlsym(library, name) : NULL;
    if (library) dlclose(library);
    if (!*function) {
        log_call("driver function %s is not served", name);
        *function = (void *)not_supported;
    }
    if (status) *status = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}
