; Checks at each access, in machine code: what checks.py puts into the library. Assembled: nasm -f bin -o checks.bin
;
; Three entries, found by their offsets in the header, which Python also fills with addresses:
;   translate    in the place of the translator's own function for one instruction: asks Python where there may be
;                something to check, and puts a call of `check` for each access in front of the instruction
;   check        what translated code calls, by way of a helper of the library: raises a fault or returns
;   classify     after a load of a segment: how tight the segments are, into the hidden flags
bits 64
org 0

CPU_TO_ENV      equ 35408
FLAGS           equ 136                 ; in struct CPUX86State
HIDDEN          equ 176
SEGMENTS        equ 184                 ; of 24 bytes: u32 selector, u64 base at 8, u32 limit at 16, u32 flags at 20
CONTROL_0       equ 424
DIRTY           equ -10                 ; a segment was loaded

; DisasContextBase, DisasContext, TranslationBlock, uc_struct, TCGContext
BLOCK           equ 0
PC_FIRST        equ 8
PC_NEXT         equ 16
IS_JUMP         equ 24
NO_RETURN       equ 2
UC              equ 0x1F0
BLOCK_CS_BASE   equ 8
BLOCK_FLAGS     equ 16
UC_TCG          equ 0x300
TCG_ENV         equ 0x98F0

; hidden flags, as a block was translated for
CS32            equ 1 << 4
CS64            equ 1 << 15
AC              equ 1 << 18
LOCKED          equ 1                   ; in r15d: LOCK was among the prefixes; CS, FS or GS was
OVERRIDDEN      equ 2
NOT_FLAT        equ 1 << 28
NOT_LOW         equ 1 << 29
CODE_NOT_FLAT   equ 1 << 30
CODE_NOT_LOW    equ 1 << 31

; a segment's flags
PRESENT         equ 1 << 15
CODE            equ 1 << 11
DOWN            equ 1 << 10             ; of data; conforming, of code
RW              equ 1 << 9
SS_WORD         equ SEGMENTS / 8 + 2 * 3

; the first word of a check: bits 0 to 8 size less 1, 16 to 23 the segment's cache / 8; of RAISE: bits 0 to 7 the vector, 16
; to 23 the length of the instruction
WORD_ADDRESS    equ 1 << 9
LONG_ADDRESS    equ 1 << 10
BIT_TEST        equ 1 << 11
PLUS_AL         equ 1 << 12
COUNTED         equ 1 << 13
TO_16           equ 1 << 14
TO_SIZE         equ 1 << 15
WRITE           equ 1 << 24
PROTECTED       equ 1 << 25
LOW             equ 1 << 26             ; WORD_ADDRESS of one register at most, in a segment that has its first 64 KiB
NO_BASE         equ 1 << 27
RETURNS         equ 1 << 28             ; IRET of protected mode
MARK            equ 1 << 29
RAISE           equ 1 << 30
; bit 31: a check. The second: 0 to 31 displacement, 32 to 39 base and 40 to 47 index (registers; -1: none), 48 to 55
; the index's shift, 56 to 59 register and 60 whether 4 bytes of a bit test, 63 FETCH: the instruction itself

NT              equ 1 << 14
TASK_RETURN     equ 0x1F0               ; as in quirks.py

; kinds of opcodes, in Python's tables
PREFIX          equ 1
REX             equ 2
TWO             equ 3
MEMORY          equ 4                   ; by a ModRM byte
IMPLICIT        equ 5                   ; the stack, strings, absolute addresses
ALIGNED         equ 6                   ; SSE, by a ModRM byte
ANYWAY          equ 7
LOCK_PREFIX     equ 8
OVERRIDE        equ 9                   ; a prefix: CS, FS or GS
GROUP           equ 10                  ; ANYWAY, by a ModRM byte

header:
ask_python      dq 0                    ; int (cpu, pc, flags, bytes read): how many checks, 16 bytes each
checks          dq 0
kinds           dq 0                    ; 256 bytes, then those behind 0F; then 16 for the first of the instruction
translate_next  dq 0                    ; the library's
load_byte       dq 0                    ; cpu_ldub_code
constant_32     dq 0
constant_64     dq 0
call_helper     dq 0
free_temporary  dq 0
helper          dq 0                    ; helper_svm_check_intercept_param, and what it goes on to
intercept       dq 0
raise           dq 0                    ; raise_exception_err_ra
entries         dw translate, check, classify
; A check that always passes: how a block begins, for blocks.asm to write over once it has run.
room            dq 1 << 31 | LOW, 0xFFFF << 32

%macro restore 0
    add rsp, 40
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
%endmacro

; rdi: the DisasContext, rsi: the CPU.
translate:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    sub rsp, 40
    mov rbx, rdi
    mov [rsp + 24], rsi
    mov rax, [rbx + PC_NEXT]
    cmp rax, [rbx + PC_FIRST]
    jne .begun
    mov rax, [rbx + UC]
    mov rbp, [rax + UC_TCG]
    lea r13, [rel room]
    call .one
    mov rsi, [rsp + 24]
.begun:
    mov rbp, rsi
    lea r12, [rsi + CPU_TO_ENV]
    mov rdx, [rbx + BLOCK]
    mov r13d, [rdx + BLOCK_FLAGS]
    mov r14, [rbx + PC_NEXT]
    mov r15d, r13d
    and r15d, NOT_FLAT | NOT_LOW | AC   ; any: each access is asked for
    test r13d, CS64
    jz .segmented
    and r15d, AC
    jmp .next
.segmented:
    test r13d, r13d
    js .ask                             ; CODE_NOT_LOW
    test r13d, CODE_NOT_FLAT
    jz .next
    test r13d, CS32
    jnz .ask
    mov eax, r14d
    sub eax, [rdx + BLOCK_CS_BASE]
    cmp eax, 0xFFF0                     ; the code segment's end is near
    ja .ask
.next:
    call .byte
    mov rdx, [rel kinds]
    movzx ecx, byte [rdx + rax]
.kind:
    cmp ecx, LOCK_PREFIX
    je .lock
    cmp ecx, OVERRIDE
    je .override
    cmp ecx, MEMORY
    jae .last
    cmp ecx, TWO
    je .two
    cmp ecx, PREFIX
    je .prefix
    cmp ecx, REX
    jne .nothing
    test r13d, CS64
    jz .nothing
.prefix:
    mov rax, r14
    sub rax, [rbx + PC_NEXT]
    cmp eax, 14
    jb .next
    jmp .done
.group:
    call .byte
    jmp .ask
.lock:
    or r15d, LOCKED
    jmp .prefix
.override:
    or r15d, OVERRIDDEN
    jmp .prefix
.nothing:
    test r15d, LOCKED
    jz .done
    jmp .ask
.two:
    call .byte
    mov rdx, [rel kinds]
    movzx ecx, byte [rdx + rax + 256]
    jmp .kind
.last:
    je .wanted
    cmp ecx, IMPLICIT
    jne .aligned
    test r15d, r15d
    jz .done
    jmp .ask
.wanted:
    test r15d, r15d
    jz .done
    jmp .modrm
.aligned:
    cmp ecx, GROUP
    je .group
    cmp ecx, ALIGNED
    jne .ask
.modrm:
    call .byte
    test r15d, LOCKED
    jnz .ask
    cmp al, 0xC0
    jae .done
.ask:
    mov rdi, rbp
    mov rsi, [rbx + PC_NEXT]
    mov edx, r13d
    mov ecx, r14d
    sub ecx, esi
    call [rel ask_python]
    test eax, eax
    jz .done
    mov [rsp + 32], eax
    mov rax, [rbx + PC_NEXT]
    cmp rax, [rbx + PC_FIRST]
    jne .made
    ; Beyond the end of CS there may be no memory, which the translator would run into first. Where a block begins, the
    ; state is that of its first instruction.
    mov rax, [rel checks]
    mov esi, [rax]
    mov rdx, [rax + 8]
    mov rdi, r12
    test rdx, rdx
    jns .made                           ; not a FETCH
    call check
.made:
    mov r12d, [rsp + 32]
    mov rax, [rbx + UC]
    mov rbp, [rax + UC_TCG]
    mov r13, [rel checks]
.emit:
    call .one
    add r13, 16
    dec r12d
    jnz .emit
    test dword [r13 - 16], RAISE
    jz .done
    ; Nothing comes behind it; the library, which may abort at such an instruction, does not see it.
    movzx eax, byte [r13 - 14]
    add [rbx + PC_NEXT], rax
    mov dword [rbx + IS_JUMP], NO_RETURN
    restore
    ret
.done:
    mov rdi, rbx
    mov rsi, [rsp + 24]
    restore
    jmp [rel translate_next]

; A call of `check` with the words at r13. rbp: the TCGContext.
.one:
    sub rsp, 40
    mov rdi, rbp
    mov esi, [r13]
    call [rel constant_32]
    lea r14, [rbp + rax]                ; a TCGv is the place in the context
    mov rdi, rbp
    mov rsi, [r13 + 8]
    call [rel constant_64]
    lea r15, [rbp + rax]
    mov rax, [rbp + TCG_ENV]
    add rax, rbp
    mov [rsp], rax
    mov [rsp + 8], r14
    mov [rsp + 16], r15
    mov rdi, rbp
    mov rsi, [rel helper]
    xor edx, edx
    mov ecx, 3
    mov r8, rsp
    call [rel call_helper]
    mov rdi, rbp
    mov rsi, r15
    call [rel free_temporary]
    mov rdi, rbp
    mov rsi, r14
    call [rel free_temporary]
    add rsp, 40
    ret

; The next byte of code, as the translator reads it: faults as it would.
.byte:
    sub rsp, 8
    mov rdi, r12
    mov rsi, r14
    call [rel load_byte]
    add rsp, 8
    movzx eax, al
    mov rcx, r14
    sub rcx, [rbx + PC_NEXT]
    mov rdx, [rel kinds]
    mov [rdx + rcx + 512], al
    inc r14
    ret

; rdi: the CPU state, esi and rdx: the words of the check. Called from translated code.
check:
    test esi, esi
    jns .intercept
    test esi, LOW
    jz .ours
    mov rcx, rdx
    shr rcx, 32
    movsx rcx, cl
    mov eax, [rdi + rcx * 8]            ; none: padding in front of the state, which is zero
    add eax, edx
    movzx eax, ax
    mov ecx, esi
    and ecx, 0x1FF
    add eax, ecx
    cmp eax, 0xFFFF
    ja .ours
    ret
.intercept:
    mov rcx, [rsp]
    jmp [rel intercept]
.ours:
    test esi, MARK | RAISE | RETURNS
    jnz .special
    mov r8, rdx
    shr r8, 32
    movsx rax, r8b
    mov rax, [rdi + rax * 8]
    mov ecx, r8d
    shr ecx, 8
    movsx rcx, cl
    mov r9, [rdi + rcx * 8]
    mov ecx, r8d
    shr ecx, 16
    shl r9, cl                          ; by at most 63; the byte is 0 to 3
    add rax, r9
    movsxd rcx, edx
    add rax, rcx
    test esi, BIT_TEST | PLUS_AL | COUNTED
    jnz .odd
.mask:
    test esi, WORD_ADDRESS | LONG_ADDRESS
    jnz .other
    mov eax, eax
.segment:
    mov ecx, esi
    shr ecx, 16
    movzx ecx, cl
    lea r9, [rdi + rcx * 8]
    mov r8d, [r9 + 20]
    mov edx, esi
    and edx, 0x1FF
    add rdx, rax                        ; the last byte
    test esi, PROTECTED
    jz .limits
    test r8d, PRESENT
    jz .fail
    test r8d, CODE
    jnz .code
    test esi, WRITE
    jz .limits
    test r8d, RW
    jz .fail
.limits:
    mov ecx, r8d
    and ecx, CODE | DOWN
    cmp ecx, DOWN
    je .down
    mov ecx, [r9 + 16]
    cmp rdx, rcx
    ja .beyond
.fits:
    test esi, TO_16 | TO_SIZE
    jnz .alignment
    ret
.beyond:
    inc ecx                             ; 4 GiB wrap
    jz .fits
    jmp .fail
.code:
    test esi, WRITE
    jnz .fail
    test r8d, RW
    jz .fail
    jmp .limits
.down:
    mov ecx, [r9 + 16]
    cmp rax, rcx
    jbe .fail
    mov ecx, 0xFFFF
    test r8d, 1 << 22
    jz .top
    mov ecx, -1
.top:
    cmp rdx, rcx
    jbe .fits
.fail:
    mov edx, 13
    mov ecx, esi
    shr ecx, 16
    cmp cl, SS_WORD
    jne .raise
    dec edx
.raise:
    mov esi, edx
    xor edx, edx
    mov rcx, [rsp]                      ; by which the library finds the instruction
    jmp [rel raise]
.other:
    movzx ecx, ax
    test esi, WORD_ADDRESS
    cmovnz eax, ecx
    jnz .segment
    xor r9d, r9d                        ; 64-bit code: no limits, and a base only of FS and GS
    test esi, NO_BASE
    jnz .linear
    mov ecx, esi
    shr ecx, 16
    movzx ecx, cl
    lea r9, [rdi + rcx * 8]
.alignment:
    add rax, [r9 + 8]
.linear:
    test esi, TO_16
    jz .to_size
    mov edx, 13
    test al, 15
    jnz .raise
.to_size:
    test esi, TO_SIZE
    jz .aligned
    test dword [rdi + CONTROL_0], 1 << 18
    jz .aligned
    mov edx, 17
    mov ecx, esi
    and ecx, 0x1FF
    test eax, ecx
    jnz .raise
.aligned:
    ret
.odd:
    test esi, COUNTED
    jz .not_counted
    mov ecx, [rdi + 8]                  ; CX of 0 repeats nothing
    test esi, WORD_ADDRESS
    jz .wide_count
    movzx ecx, cx
.wide_count:
    test ecx, ecx
    jz .aligned
.not_counted:
    test esi, PLUS_AL
    jz .not_al
    movzx ecx, byte [rdi]
    add rax, rcx
.not_al:
    test esi, BIT_TEST
    jz .mask
    shr rdx, 56
    mov ecx, edx
    and ecx, 15
    mov rcx, [rdi + rcx * 8]            ; a signed number of bits
    test edx, 16
    jnz .of_4
    movsx rcx, cx
    sar rcx, 4
    lea rax, [rax + rcx * 2]
    jmp .mask
.of_4:
    movsxd rcx, ecx
    sar rcx, 5
    lea rax, [rax + rcx * 4]
    jmp .mask
.special:
    test esi, RETURNS
    jz .not_return
    mov edx, TASK_RETURN
    test dword [rdi + FLAGS], NT
    jnz .raise
    ret
.not_return:
    test esi, MARK
    jz .at_once
    mov byte [rdi + DIRTY], 1
    ret
.at_once:
    movzx edx, sil
    jmp .raise

; rdi: the CPU state. Returns whether the hidden flags have changed: blocks must be looked up anew.
%macro flat_or 4                        ; segment, what is looked at, flags of not flat, not flat and not low
    mov edx, [rdi + SEGMENTS + %1 * 24 + 20]
    and edx, %2
    cmp edx, PRESENT | RW
    jne %%tight
    mov edx, [rdi + SEGMENTS + %1 * 24 + 16]
    cmp edx, -1
    je %%flat
    or ecx, %3
    cmp edx, 0xFFFF
    jae %%flat
%%tight:
    or ecx, %4
%%flat:
%endmacro
classify:
    mov byte [rdi + DIRTY], 0
    xor ecx, ecx
    flat_or 0, PRESENT | CODE | DOWN | RW, NOT_FLAT, NOT_FLAT | NOT_LOW
    flat_or 2, PRESENT | CODE | DOWN | RW, NOT_FLAT, NOT_FLAT | NOT_LOW
    flat_or 3, PRESENT | CODE | DOWN | RW, NOT_FLAT, NOT_FLAT | NOT_LOW
    ; code that can be read; data in virtual-8086 mode
    flat_or 1, PRESENT | RW, CODE_NOT_FLAT, CODE_NOT_FLAT | CODE_NOT_LOW
    mov edx, [rdi + HIDDEN]
    mov eax, edx
    and edx, ~(NOT_FLAT | NOT_LOW | CODE_NOT_FLAT | CODE_NOT_LOW) & 0xFFFFFFFF
    or edx, ecx
    mov [rdi + HIDDEN], edx
    xor eax, edx
    ret
