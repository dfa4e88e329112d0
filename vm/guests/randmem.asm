; randmem: dependent random loads over a working set. One count is 8 loads.
; The parameter is the working set in bytes, a power of two of at least 64 (0: 256 KiB).
; Addresses come from a linear congruential generator into which each load is added, so a load
; waits for the one before, and no cache settles into a cycle. The set lies at 2 MiB.
bits 64
org 0x10000
%include "ring3.inc"
%define SET 0x200000
    to_ring_3
user:
    mov edi, PROGRESS
    mov r8, [PARAMETER]
    test r8, r8
    jnz .given
    mov r8d, 256 * 1024
.given:
    shr r8, 6
    dec r8                          ; mask of cache lines
    mov r9d, SET
    mov rax, 0x9E3779B97F4A7C15     ; any start
    mov r10, 6364136223846793005    ; Knuth's MMIX generator
    mov r11, 1442695040888963407
.count:
%rep 8
    imul rax, r10
    add rax, r11
    mov rbx, rax
    shr rbx, 33
    and rbx, r8
    shl rbx, 6
    add rax, [r9 + rbx]             ; the set holds zeros: only the latency matters
%endrep
    inc qword [rdi]
    jmp .count
