/* A libcuda.so.1 that answers what the test says: INIT is cuInit's result, VERSION the driver's, COUNT the number
 * of devices, of which the second describes itself badly. With ONLY_INIT it has no other function. */
#include <stddef.h>
#include <string.h>

#ifndef INIT
#define INIT 0
#endif
#ifndef VERSION
#define VERSION 12080
#endif
#ifndef COUNT
#define COUNT 2
#endif

int cuInit(unsigned flags) { return flags == 0 ? INIT : 1; }

#ifndef ONLY_INIT
int cuDriverGetVersion(int *version) { *version = VERSION; return 0; }
int cuDeviceGetCount(int *count) { *count = COUNT; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return ordinal < COUNT ? 0 : 101; }
int cuDeviceGetUuid_v2(void *uuid, int device) { memset(uuid, 0xa0 + device, 16); return 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = (size_t)80 << 30; return device == 1 ? 9999 : 0; }
int cuDeviceGetName(char *name, int len, int device) {
    (void)device;
    /* Fills the whole buffer: a reader must not run past its end. */
    memset(name, 'x', (size_t)len);
    return 0;
}
int cuDeviceGetPCIBusId(char *id, int len, int device) {
    (void)device;
    strncpy(id, "0000:3B:00.0", (size_t)len);
    return 0;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    (void)device;
    switch (attribute) {
    case 75: *value = 9; return 0;   /* compute capability, major */
    case 76: *value = 0; return 0;   /* minor */
    case 102: *value = 1; return 0;  /* virtual memory management */
    case 117: *value = 3; return 0;  /* flush options */
    default: return 1;               /* an attribute that this driver does not know */
    }
}
int cuGetErrorString(int code, const char **text) {
    *text = code == 100 ? "no CUDA-capable device is detected" : NULL;
    return *text ? 0 : 1;
}
#endif
