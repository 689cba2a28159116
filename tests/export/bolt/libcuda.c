// A libcuda without a GPU, for the calls that this package makes through cuda-bindings: it says what arrived, and how.
// Memory is the CPU's; kernels do not run, their arguments are printed.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int* version) { return *version = 13000, 0; }
int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, 0; }
int cuDeviceGetName(char* name, int length, int device) { return snprintf(name, length, "stand-in"), 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
    switch (attribute) {
        case 75: return *value = 9, 0;         // compute capability
        case 76: return *value = 0, 0;
        case 16: return *value = 132, 0;       // multiprocessors
        case 97: return *value = 232448, 0;    // shared memory of a block, if asked for
        case 38: return *value = 1 << 20, 0;   // L2 cache
        default: return 1;
    }
}
static void *current, *before[9];
static int depth;
int cuCtxGetCurrent(void** context) { return *context = current, 0; }
int cuCtxPushCurrent(void* context) { return before[++depth] = current, current = context, 0; }
int cuCtxPopCurrent(void** context) { return *context = current, current = before[depth--], 0; }
int cuCtxGetDevice(int* device) { return *device = 0, current ? 0 : 201; }
int cuCtxSynchronize(void) { return 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) { return *context = (void*)0x11, 0; }
int cuMemAlloc(uint64_t* pointer, size_t bytes) { return *pointer = (uint64_t)aligned_alloc(256, (bytes + 255) / 256 * 256), 0; }
typedef struct { int kind, handles, place, number; } Properties;  // the first of CUmemPoolProps
int cuMemPoolCreate(void** pool, const Properties* asked) {
    printf("pool %d %d %d %d\n", asked->kind, asked->handles, asked->place, asked->number);
    return *pool = (void*)0x99, 0;
}
int cuMemPoolSetAttribute(void* pool, int attribute, void* value) {
    printf("pool keeps %d %lu\n", attribute, *(unsigned long*)value);
    return pool != (void*)0x99;
}
int cuMemPoolDestroy(void* pool) { return printf("pool is gone\n"), pool != (void*)0x99; }
int cuMemAllocFromPoolAsync(uint64_t* pointer, size_t bytes, void* pool, void* stream) {
    return pool == (void*)0x99 ? cuMemAlloc(pointer, bytes) : 1;
}
int cuMemFree(uint64_t pointer) { return free((void*)pointer), printf("freed\n"), 0; }
int cuMemFreeAsync(uint64_t pointer, void* stream) { return cuMemFree(pointer); }
int cuMemcpyHtoD(uint64_t to, const void* from, size_t bytes) { return memcpy((void*)to, from, bytes), 0; }
int cuMemcpyDtoH(void* to, uint64_t from, size_t bytes) { return memcpy(to, (void*)from, bytes), 0; }
int cuStreamCreate(void** stream, unsigned flags) { return *stream = (void*)0x22, flags != 1; }
int cuStreamSynchronize(void* stream) { return 0; }
int cuStreamWaitEvent(void* stream, void* event, unsigned flags) { return printf("%p waits\n", stream), 0; }
int cuStreamBeginCapture(void* stream, int mode) { return printf("capture %p %d\n", stream, mode), 0; }
int cuStreamEndCapture(void* stream, void** graph) { return *graph = (void*)0x33, 0; }
int cuGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long flags) { return *executable = (void*)0x44, graph != (void*)0x33; }
int cuGraphLaunch(void* executable, void* stream) { return printf("graph %p on %p\n", executable, stream), 0; }
int cuGraphDestroy(void* graph) { return graph != (void*)0x33; }
int cuGraphExecDestroy(void* executable) { return executable != (void*)0x44; }
int cuEventCreate(void** event, unsigned flags) { return *event = (void*)0x55, 0; }
int cuEventRecord(void* event, void* stream) { return 0; }
int cuEventSynchronize(void* event) { return 0; }
int cuEventElapsedTime(float* milliseconds, void* begin, void* end) { return *milliseconds = 0.5f, 0; }
int cuEventDestroy(void* event) { return event != (void*)0x55; }
int cuLibraryLoadData(void** library, const void* code, int* options, void** values, unsigned count, int* library_options,
                      void** library_values, unsigned library_count) {
    printf("code %.4s\n", (const char*)code);
    return *library = (void*)0x66, count || library_count;
}
int cuLibraryGetKernel(void** kernel, void* library, const char* name) {
    printf("kernel %s\n", name);
    return *kernel = (void*)0x77, library != (void*)0x66;
}
int cuKernelGetFunction(void** function, void* kernel) { return *function = (void*)0x88, kernel != (void*)0x77; }
int cuFuncSetAttribute(void* function, int attribute, int value) {
    printf("attribute %d %d\n", attribute, value);
    return function != (void*)0x88;
}
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned ty, unsigned tz,
                   unsigned shared, void* stream, void** arguments, void** extra) {
    printf("launch %u %u %u, %u %u %u, %u on %p:", x, y, z, threads, ty, tz, shared, stream);
    const char* kinds = getenv("ARGUMENTS");  // of the arguments: p, a pointer, or i, 32 bits
    for (int i = 0; kinds[i]; ++i) {
        if (kinds[i] == 'p') printf(" %lx", *(unsigned long*)arguments[i]);
        else printf(" %d", *(int*)arguments[i]);
    }
    printf("\n");
    return function != (void*)0x88 || extra;
}
int cuGetErrorString(int error, const char** text) { return *text = "refused", 0; }
int cuGetErrorName(int error, const char** text) { return *text = "REFUSED", 0; }
int cuGetProcAddress_v2(const char* name, void** function, int version, uint64_t flags, int* status) {
    *function = dlsym(dlopen("libcuda.so.1", RTLD_LAZY), name);
    if (status) *status = *function ? 0 : 1;
    return *function ? 0 : 500;
}
int cuGetProcAddress(const char* name, void** function, int version, uint64_t flags) {
    return cuGetProcAddress_v2(name, function, version, flags, 0);
}
