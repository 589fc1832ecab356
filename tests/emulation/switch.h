// The switch between fibers. Defines a function: for one source file.
#pragma once

// Saves the registers that a function must preserve, and continues another fiber.
extern "C" void emulation_switch(void** leave, void* enter);
#ifndef __x86_64__
#error "the emulation switches between fibers in x86-64 assembler"
#endif
asm(R"(
.text
.globl emulation_switch
.hidden emulation_switch
.type emulation_switch, @function
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulation_switch, .-emulation_switch
)");
