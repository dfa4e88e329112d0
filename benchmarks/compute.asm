; Compute loops for benchmarks.compute: a boot sector that enters 32-bit protected mode and counts for ever in the u32
; at 20000h. KIND (a byte at offset 3) chooses the loop: 0 arithmetic, 1 memory, 2 branches, 3 calls.
bits 16
org 0x7C00
    jmp short start
    nop
kind: db 0
start:
    cli
    xor ax, ax
    mov ds, ax
    lgdt [gdt_pointer]
    mov eax, cr0
    or al, 1
    mov cr0, eax
    jmp 8:protected
bits 32
protected:
    mov ax, 16
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov esp, 0x7000
    movzx eax, byte [kind]
    jmp [loops + eax * 4]

arithmetic:                         ; 100 rounds of 6 instructions
    mov ecx, 100
.round:
    imul eax, ecx
    add ebx, eax
    xor edx, ebx
    add esi, 3
    dec ecx
    jnz .round
    inc dword [0x20000]
    jmp arithmetic

memory:                             ; 1024 words summed and stored: 5 instructions each
    mov esi, 0x30000
    mov ecx, 1024
.word:
    mov eax, [esi]
    add ebx, eax
    mov [esi], ebx
    add esi, 4
    loop .word
    inc dword [0x20000]
    jmp memory

branches:                           ; Collatz from 27: 111 steps
    mov eax, 27
.step:
    test al, 1
    jz .even
    lea eax, [eax + eax * 2 + 1]
    jmp .next
.even:
    shr eax, 1
.next:
    cmp eax, 1
    jne .step
    inc dword [0x20000]
    jmp branches

calls:                              ; the 15th Fibonacci number, recursively
    mov eax, 15
    call fibonacci
    inc dword [0x20000]
    jmp calls
fibonacci:
    cmp eax, 2
    jb .done
    push eax
    dec eax
    call fibonacci
    xchg eax, [esp]
    sub eax, 2
    call fibonacci
    pop edx
    add eax, edx
.done:
    ret

align 8
gdt: dq 0, 0x00CF9A000000FFFF, 0x00CF92000000FFFF
gdt_pointer:
    dw $ - gdt - 1
    dd gdt
loops: dd arithmetic, memory, branches, calls
times 510 - ($ - $$) db 0
    dw 0xAA55
