; What blocks call first: what blocks.py puts in front of the block hook. Assembled: nasm -f bin -o blocks.bin
;
; A block begins so:
;           mov [rbp + EIP], address
;           mov rdi, imm64; mov esi, imm32; mov edx, imm32; xor ecx, ecx; call hook
;           mov rdi, imm64; xor esi, esi; call check
;           mov rdi, rbp; mov esi, imm32; mov rdx, imm64; call helper       (the room that checks.asm makes, or nothing)
;   body:
; where a call is near (E8) or by way of a constant (FF 15), and the address is stored at once or by way of a register.
; After its first run, so:
;   slow:   mov [rbp + EIP], address
;           (22 bytes as before); call hook; jmp body
;           (rest)
;   entry:  cmp qword [rbp - 16], 0; jne slow
;   body:
; and the library is told that it begins at `entry`: the TranslationBlock, the offsets into the code that are kept in it
; and behind the code, and the jumps that lead to it already.  The room puts the entry near a cache line's begin: where
; it had 20 bytes left of its line, short blocks ran at 0.8 of that while the core's other thread was busy (EPYC).
bits 64
org 0

EIP             equ 0x80                ; in struct CPUX86State
MOV_RDI         equ 0xBF48              ; imm64
MOV_ESI         equ 0xBE                ; imm32
MOV_EDX         equ 0xBA
XOR_ECX         equ 0xC933
XOR_ESI         equ 0xF633
NEAR_CALL       equ 0xE8
FAR_CALL        equ 0x15FF
NEAR_JUMP       equ 0xEB

; struct TranslationBlock, which lies before its code, both at a multiple of a cache line
BLOCK_BYTES     equ 0xC0
ALIGNMENT       equ 64
CODE            equ 32
CODE_BYTES      equ 40
JUMP_RESETS     equ 88                  ; two u16 offsets into the code, or FFFF
JUMP_TARGETS    equ 96                  ; two u64 offsets
JUMPS_TO        equ 112                 ; a list of blocks, in bit 0 which of their two jumps it is
JUMPS_NEXT      equ 120

called:
    mov rcx, [rsp]
    lea rsi, [rcx - 5]
    cmp byte [rsi], NEAR_CALL
    je .is_call
    lea rsi, [rcx - 6]
    cmp word [rsi], FAR_CALL
    jne .hook
.is_call:
    cmp word [rsi - 22], MOV_RDI
    jne .hook
    cmp byte [rsi - 12], MOV_ESI
    jne .hook
    cmp byte [rsi - 7], MOV_EDX
    jne .hook
    cmp word [rsi - 2], XOR_ECX
    jne .hook
    cmp word [rcx], MOV_RDI
    jne .hook
    cmp word [rcx + 10], XOR_ESI
    jne .hook
    cmp byte [rcx + 12], NEAR_CALL
    je .near
    cmp word [rcx + 12], FAR_CALL
    jne .hook
    movsxd rax, dword [rcx + 14]
    lea rdx, [rcx + 18]                 ; rdx: the body
    mov rax, [rdx + rax]
    jmp .is_check
.near:
    movsxd rax, dword [rcx + 13]
    lea rdx, [rcx + 17]
    add rax, rdx
.is_check:
    cmp rax, [rel check]
    jne .hook
    mov rdi, 0x84000000BEFD8B48         ; checks.asm's room: mov rdi, rbp; mov esi, imm32
    cmp [rdx], rdi
    jne .no_room
    mov rdi, 0x0000FFFF00000000         ; mov rdx, imm64
    cmp [rdx + 10], rdi
    jne .no_room
    lea rdi, [rdx + 18 + 5]             ; call, near
    lea r8, [rdi + 1]
    cmp byte [rdx + 18], NEAR_CALL
    mov rdx, r8
    cmove rdx, rdi
.no_room:
    cmp dword [rsi - 22 - 8], EIP       ; mov qword [rbp + EIP], imm32
    je .is_stored
    cmp dword [rsi - 22 - 4], EIP       ; mov rax, imm64; mov [rbp + EIP], rax
    jne .hook
.is_stored:
    lea r8, [rsi - 22 - 11]
    and r8, -ALIGNMENT                  ; r8: the code's begin
    lea r9, [r8 - BLOCK_BYTES]          ; r9: the TranslationBlock
    cmp [r9 + CODE], r8
    jne .hook
    lea rsi, [rdx - 11]                 ; rsi: the entry
    mov r11, rsi
    sub r11, r8                         ; r11: how many bytes it is further on, less than 128

    ; Behind the code are, as signed LEB128: of each instruction two words, and where its code ends. The first's end:
    mov r10, r8
    add r10, [r9 + CODE_BYTES]
    mov edi, 2
.word:
    mov al, [r10]
    inc r10
    test al, al
    js .word
    dec edi
    jnz .word
    mov edi, r11d                       ; to subtract: at most one digit
.digit:
    movzx eax, byte [r10]
    sub al, dil
    xor al, [r10]
    and al, 0x7F                        ; a digit's 7 bits; the eighth stays
    xor al, [r10]
    movzx ecx, byte [r10]
    and ecx, 0x7F
    mov [r10], al
    inc r10
    cmp ecx, edi
    mov edi, 1                          ; borrowed
    jb .digit

    add [r9 + CODE], r11
    sub [r9 + CODE_BYTES], r11
    xor edi, edi
.own:
    cmp word [r9 + JUMP_RESETS + rdi * 2], -1
    je .none
    sub [r9 + JUMP_RESETS + rdi * 2], r11w
    sub [r9 + JUMP_TARGETS + rdi * 8], r11
.none:
    inc edi
    cmp edi, 2
    jb .own

    mov rax, [r9 + JUMPS_TO]
.jump:
    mov edi, eax
    and edi, 1
    and rax, -2
    jz .write
    mov r10, [rax + CODE]
    add r10, [rax + JUMP_TARGETS + rdi * 8]
    lea rcx, [r10 + 4]
    sub rcx, rsi
    neg rcx
    mov [r10], ecx
    mov rax, [rax + JUMPS_NEXT + rdi * 8]
    jmp .jump

.write:
    mov rcx, [rsp]
    mov eax, edx
    sub eax, ecx
    sub eax, 2
    mov byte [rcx], NEAR_JUMP
    mov [rcx + 1], al
    mov rax, 0x850F00F07D8348           ; cmp qword [rbp - 16], 0; jne
    mov [rsi], rax
    sub r8d, edx
    mov [rsi + 7], r8d
.hook:
    sub rsp, 8
    call hook
    add rsp, 8
    mov rdi, [rel handle]
    xor esi, esi
    jmp [rel check]

check           dq 0                    ; helper_check_exit_request
handle          dq 0
hook:
