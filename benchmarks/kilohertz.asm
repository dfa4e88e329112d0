; For benchmarks.timer: 16-bit flat code that has the timer interrupt 1000.15 times a second and counts in the u64 at 20000h.
bits 16
org 0
    cli
    xor ax, ax
    mov ds, ax
    mov word [8 * 4], tick
    mov [8 * 4 + 2], cs
    mov al, 0x11                    ; the first 8259: cascade, vectors from 8, 8086 mode; line 0 alone
    out 0x20, al
    mov al, 8
    out 0x21, al
    mov al, 4
    out 0x21, al
    mov al, 1
    out 0x21, al
    mov al, 0xFE
    out 0x21, al
    mov al, 0x34                    ; counter 0, both bytes, rate generator: 1193182 / 1193
    out 0x43, al
    mov al, 1193 & 0xFF
    out 0x40, al
    mov al, 1193 >> 8
    out 0x40, al
    mov ax, 0x2000
    mov ds, ax
    sti
wait_for_it:
    hlt
    jmp wait_for_it
tick:
    inc dword [0]
    push ax
    mov al, 0x20
    out 0x20, al
    pop ax
    iret
