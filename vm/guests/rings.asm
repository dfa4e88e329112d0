; rings: transitions. One count is a way from ring 3 to ring 0 through an IDT gate and the TSS, and
; back by `iretq`. The gate is that of the invalid opcode: `ud2` is the trap that every
; engine delivers alike (PVM turns `int n` in ring 3 into an invalid opcode anyway, its SYSCALL stays
; in ring 3, and SYSENTER is invalid in long mode on AMD).
; The handler counts its own entries at 0x20008, in ring 0: the counters differ by one at most.
bits 64
org 0x10000
%include "ring3.inc"
%define IDT 0x9000                  ; 7 gates of 16 bytes; only the last one is present
%define INVALID_OPCODE 6
    mov edi, IDT + INVALID_OPCODE * 16
    mov eax, kernel
    mov [rdi], ax
    mov word [rdi + 2], 0x08        ; ring 0's code segment
    mov word [rdi + 4], 0x8E00      ; present, interrupt gate
    shr eax, 16
    mov [rdi + 6], ax
    mov qword [rdi + 8], 0
    lidt [table]
    to_ring_3
user:
    ud2
    inc qword [PROGRESS]
    jmp user
kernel:
    inc qword [PROGRESS + 8]
    add qword [rsp], 2              ; go on behind the ud2
    iretq
align 8
table:
    dw (INVALID_OPCODE + 1) * 16 - 1
    dq IDT
