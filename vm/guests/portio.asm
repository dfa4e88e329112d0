; portio: exits. One count is a batch of ALU rounds, then one `out` to the POST code port 0x80,
; which no device of the machine does anything with.
; The parameter is the number of rounds a batch (0: 1000): it sets how often the guest exits.
bits 64
org 0x10000
%include "ring3.inc"
    to_ring_3
user:
    mov edi, PROGRESS
    mov r8, [PARAMETER]
    test r8, r8
    jnz .given
    mov r8d, 1000
.given:
    mov eax, '.'
    xor ebx, ebx
    mov edx, 0x80
.count:
    mov rcx, r8
.round:
    add ebx, eax
    dec rcx
    jnz .round
    out dx, al
    inc qword [rdi]
    jmp .count
