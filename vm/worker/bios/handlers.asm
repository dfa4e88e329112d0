; The parts of the BIOS that are the guest's own code: interrupt handlers and longer entries of services.
; Assembled to handlers.bin and put at F000:0800; rom.py finds the entries by the table at the start.
; A service is called through the stub of its vector (`out BIOS_PORT, al`, `iret`) at vector * 8.
bits 16
org 0x800
%define STUB(vector) ((vector) * 8)
%define TICKS 0x6c                  ; in segment 40h
%define MIDNIGHT 0x70
%define TICKS_PER_DAY 0x1800b0
%define CONFIGURATION 0xe6f5
%define DISKETTE 0xefc7
%define BOOT_DRIVE 0xffef
%define EXTENDED_AREA 0x0e          ; its segment, in segment 40h
%define END_OF_INTERRUPT 0x20

entries:
    dw timer, keyboard, disk, system, keys, nothing, end_first, end_second, clock, redirected, bootstrap, reset

timer:                              ; INT 08h, line 0
    push ax
    push dx
    push ds
    push word 0x40
    pop ds
    inc dword [TICKS]
    cmp dword [TICKS], TICKS_PER_DAY
    jb .today
    mov dword [TICKS], 0
    mov byte [MIDNIGHT], 1
.today:
    int 0x1c
    mov al, END_OF_INTERRUPT
    out 0x20, al
    pop ds
    pop dx
    pop ax
    iret

keyboard:                           ; INT 09h, line 1
    push ax
    in al, 0x60
    mov ah, 0x4f                    ; others may look at the code, change it or, with carry clear, take it
    stc
    int 0x15
    jnc .taken
    pushf
    push cs
    call STUB(0x09)                 ; its iret takes the three words
.taken:
    mov al, END_OF_INTERRUPT
    out 0x20, al
    pop ax
    iret

disk:                               ; INT 13h, 40h: AH=08h and AH=18h of a floppy return ES:DI
    cmp ah, 0x08
    je .table
    cmp ah, 0x18
    jne STUB(0x13)
.table:
    cmp dl, 0x80
    jae STUB(0x13)
    push word 0xf000
    pop es
    mov di, DISKETTE
    jmp STUB(0x13)

system:                             ; INT 15h: AH=C0h returns ES:BX, C1h ES; AH=86h waits with interrupts on
    cmp ah, 0x86
    je .wait
    cmp ah, 0xc1
    je .extended_area
    cmp ah, 0xc0
    jne STUB(0x15)
    push word 0xf000
    pop es
    mov bx, CONFIGURATION
    jmp STUB(0x15)
.extended_area:
    push word 0x40
    pop es
    mov es, [es:EXTENDED_AREA]
    jmp STUB(0x15)
.wait:
    sti
    jmp STUB(0x15)

keys:                               ; INT 16h may wait for a key: with interrupts on
    sti
    jmp STUB(0x16)

nothing:                            ; INT 1Ch: the users' own tick
    iret

end_first:                          ; lines 2 to 7
    push ax
    mov al, END_OF_INTERRUPT
    out 0x20, al
    pop ax
    iret

end_second:                         ; lines 10 to 14
    push ax
    mov al, END_OF_INTERRUPT
    out 0xa0, al
    out 0x20, al
    pop ax
    iret

clock:                              ; INT 70h, line 8
    push ax
    mov al, 0x0c
    out 0x70, al
    in al, 0x71
    test al, 0x20
    jz .no_alarm
    int 0x4a
.no_alarm:
    mov al, END_OF_INTERRUPT
    out 0xa0, al
    out 0x20, al
    pop ax
    iret

redirected:                         ; INT 71h, line 9: what line 2 was on the first PC
    push ax
    mov al, END_OF_INTERRUPT
    out 0xa0, al
    pop ax
    int 0x0a
    iret

bootstrap:                          ; INT 19h: the boot sector again, memory as it is
    xor ax, ax
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov sp, 0x7c00
    sti
    mov dl, [cs:BOOT_DRIVE]
    int 0x13                        ; AH=00h: reset
    mov ax, 0x0201
    mov bx, 0x7c00
    mov cx, 1
    mov dh, 0
    int 0x13
    jc .failed
    mov ax, 0xaa55
    jmp 0x0000:0x7c00
.failed:
    int 0x18

reset:                              ; FFFF:0: by the keyboard controller, as every reset here
    mov al, 0xfe
    out 0x64, al
    hlt
    jmp reset
