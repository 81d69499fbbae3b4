/* What PyTorch calls of NVIDIA's closed libraries: products, decompositions, collectives. None of them takes memory here
 * beyond the workspaces that PyTorch allocates for them itself; what the real ones ask for in addition is not known.
 *
 * Their headers cannot be used: they need files that the wheels leave out. On the supported platform (x86-64 and arm64
 * Linux) handles, sizes and enumerations take one argument slot each, whatever their type. */
#include "null_cuda.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

__attribute__((used)) static int does_nothing(void) { return 0; }
__attribute__((used)) static int makes_handle(void **made) { return *made = new_handle(), 0; }
#define MAKES_HANDLE(name) SAME_AS(name, makes_handle)

/* ------------------------------------------------------------------------------------------------------------- cuBLAS */

#define S_AND_D(make, before, after) make(before##S##after) make(before##D##after)

MAKES_HANDLE(cublasCreate_v2)
int cublasGetPointerMode_v2(void *handle, int *mode) { return *mode = 0 /* on the host */, 0; }
int cublasGetMathMode(void *handle, int *mode) { return *mode = 0 /* the default one */, 0; }
DOES_NOTHING(cublasDestroy_v2)
DOES_NOTHING(cublasSetStream_v2)
DOES_NOTHING(cublasSetWorkspace_v2)
DOES_NOTHING(cublasSetMathMode)
DOES_NOTHING(cublasSetPointerMode_v2)
DOES_NOTHING(cublasSetSmCountTarget)
DOES_NOTHING(cublasGemmEx)
DOES_NOTHING(cublasGemmStridedBatchedEx)
DOES_NOTHING(cublasSgemmEx)
DOES_NOTHING(cublasDotEx)
S_AND_D(DOES_NOTHING, cublas, gemm_v2)
S_AND_D(DOES_NOTHING, cublas, gemmBatched)
S_AND_D(DOES_NOTHING, cublas, gemmStridedBatched)
S_AND_D(DOES_NOTHING, cublas, gemv_v2)
S_AND_D(DOES_NOTHING, cublas, dot_v2)
S_AND_D(DOES_NOTHING, cublas, trsm_v2)
S_AND_D(DOES_NOTHING, cublas, trsmBatched)
S_AND_D(DOES_NOTHING, cublas, getrfBatched)
S_AND_D(DOES_NOTHING, cublas, getrsBatched)
S_AND_D(DOES_NOTHING, cublas, geqrfBatched)
S_AND_D(DOES_NOTHING, cublas, gelsBatched)

size_t cublasLtGetVersion(void) { return 130100; }
MAKES_HANDLE(cublasLtMatmulDescCreate)
MAKES_HANDLE(cublasLtMatrixLayoutCreate)
MAKES_HANDLE(cublasLtMatmulPreferenceCreate)
/* cublasLtMatmulHeuristicResult_t. One algorithm for everything, which needs no workspace: PyTorch has allocated one of
 * its own choice before it asks. */
typedef struct { uint64_t algorithm[8]; size_t workspace; int state; float waves; int reserved[4]; } Heuristic;
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *product, void *a, void *b, void *c, void *d, void *preference,
                                   int requested, Heuristic *results, int *returned) {
    memset(results, 0, sizeof *results);
    return *returned = 1, 0;
}
int cublasLtMatmulAlgoCheck(void *handle, void *product, void *a, void *b, void *c, void *d, void *algorithm,
                            Heuristic *result) {
    memset(result, 0, sizeof *result);
    return 0;
}
DOES_NOTHING(cublasLtMatmul)
DOES_NOTHING(cublasLtMatmulDescDestroy)
DOES_NOTHING(cublasLtMatmulDescSetAttribute)
DOES_NOTHING(cublasLtMatmulPreferenceDestroy)
DOES_NOTHING(cublasLtMatmulPreferenceSetAttribute)
DOES_NOTHING(cublasLtMatrixLayoutDestroy)
DOES_NOTHING(cublasLtMatrixLayoutSetAttribute)
DOES_NOTHING(cublasLtMatmulAlgoInit)
DOES_NOTHING(cublasLtMatmulAlgoConfigGetAttribute)
DOES_NOTHING(cublasLtMatmulAlgoConfigSetAttribute)

/* ----------------------------------------------------------------------------------------------------------- cuSOLVER
 *
 * The real library asks for a workspace of a size of its own choice, which PyTorch allocates. Here it asks for none. */

MAKES_HANDLE(cusolverDnCreate)
MAKES_HANDLE(cusolverDnCreateParams)
MAKES_HANDLE(cusolverDnCreateGesvdjInfo)

__attribute__((used)) static int decomposes(void) { return note_decomposition(), 0; }
#define DECOMPOSES(name) SAME_AS(name, decomposes)

/* Functions that tell a size, by the number of arguments before it. */
typedef size_t Slot;
#define SIZE_IS_NONE(name, ...) int name(__VA_ARGS__, int *size) { return *size = 0, 0; }
#define SIZES_ARE_NONE(name, ...) \
    int name(__VA_ARGS__, size_t *on_device, size_t *on_host) { return *on_device = *on_host = 0, 0; }
#define SLOTS_3 Slot a, Slot b, Slot c
#define SLOTS_5 SLOTS_3, Slot d, Slot e
#define SLOTS_7 SLOTS_5, Slot f, Slot g
#define SLOTS_8 SLOTS_7, Slot h
#define SLOTS_10 SLOTS_8, Slot i, Slot j
#define SLOTS_11 SLOTS_10, Slot k
#define SLOTS_12 SLOTS_11, Slot l
#define SLOTS_16 SLOTS_12, Slot m, Slot n, Slot o, Slot p
#define BOTH(name, slots) SIZE_IS_NONE(cusolverDnS##name, slots) SIZE_IS_NONE(cusolverDnD##name, slots)
BOTH(gesvd_bufferSize, SLOTS_3)
BOTH(geqrf_bufferSize, SLOTS_5)
BOTH(getrf_bufferSize, SLOTS_5)
BOTH(potrf_bufferSize, SLOTS_5)
BOTH(syevd_bufferSize, SLOTS_7)
BOTH(orgqr_bufferSize, SLOTS_7)
BOTH(ormqr_bufferSize, SLOTS_11)
BOTH(gesvdj_bufferSize, SLOTS_12)
BOTH(gesvdjBatched_bufferSize, SLOTS_11)
BOTH(gesvdaStridedBatched_bufferSize, SLOTS_16)
SIZES_ARE_NONE(cusolverDnXpotrf_bufferSize, SLOTS_8)
SIZES_ARE_NONE(cusolverDnXgeqrf_bufferSize, SLOTS_10)
SIZES_ARE_NONE(cusolverDnXsyevd_bufferSize, SLOTS_11)
DOES_NOTHING(cusolverDnDestroy)
DOES_NOTHING(cusolverDnDestroyParams)
DOES_NOTHING(cusolverDnDestroyGesvdjInfo)
DOES_NOTHING(cusolverDnSetStream)
DOES_NOTHING(cusolverDnXgesvdjSetMaxSweeps)
DOES_NOTHING(cusolverDnXgesvdjSetSortEig)
DOES_NOTHING(cusolverDnXgesvdjSetTolerance)
S_AND_D(DECOMPOSES, cusolverDn, gesvd)
S_AND_D(DECOMPOSES, cusolverDn, gesvdj)
S_AND_D(DECOMPOSES, cusolverDn, gesvdjBatched)
S_AND_D(DECOMPOSES, cusolverDn, gesvdaStridedBatched)
S_AND_D(DECOMPOSES, cusolverDn, geqrf)
S_AND_D(DECOMPOSES, cusolverDn, getrf)
S_AND_D(DECOMPOSES, cusolverDn, getrs)
S_AND_D(DECOMPOSES, cusolverDn, potrf)
S_AND_D(DECOMPOSES, cusolverDn, potrs)
S_AND_D(DECOMPOSES, cusolverDn, syevd)
S_AND_D(DECOMPOSES, cusolverDn, orgqr)
S_AND_D(DECOMPOSES, cusolverDn, ormqr)
DECOMPOSES(cusolverDnXgeqrf)
DECOMPOSES(cusolverDnXpotrf)
DECOMPOSES(cusolverDnXsyevd)

/* --------------------------------------------------------------------------------------------------------------- NCCL
 *
 * Collectives between processes that each have a null device: nothing is sent, as there is nothing to send. Who meets
 * whom is settled by PyTorch over its store, so several processes start, train and end as on GPUs. */

typedef struct { char internal[128]; } UniqueId;      /* ncclUniqueId */
typedef struct { int ranks, rank, device; } Communicator; /* ncclComm_t points to one */
enum { NCCL_VERSION = 22800 };

static int communicator(Communicator **made, int ranks, int rank) {
    *made = malloc(sizeof **made);
    if (!*made) return 2; /* ncclSystemError */
    **made = (Communicator){ranks, rank, current_device};
    return 0;
}
int ncclGetVersion(int *version) { return *version = NCCL_VERSION, 0; }
int ncclGetUniqueId(UniqueId *id) {
    memset(id, 0, sizeof *id);
    *(void **)id->internal = new_handle();
    return 0;
}
int ncclCommInitRank(Communicator **made, int ranks, UniqueId id, int rank) { return communicator(made, ranks, rank); }
int ncclCommInitRankConfig(Communicator **made, int ranks, UniqueId id, int rank, void *config) {
    return communicator(made, ranks, rank);
}
int ncclCommInitRankScalable(Communicator **made, int ranks, int rank, int ids, UniqueId *id, void *config) {
    return communicator(made, ranks, rank);
}
/* Which processes share a colour is not known without asking them; PyTorch knows it and asks this for nothing. */
int ncclCommSplit(Communicator *whole, int colour, int key, Communicator **made, void *config) {
    if (colour < 0) return *made = NULL, 0; /* NCCL_SPLIT_NOCOLOR */
    return communicator(made, whole->ranks, key);
}
int ncclCommDestroy(Communicator *gone) { return free(gone), 0; }
int ncclCommAbort(Communicator *gone) { return free(gone), 0; }
int ncclCommCount(const Communicator *asked, int *ranks) { return *ranks = asked->ranks, 0; }
int ncclCommUserRank(const Communicator *asked, int *rank) { return *rank = asked->rank, 0; }
int ncclCommCuDevice(const Communicator *asked, int *device) { return *device = asked->device, 0; }
int ncclCommGetAsyncError(Communicator *asked, int *error) { return *error = 0, 0; }
int ncclCommRegister(const Communicator *with, void *buffer, size_t bytes, void **made) { return makes_handle(made); }
int ncclRedOpCreatePreMulSum(int *made, void *scalar, int type, int residence, Communicator *with) {
    return *made = 5 /* past the built-in ones */, 0;
}
int ncclMemAlloc(void **pointer, size_t bytes) { return cudaMalloc(pointer, bytes); }
int ncclMemFree(void *pointer) { return cudaFree(pointer); }
const char *ncclGetErrorString(int error) { return error ? "refused by the null device" : "no error"; }
const char *ncclGetLastError(Communicator *of) { return ""; }
DOES_NOTHING(ncclCommFinalize)
DOES_NOTHING(ncclCommDeregister)
DOES_NOTHING(ncclRedOpDestroy)
DOES_NOTHING(ncclGroupStart)
DOES_NOTHING(ncclGroupEnd)
DOES_NOTHING(ncclAllGather)
DOES_NOTHING(ncclAllReduce)
DOES_NOTHING(ncclAlltoAll)
DOES_NOTHING(ncclBcast)
DOES_NOTHING(ncclBroadcast)
DOES_NOTHING(ncclGather)
DOES_NOTHING(ncclScatter)
DOES_NOTHING(ncclReduce)
DOES_NOTHING(ncclReduceScatter)
DOES_NOTHING(ncclSend)
DOES_NOTHING(ncclRecv)
