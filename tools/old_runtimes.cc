// What the headers and the code of GCC 11 and later ask of libstdc++ and glibc, made of what those of
// manylinux_2_28 have: tools/old_runtimes.py links it. Hidden, so no other module sees it.
#include <exception>
#include <new>

#define HIDDEN(symbol) asm(symbol) __attribute__((visibility("hidden")))

extern "C" {

// An exception_ptr is one pointer. Its copy and its destructor are inline since libstdc++ 11, and
// call _M_addref() and _M_release(); these two functions do the same, and are inline nowhere.
struct NestedException {
  void* table;
  void* exception;
};
void construct_exception_ptr(void** self,
                             void* exception) asm("_ZNSt15__exception_ptr13exception_ptrC1EPv");
void destroy_nested_exception(NestedException* self) asm("_ZNSt16nested_exceptionD1Ev");

// std::exception_ptr::_M_addref() and _M_release()
void add_reference(void** self) HIDDEN("_ZNSt15__exception_ptr13exception_ptr9_M_addrefEv");
void release(void** self) HIDDEN("_ZNSt15__exception_ptr13exception_ptr10_M_releaseEv");

// std::__throw_bad_array_new_length(), of libstdc++ 11.
[[noreturn]] void throw_bad_array_new_length() HIDDEN("_ZSt28__throw_bad_array_new_lengthv");

// What GCC 14 calls where an exception would leave a noexcept function.
void* __cxa_begin_catch(void* exception) noexcept;
[[noreturn]] void call_terminate(void* exception) HIDDEN("__cxa_call_terminate");

// Of glibc 2.32. A program that says it may have several threads counts references atomically, as
// one with an older glibc does.
extern char single_threaded HIDDEN("__libc_single_threaded");
char single_threaded = 0;

void add_reference(void** self) {
  void* never_destroyed;
  construct_exception_ptr(&never_destroyed, *self);
}

void release(void** self) {
  NestedException last = {nullptr, *self};
  *self = nullptr;
  destroy_nested_exception(&last);
}

void throw_bad_array_new_length() { throw std::bad_array_new_length(); }

void call_terminate(void* exception) {
  if (exception != nullptr) __cxa_begin_catch(exception);
  std::terminate();
}

}  // extern "C"
