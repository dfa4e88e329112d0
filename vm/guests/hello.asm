; hello: a line on the first serial port, then the end by the exit port with code 0.
; 16-bit flat image at 0x10000: real mode, CS = DS = 0x1000.
bits 16
org 0
    cld
    mov si, text
.next:
    lodsb
    test al, al
    jz .done
    mov ah, al
    mov dx, 0x3fd                   ; line status: wait until the transmitter is empty
.wait:
    in al, dx
    test al, 0x20
    jz .wait
    mov al, ah
    mov dx, 0x3f8
    out dx, al
    jmp .next
.done:
    xor al, al
    mov dx, 0xf4
    out dx, al
.end:
    cli
    hlt
    jmp .end
text: db "Hello from a virtual machine of Mixvisor.", 13, 10, 0
