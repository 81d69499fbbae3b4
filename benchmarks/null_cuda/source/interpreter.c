/* The end of the Python interpreter.
 *
 * A thread that asks for Python's lock after the interpreter has ended gets pthread_exit (before Python 3.14), which
 * unwinds C++ frames that let nothing through: "terminate called without an active exception", and an abort. Autograd's
 * threads come to this when they drop a reference to a Python object late. It happens on a GPU too, but there the device
 * makes backward slow and the thread is rarely late. As Python 3.14 does, let such a thread wait for the end of the
 * process. */
#include "null_cuda.h"

#include <dlfcn.h>
#include <unistd.h>

__attribute__((noreturn)) void pthread_exit(void *value) {
    int (*ending)(void) = (int (*)(void))dlsym(RTLD_DEFAULT, "_Py_IsFinalizing");
    if (!ending) ending = (int (*)(void))dlsym(RTLD_DEFAULT, "Py_IsFinalizing"); /* from 3.13 on */
    int (*initialized)(void) = (int (*)(void))dlsym(RTLD_DEFAULT, "Py_IsInitialized");
    if ((ending && ending()) || (initialized && !initialized())) {
        log_call("a thread came to Python after its end, and waits");
        for (;;) pause();
    }
    void (*leave)(void *) = (void (*)(void *))dlsym(RTLD_NEXT, "pthread_exit");
    leave(value);
    for (;;) pause();
}
