// Fibers of the emulator: stacks that take turns.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__) && !defined(__aarch64__)
#include <ucontext.h>
#endif

namespace simt {

#if defined(__x86_64__) || defined(__aarch64__)

extern "C" void simt_switch(void ** from, void * to);

#if defined(__APPLE__)
#define SIMT_SYMBOL(name) "_" name
#else
#define SIMT_SYMBOL(name) name
#endif

// keeps what a call must keep, changes stacks
#if defined(__x86_64__)
asm(".text\n" SIMT_SYMBOL("simt_switch") ":\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp, (%rdi)\nmovq %rsi, %rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n");
static constexpr int N_SAVED = 6; // and the return address
#else
asm(".text\n.p2align 2\n" SIMT_SYMBOL("simt_switch") ":\n"
    "sub sp, sp, #160\n"
    "stp x19, x20, [sp, #0]\nstp x21, x22, [sp, #16]\nstp x23, x24, [sp, #32]\nstp x25, x26, [sp, #48]\n"
    "stp x27, x28, [sp, #64]\nstp x29, x30, [sp, #80]\n"
    "stp d8, d9, [sp, #96]\nstp d10, d11, [sp, #112]\nstp d12, d13, [sp, #128]\nstp d14, d15, [sp, #144]\n"
    "mov x9, sp\nstr x9, [x0]\nmov sp, x1\n"
    "ldp x19, x20, [sp, #0]\nldp x21, x22, [sp, #16]\nldp x23, x24, [sp, #32]\nldp x25, x26, [sp, #48]\n"
    "ldp x27, x28, [sp, #64]\nldp x29, x30, [sp, #80]\n"
    "ldp d8, d9, [sp, #96]\nldp d10, d11, [sp, #112]\nldp d12, d13, [sp, #128]\nldp d14, d15, [sp, #144]\n"
    "add sp, sp, #160\nret\n");
#endif

struct fiber_context {
    void * sp = nullptr;

    void start(char * stack, size_t size, void (*entry)()) {
        auto * top = (void **) ((uintptr_t) (stack + size) & ~(uintptr_t) 15);
#if defined(__x86_64__)
        *--top = nullptr; // where entry would return to, and the alignment that a call leaves
        *--top = (void *) entry;
        top -= N_SAVED;
        std::fill(top, top + N_SAVED, nullptr);
#else
        top -= 20;
        std::fill(top, top + 20, nullptr);
        top[11] = (void *) entry; // x30
#endif
        sp = top;
    }

    static void switch_to(fiber_context & from, fiber_context & to) { simt_switch(&from.sp, to.sp); }
};

#else

struct fiber_context {
    ucontext_t context;

    void start(char * stack, size_t size, void (*entry)()) {
        getcontext(&context);
        context.uc_stack.ss_sp   = stack;
        context.uc_stack.ss_size = size;
        context.uc_link          = nullptr;
        makecontext(&context, entry, 0);
    }

    static void switch_to(fiber_context & from, fiber_context & to) { swapcontext(&from.context, &to.context); }
};

#endif

} // namespace simt
