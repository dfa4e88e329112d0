; Loops that access memory, for benchmarks.accesses: a boot sector that counts for ever in the u32 at 20000h. KIND (a byte
; at offset 3) chooses the loop: 0 words, 1 bytes, 2 calls, 3 strings in real mode; 4 words in segments of 4 GiB, 5 in
; segments of 1 MiB, of 32-bit protected mode.
bits 16
org 0x7C00
    jmp short start
    nop
kind: db 0
start:
    cli
    xor ax, ax
    mov ds, ax
    mov ss, ax
    mov sp, 0x7000
    mov ax, 0x2000
    mov es, ax
    movzx bx, byte [kind]
    shl bx, 1
    jmp [bx + loops]

words:                              ; 1000 words summed and stored: 6 instructions each, 2 of which access a word
    mov cx, 1000
    mov si, 0x4000
.next:
    mov ax, [si]
    add bx, ax
    mov [si], bx
    add si, 2
    dec cx
    jnz .next
    inc dword [es:0]
    jmp words

octets:                             ; the same of bytes
    mov cx, 1000
    mov si, 0x4000
.next:
    mov al, [si]
    add bl, al
    mov [si], bl
    add si, 1
    dec cx
    jnz .next
    inc dword [es:0]
    jmp octets

calls:                              ; 1000 calls with an argument on the stack: 7 instructions each, 4 of which use it
    mov cx, 1000
.next:
    push ax
    call .routine
    pop ax
    dec cx
    jnz .next
    inc dword [es:0]
    jmp calls
.routine:
    add bx, 3
    ret

strings:                            ; 1000 words copied
    mov cx, 1000
    mov si, 0x4000
    mov di, 0x1000
    rep movsw
    inc dword [es:0]
    jmp strings

wide:
    lgdt [gdt_pointer]
    mov eax, cr0
    or al, 1
    mov cr0, eax
    jmp 8:protected
bits 32
protected:
    mov ax, 16
    cmp byte [kind], 4
    je .load
    mov ax, 24
.load:
    mov ds, ax
    mov es, ax
    mov ss, ax
.again:
    mov esi, 0x30000
    mov ecx, 1000
.next:
    mov eax, [esi]
    add ebx, eax
    mov [esi], ebx
    add esi, 4
    dec ecx
    jnz .next
    inc dword [0x20000]
    jmp .again

align 8
loops: dw words, octets, calls, strings, wide, wide
gdt:
    dq 0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF, 0x004F93000000FFFF
gdt_pointer:
    dw gdt_pointer - gdt - 1
    dd gdt
    times 510 - ($ - $$) db 0
    dw 0xAA55
