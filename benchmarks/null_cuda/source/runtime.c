/* The rest of the CUDA runtime: devices, streams, events, kernels. Nothing waits, nothing runs. */
#include "null_cuda.h"

#include <stdio.h>
#include <string.h>

__attribute__((used)) static int does_nothing(void) { return 0; }
__attribute__((used)) static int refuses(void) { return failed(cudaErrorNotSupported); }
#define REFUSES(name) SAME_AS(name, refuses)

void *new_handle(void) { /* something to tell streams, events and kernels apart by */
    static size_t count = 0x1000;
    return (void *)__atomic_add_fetch(&count, 16, __ATOMIC_RELAXED);
}

/* ------------------------------------------------------------------------------------------------------------ devices */

cudaError_t cudaGetDeviceCount(int *count) {
    *count = gpu.count;
    return gpu.count ? cudaSuccess : failed(cudaErrorNoDevice);
}
cudaError_t cudaGetDevice(int *device) { return *device = current_device, cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= gpu.count) return failed(cudaErrorInvalidDevice);
    open_context(); /* since CUDA 12 */
    return current_device = device, cudaSuccess;
}
cudaError_t cudaDeviceSynchronize(void) { return open_context(), cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaDeviceGetPCIBusId(char *id, int length, int device) {
    return snprintf(id, length, "0000:%02x:00.0", 1 + device), cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    return *least = 0, *greatest = -5, cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) { return *can = 0, cudaSuccess; }
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int device) { return *pool = (void *)1, cudaSuccess; }
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr which, void *value) {
    return *(unsigned long long *)value = 0, cudaSuccess;
}

const char *cudaGetErrorName(cudaError_t error) {
    switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorNoDevice: return "cudaErrorNoDevice";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorNotSupported: return "cudaErrorNotSupported";
    default: return "cudaError";
    }
}
const char *cudaGetErrorString(cudaError_t error) {
    switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorNotSupported: return "not served by the null device";
    default: return "refused by the null device";
    }
}

/* --------------------------------------------------------------------------------------------------- streams, events */

cudaError_t cudaStreamCreate(cudaStream_t *stream) { return *stream = new_handle(), cudaSuccess; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) { return cudaStreamCreate(stream); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    return cudaStreamCreate(stream);
}
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) { return *priority = 0, cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                                     size_t *count) {
    *status = cudaStreamCaptureStatusNone;
    if (id) *id = 0;
    if (count) *count = 0;
    return cudaSuccess;
}
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t callback, void *data, unsigned flags) {
    return callback(stream, cudaSuccess, data), cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data) {
    return function(data), cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *event) { return *event = new_handle(), cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { return cudaEventCreate(event); }
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t from, cudaEvent_t to) {
    return *milliseconds = 0, cudaSuccess;
}

DOES_NOTHING(cudaDeviceEnablePeerAccess)
DOES_NOTHING(cudaStreamDestroy)
DOES_NOTHING(cudaStreamQuery)
DOES_NOTHING(cudaStreamSynchronize)
DOES_NOTHING(cudaStreamWaitEvent)
DOES_NOTHING(cudaEventDestroy)
DOES_NOTHING(cudaEventQuery)
DOES_NOTHING(cudaEventRecord)
DOES_NOTHING(cudaEventRecordWithFlags)
DOES_NOTHING(cudaEventSynchronize)
DOES_NOTHING(cudaMemPoolSetAccess)
DOES_NOTHING(cudaMemPoolSetAttribute)
DOES_NOTHING(cudaMemPoolTrimTo)
DOES_NOTHING(cudaMemPrefetchAsync)
DOES_NOTHING(cudaMemAdvise)
DOES_NOTHING(cudaProfilerStart)
DOES_NOTHING(cudaProfilerStop)
DOES_NOTHING(cudaThreadExchangeStreamCaptureMode)

/* ------------------------------------------------------------------------------------------------------------ kernels */

/* What nvcc's generated code calls. A launch is: push its configuration, call the stub, which pops it and launches. */
void **__cudaRegisterFatBinary(void *binary) {
    static void *registered;
    return &registered;
}
char __cudaInitModule(void **binary) { return 1; }
int __cudaGetKernel(cudaKernel_t *kernel, const void *function) { return *kernel = (cudaKernel_t)function, 0; }
int __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    const dim3 one = {1, 1, 1};
    *grid = *block = one, *shared = 0, *(void **)stream = NULL;
    return 0;
}
DOES_NOTHING(__cudaRegisterFatBinaryEnd)
DOES_NOTHING(__cudaUnregisterFatBinary)
DOES_NOTHING(__cudaRegisterVar)
DOES_NOTHING(__cudaPushCallConfiguration)
DOES_NOTHING(cudaFuncSetAttribute)
DOES_NOTHING(cudaKernelSetAttributeForDevice)
DOES_NOTHING(cudaLibraryUnload)
DOES_NOTHING(cudaMemcpyToSymbol)

/* The host often asks "any?" or "all?" of the device and goes on by the answer: any NaN, any error, are all sequences in
 * one piece. As zeros are what is there, the answers are "none" and "all", so the kernels of the two are told apart. */
static struct { const void *function; int answer; } reductions[1024];
static int reductions_known;

void __cudaRegisterFunction(void **binary, const char *host, char *device, const char *name, int threads, void *a,
                            void *b, void *c, void *d, int *size) {
    /* As C++ writes these names, with their lengths: without, floor_kernel_cuda would be one of them. */
    const int any = strstr(name, "14or_kernel_cuda") != NULL, all = strstr(name, "15and_kernel_cuda") != NULL;
    if (any == all) return;
    const int place = __atomic_fetch_add(&reductions_known, 1, __ATOMIC_RELAXED);
    if (place >= (int)(sizeof reductions / sizeof *reductions)) return;
    reductions[place].function = host;
    reductions[place].answer = all;
}

static _Thread_local int last_answer = -1; /* of the kernel that this thread launched last; -1: it asks nothing */
static _Thread_local int is_decomposed;    /* whether a decomposition ran since the last byte was read */

static int launch(const void *function) {
    forget_uploads();
    last_answer = -1;
    for (int place = 0; place < reductions_known; place++)
        if (reductions[place].function == function) last_answer = reductions[place].answer;
    return 0;
}

/* PyTorch asks after each decomposition whether there was an error: by no reduction, if it was of one matrix. */
void note_decomposition(void) { is_decomposed = 1; }

/* What a single byte, which is a truth value, reads as. */
int byte_read_back(void) {
    const int answer = is_decomposed ? 0 : last_answer >= 0 ? last_answer : default_byte;
    is_decomposed = 0;
    return answer;
}
int __cudaLaunchKernel(const void *function) { return launch(function); } /* what follows matters to nobody here */
int cudaLaunchKernel_untyped(const void *function) __asm__("cudaLaunchKernel");
int cudaLaunchKernel_untyped(const void *function) { return launch(function); }
int cudaLaunchCooperativeKernel_untyped(const void *function) __asm__("cudaLaunchCooperativeKernel");
int cudaLaunchCooperativeKernel_untyped(const void *function) { return launch(function); }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *configuration, const void *function, void **arguments) {
    return launch(function), cudaSuccess;
}

cudaError_t cudaLibraryLoadData(cudaLibrary_t *library, const void *code, enum cudaJitOption *options, void **values,
                                unsigned count, enum cudaLibraryOption *library_options, void **library_values,
                                unsigned library_count) {
    return *library = new_handle(), cudaSuccess;
}
cudaError_t cudaLibraryGetKernel(cudaKernel_t *kernel, cudaLibrary_t library, const char *name) {
    return *kernel = new_handle(), cudaSuccess;
}
cudaError_t cudaGetSymbolAddress(void **address, const void *symbol) {
    static void *symbols; /* one place for all of them: nothing is kept there */
    if (!symbols) symbols = reserve_addresses(1, current_device);
    return *address = symbols, cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *function) {
    memset(attributes, 0, sizeof *attributes);
    attributes->maxThreadsPerBlock = 1024;
    attributes->numRegs = 32;
    attributes->ptxVersion = attributes->binaryVersion = gpu.major * 10 + gpu.minor;
    attributes->maxDynamicSharedSizeBytes = 48 * 1024;
    return cudaSuccess;
}

/* Registers and shared memory of a kernel are not known here: threads alone limit how many blocks are resident. */
static int resident_blocks(int threads) {
    const int blocks = gpu.threads_per_multiprocessor / (threads > 0 ? threads : 1);
    return blocks > 1 ? blocks : 1;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *function, int threads,
                                                          size_t shared) {
    return *blocks = resident_blocks(threads), cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function, int threads,
                                                                   size_t shared, unsigned flags) {
    return *blocks = resident_blocks(threads), cudaSuccess;
}

/* ------------------------------------------------------------------------- graphs, and sharing memory between processes */

REFUSES(cudaStreamBeginCapture)
REFUSES(cudaStreamBeginCaptureToGraph)
REFUSES(cudaStreamEndCapture)
REFUSES(cudaStreamUpdateCaptureDependencies)
REFUSES(cudaGraphAddNode)
REFUSES(cudaGraphConditionalHandleCreate)
REFUSES(cudaGraphDestroy)
REFUSES(cudaGraphExecDestroy)
REFUSES(cudaGraphGetNodes)
REFUSES(cudaGraphInstantiateWithFlags)
REFUSES(cudaGraphLaunch)
REFUSES(cudaGraphNodeGetDependencies)
REFUSES(cudaGraphRetainUserObject)
REFUSES(cudaUserObjectCreate)
REFUSES(cudaUserObjectRelease)
REFUSES(cudaDeviceGetGraphMemAttribute)
REFUSES(cudaDeviceSetGraphMemAttribute)
REFUSES(cudaIpcCloseMemHandle)
REFUSES(cudaIpcGetEventHandle)
REFUSES(cudaIpcGetMemHandle)
REFUSES(cudaIpcOpenEventHandle)
REFUSES(cudaIpcOpenMemHandle)
