; alu: pure computation. One count is a batch of 100 rounds of four dependent ALU operations.
; 64-bit flat image. It exits never and touches one cache line.
bits 64
org 0x10000
%include "ring3.inc"
    to_ring_3
user:
    mov edi, PROGRESS
    mov eax, 1
    xor ebx, ebx
    xor edx, edx
    xor esi, esi
.count:
    mov ecx, 100
.round:
    imul eax, ecx
    add ebx, eax
    xor edx, ebx
    add esi, 3
    dec ecx
    jnz .round
    inc qword [rdi]
    jmp .count
