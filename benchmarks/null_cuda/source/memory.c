/* Memory of the device and pinned memory of the host: who has how much, at which address; and copies. */
#include "null_cuda.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define PAGE (2 * MIB)             /* what the driver rounds an allocation up to */
#define ADDRESS_SPACE (32ULL << 40) /* of all devices; an address is handed out once only */

static char *space;     /* start of the addresses; PROT_NONE, so that a stray access on the host faults */
static size_t *sizes;   /* bytes of the cudaMalloc that starts at each page of the space; 0: none does */
static size_t next_byte[MAX_DEVICES]; /* by device: offset, in its part of the space, of the first unused address */
static size_t used[MAX_DEVICES];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
_Thread_local int current_device;

static cudaError_t last_error = cudaSuccess;

cudaError_t failed(cudaError_t error) { return last_error = error; }
cudaError_t cudaPeekAtLastError(void) { return last_error; }
cudaError_t cudaGetLastError(void) {
    const cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

/* ------------------------------------------------------------------------------------------------ addresses, amounts */

size_t in_pages(size_t bytes) { return (bytes + PAGE - 1) / PAGE * PAGE; }
int has_context(void) { return space != NULL; }
static size_t space_of_one(void) { return ADDRESS_SPACE / (gpu.count ? gpu.count : 1) / PAGE * PAGE; }

static int open_space(void) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    if (space) return 1;
    char *addresses = mmap(NULL, ADDRESS_SPACE + PAGE, PROT_NONE, flags, -1, 0);
    void *table = mmap(NULL, ADDRESS_SPACE / PAGE * sizeof *sizes, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (addresses == MAP_FAILED || table == MAP_FAILED) return 0;
    sizes = table;
    space = (char *)(((size_t)addresses + PAGE - 1) / PAGE * PAGE);
    return 1;
}

static int on_device(const void *address) {
    return space && (const char *)address >= space && (const char *)address < space + ADDRESS_SPACE;
}
static int device_of(const void *address) { return (int)((size_t)((const char *)address - space) / space_of_one()); }
static size_t *size_at(const void *address) { return &sizes[(size_t)((const char *)address - space) / PAGE]; }

static void *reserve_locked(size_t bytes, int device) {
    if (!open_space() || next_byte[device] + in_pages(bytes) > space_of_one()) return NULL;
    char *found = space + device * space_of_one() + next_byte[device];
    next_byte[device] += in_pages(bytes);
    return found;
}

/* Addresses for `bytes`, which take no memory; NULL when none are left. */
void *reserve_addresses(size_t bytes, int device) {
    pthread_mutex_lock(&lock);
    void *found = reserve_locked(bytes, device);
    pthread_mutex_unlock(&lock);
    return found;
}

/* A process has a context from its first use of a device on; here, from when there are addresses. */
void open_context(void) {
    pthread_mutex_lock(&lock);
    open_space();
    pthread_mutex_unlock(&lock);
}

static int take_locked(size_t bytes, int device) {
    if (gpu.context_bytes + used[device] + in_pages(bytes) > gpu.total_bytes) return 0;
    used[device] += in_pages(bytes);
    return 1;
}

/* Take memory of a device; 0 if it has not as much. */
int take_memory(size_t bytes, int device) {
    pthread_mutex_lock(&lock);
    const int taken = take_locked(bytes, device);
    pthread_mutex_unlock(&lock);
    return taken;
}

void give_memory_back(size_t bytes, int device) {
    pthread_mutex_lock(&lock);
    used[device] -= in_pages(bytes);
    pthread_mutex_unlock(&lock);
}

size_t memory_in_use(int device) { return used[device]; }

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes) {
    *free_bytes = gpu.total_bytes - gpu.context_bytes - used[current_device];
    *total_bytes = gpu.total_bytes;
    return cudaSuccess;
}

cudaError_t cudaMalloc(void **pointer, size_t bytes) {
    *pointer = NULL;
    if (bytes == 0) return cudaSuccess;
    pthread_mutex_lock(&lock);
    if (take_locked(bytes, current_device)) {
        *pointer = reserve_locked(bytes, current_device);
        if (*pointer)
            *size_at(*pointer) = in_pages(bytes);
        else
            used[current_device] -= in_pages(bytes);
    }
    pthread_mutex_unlock(&lock);
    log_call("cudaMalloc(%zu) = %p, %zu in use", bytes, *pointer, used[current_device]);
    return *pointer ? cudaSuccess : failed(cudaErrorMemoryAllocation);
}

static cudaError_t free_managed(void *pointer);

cudaError_t cudaFree(void *pointer) {
    if (!pointer) return cudaSuccess;
    if (!on_device(pointer)) return free_managed(pointer);
    pthread_mutex_lock(&lock);
    size_t *size = size_at(pointer);
    const size_t bytes = *size;
    used[device_of(pointer)] -= bytes;
    *size = 0;
    pthread_mutex_unlock(&lock);
    log_call("cudaFree(%p), %zu bytes", pointer, bytes);
    return bytes ? cudaSuccess : failed(cudaErrorInvalidValue);
}

cudaError_t cudaMallocAsync(void **pointer, size_t bytes, cudaStream_t stream) { return cudaMalloc(pointer, bytes); }
cudaError_t cudaFreeAsync(void *pointer, cudaStream_t stream) { return cudaFree(pointer); }

/* --------------------------------------------------------------------------------------------------- the host's memory
 *
 * Pinned, registered and managed memory is the host's, and what PyTorch asks of an address there is of which kind it is.
 * Managed memory (bitsandbytes' paged optimizers) takes none of the device's here, and as no kernel ever writes to it,
 * next to none of the host's. */

typedef enum { PINNED, REGISTERED, MANAGED } Kind;
typedef struct Range {
    char *start;
    size_t bytes;
    Kind kind;
    struct Range *next;
} Range;
static Range *ranges;

static cudaError_t remember(void *start, size_t bytes, Kind kind) {
    Range *range = malloc(sizeof *range);
    if (!range) return failed(cudaErrorMemoryAllocation);
    pthread_mutex_lock(&lock);
    *range = (Range){start, bytes, kind, ranges};
    ranges = range;
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}

/* Forget the range that starts there; its bytes, or 0 if there is none of this kind. */
static size_t forget(const void *start, Kind kind) {
    size_t bytes = 0;
    pthread_mutex_lock(&lock);
    for (Range **place = &ranges; *place; place = &(*place)->next) {
        if ((*place)->start != start || (*place)->kind != kind) continue;
        Range *gone = *place;
        bytes = gone->bytes;
        *place = gone->next;
        free(gone);
        break;
    }
    pthread_mutex_unlock(&lock);
    return bytes;
}

/* Zero pages: a buffer that nothing is ever copied into costs the host nothing. */
static cudaError_t map_host(void **pointer, size_t bytes, Kind kind) {
    const size_t length = bytes ? bytes : 1;
    *pointer = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (*pointer == MAP_FAILED) return *pointer = NULL, failed(cudaErrorMemoryAllocation);
    return remember(*pointer, length, kind);
}

static cudaError_t unmap_host(void *pointer, Kind kind) {
    const size_t bytes = forget(pointer, kind);
    if (!bytes) return failed(cudaErrorInvalidValue);
    munmap(pointer, bytes);
    return cudaSuccess;
}

cudaError_t cudaHostAlloc(void **pointer, size_t bytes, unsigned flags) { return map_host(pointer, bytes, PINNED); }
cudaError_t cudaFreeHost(void *pointer) { return pointer ? unmap_host(pointer, PINNED) : cudaSuccess; }
cudaError_t cudaMallocManaged(void **pointer, size_t bytes, unsigned flags) {
    log_call("cudaMallocManaged(%zu)", bytes);
    return map_host(pointer, bytes, MANAGED);
}
static cudaError_t free_managed(void *pointer) { return unmap_host(pointer, MANAGED); }
cudaError_t cudaHostRegister(void *pointer, size_t bytes, unsigned flags) {
    return remember(pointer, bytes, REGISTERED);
}
cudaError_t cudaHostUnregister(void *pointer) {
    return forget(pointer, REGISTERED) ? cudaSuccess : failed(cudaErrorHostMemoryNotRegistered);
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *pointer) {
    memset(attributes, 0, sizeof *attributes);
    attributes->type = cudaMemoryTypeUnregistered;
    attributes->device = -1;
    if (on_device(pointer)) {
        attributes->type = cudaMemoryTypeDevice;
        attributes->device = device_of(pointer);
        attributes->devicePointer = (void *)pointer;
        return cudaSuccess;
    }
    pthread_mutex_lock(&lock);
    for (const Range *range = ranges; range; range = range->next) {
        if ((const char *)pointer < range->start || (const char *)pointer >= range->start + range->bytes) continue;
        attributes->type = range->kind == MANAGED ? cudaMemoryTypeManaged : cudaMemoryTypeHost;
        attributes->device = current_device;
        attributes->devicePointer = attributes->hostPointer = (void *)pointer;
        break;
    }
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}

/* ------------------------------------------------------------------------------------------------------------- copies */

/* What a thread has sent to the device since it last launched a kernel, which may have changed it: libraries send a few
 * numbers through a collective to see whether all processes have the same, and here everybody agrees. */
typedef struct {
    const char *to;
    size_t bytes;
    char content[4096];
} Upload;
enum { UPLOADS = 16 };
static _Thread_local Upload *uploads;
static _Thread_local int uploads_kept;

void forget_uploads(void) { uploads_kept = 0; }

static void keep_upload(const char *to, const void *from, size_t bytes) {
    if (bytes > sizeof uploads->content || uploads_kept == UPLOADS) return;
    if (!uploads) uploads = malloc(UPLOADS * sizeof *uploads);
    if (!uploads) return;
    Upload *upload = &uploads[uploads_kept++];
    upload->to = to;
    upload->bytes = bytes;
    memcpy(upload->content, from, bytes);
}

static int read_upload(void *to, const char *from, size_t bytes) {
    for (int place = uploads_kept - 1; place >= 0; place--) {
        const Upload *upload = &uploads[place];
        if (from < upload->to || from + bytes > upload->to + upload->bytes) continue;
        memcpy(to, upload->content + (from - upload->to), bytes);
        return 1;
    }
    return 0;
}

/* What the host reads back otherwise: zeros, but a single byte is a truth value. */
static cudaError_t copy(void *to, const void *from, size_t bytes) {
    if (bytes == 0) return cudaSuccess;
    if (on_device(to)) {
        if (on_device(from))
            forget_uploads(); /* a copy is a kernel, too */
        else
            keep_upload(to, from, bytes);
    } else if (on_device(from)) {
        log_call("reads back %zu bytes", bytes);
        if (!read_upload(to, from, bytes)) memset(to, bytes == 1 ? byte_read_back() : 0, bytes);
    } else {
        memmove(to, from, bytes);
    }
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
    return copy(to, from, bytes);
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) {
    return copy(to, from, bytes);
}
cudaError_t cudaMemcpyPeerAsync(void *to, int there, const void *from, int here, size_t bytes, cudaStream_t stream) {
    return copy(to, from, bytes);
}
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                              size_t height, enum cudaMemcpyKind kind, cudaStream_t stream) {
    for (size_t row = 0; row < height; row++)
        copy((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width);
    return cudaSuccess;
}
static cudaError_t set(void *to, int value, size_t bytes) {
    if (on_device(to))
        forget_uploads();
    else
        memset(to, value, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemset(void *to, int value, size_t bytes) { return set(to, value, bytes); }
cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream) { return set(to, value, bytes); }
