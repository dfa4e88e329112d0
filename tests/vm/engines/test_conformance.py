"""Conformance: small programs in 32-bit protected mode, and what a processor makes of each (Intel SDM).

A case is its source, the bytes that nasm makes of it (a test assembles them anew) and what must come of it:
the vector whose handler runs, and the words of the frame that it finds.  Handlers are HLTs, that of vector v at
HANDLERS + v.  The same cases run on the software engine and on KVM; a host whose KVM is PVM
refuses many of ring 0's instructions, by name (HOST_LIMIT), and mistakes those of ring 3: there only ring 0's are run.
PVM has no 32-bit paging.

LET_PASS is what goes through in software where accesses are not checked, ACCESSES what must come of it where they are.
"""

from __future__ import annotations

import os
import shutil
import signal
import struct
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mixvisor.vm.engines.base import RAX, RBX, RCX, RFLAGS, RIP, RSP, DescriptorTable, ExitReason, Segment
from mixvisor.vm.engines.entry import flat_state

CODE, HANDLERS, IDT, TSS, GDT, STACK, RING3_STACK = 0x10000, 0xC000, 0xD000, 0xE000, 0x7000, 0x8000, 0xB000
DIRECTORY, TABLE = 0x100000, 0x101000
BITMAP = 0x68
EIGHT_KIB_OF_PORTS = 0x2000
PVM = not {"vmx", "svm"} & set(Path("/proc/cpuinfo").read_text().split())
pytestmark = pytest.mark.skipif(os.sysconf("SC_PAGESIZE") != 4096, reason="made for pages of 4 KiB")


@dataclass(frozen=True)
class Case:
    """`frame`: the first words on the handler's stack. `page`: the entry for 300000h, `pde`: for 400000h. `bitmap`:
    bytes of the TSS's bitmap that allow ports, from and to.
    """

    name: str
    source: str
    code: str
    ring: int
    vector: int
    frame: tuple[int, ...] | None
    eax: int | None = None
    ecx: int | None = None
    memory: dict[int, str] = field(default_factory=dict)
    gdt: dict[int, int] = field(default_factory=dict)
    iopl: int = 0
    ports: list[tuple] | None = None
    bitmap: tuple[int, int] | None = None
    page: int = 0x300007
    pde: int = 0
    cr0: int = 0x8000_0011
    cr4: int = 0
    cr2: int | None = None
    pte: int | None = None
    pte_of_stack: int | None = None
    processor: int = 0


def case(name, source, code, ring, vector, frame, **more):
    return pytest.param(Case(name, source, code, ring, vector, frame, **more), id=name)


PLAIN = (
    case("ud2", "ud2", "0f0b", 0, 6, (0x10000, 8, 0x10002)),
    case("int3", "int3", "cc", 0, 3, (0x10001, 8, 2)),
    case("int1", "db 0xF1", "f1", 0, 1, (0x10001, 8, 2)),
    case("into", "mov al, 0x7F; inc al; into", "b07ffec0ce", 0, 4, (0x10005, 8, 0x892)),
    case("bound",
         "bound eax, [0x9000]",
         "620500900000",
         0, 5, (0x10000, 8, 0x10002), memory={0x9000: "01000000 02000000"}),
    case("divide by zero", "xor ecx, ecx; div ecx", "31c9f7f1", 0, 0, (0x10002, 8, 0x10046)),
    case("aam 0", "db 0xD4, 0", "d400", 0, 0, (0x10000, 8, 0x10002)),
    case("lock before a register", "db 0xF0, 0x40", "f040", 0, 6, (0x10000, 8, 0x10002)),
    case("lock cmp", "db 0xF0; cmp [0x9000], eax", "f0390500900000", 0, 6, (0x10000, 8, 0x10002)),
    case("single step",
         "pushfd; or dword [esp], 0x100; popfd; nop; nop",
         "9c810c24000100009d9090",
         0, 1, (0x1000a, 8, 0x102)),
    case("single step over mov cr0",
         "mov eax, cr0; pushfd; or dword [esp], 0x100; popfd; mov cr0, eax; nop",
         "0f20c09c810c24000100009d0f22c090",
         0, 1, (0x1000f, 8, 0x102)),
    case("int n of a stepping guest",
         "pushfd; or dword [esp], 0x100; popfd; int 0x30",
         "9c810c24000100009dcd30",
         0, 0x30, (0x1000b, 8, 0x102)),
    case("breakpoint of DR0",
         "mov eax, 0x10012; mov dr0, eax; mov eax, 0x401; mov dr7, eax; nop; nop; nop; nop; nop; nop; nop; nop",
         "b8120001000f23c0b8010400000f23f89090909090909090",
         0, 1, (0x10012, 8, 2)),
    case("fpu while TS",
         "mov eax, cr0; or eax, 8; mov cr0, eax; fninit",
         "0f20c083c8080f22c0dbe3",
         0, 7, (0x10009, 8, 0x10002)),
    case("clts",
         "mov eax, cr0; or eax, 8; mov cr0, eax; clts; fninit; int 0x50",
         "0f20c083c8080f22c00f06dbe3cd50",
         0, 0x50, (0x1000f, 8, 2)),
    case("wait while TS and MP",
         "mov eax, cr0; or eax, 10; mov cr0, eax; wait",
         "0f20c083c80a0f22c09b",
         0, 7, (0x10009, 8, 0x10006)),
    case("x87 error with NE",
         "mov eax, cr0; or eax, 0x20; mov cr0, eax; fninit; fldcw [0x9000]; fldz; fld1; fdivrp; fwait",
         "0f20c083c8200f22c0dbe3d92d00900000d9eed9e8def19b",
         0, 0x10, (0x10017, 8, 0x10002), memory={0x9000: "3B03"}),
    case("sse while OSFXSR is off", "movaps xmm0, xmm1", "0f28c1", 0, 6, (0x10000, 8, 0x10002)),
    case("16 bytes of instruction",
         "times 15 db 0x66; nop",
         "66666666666666666666666666666690",
         0, 0xd, (0, 0x10000, 8, 0x10002)),
    case("mov cr1", "db 0x0F, 0x22, 0xC8", "0f22c8", 0, 6, (0x10000, 8, 0x10002)),
    case("cr4 with bits that are not there",
         "mov eax, -1; mov cr4, eax",
         "b8ffffffff0f22e0",
         0, 0xd, (0, 0x10005, 8, 0x10002)),
    case("paging without protection",
         "mov eax, 0x80000000; mov cr0, eax",
         "b8000000800f22c0",
         0, 0xd, (0, 0x10005, 8, 0x10002)),
    case("not write-through without cache disable",
         "mov eax, 0x20000011; mov cr0, eax",
         "b8110000200f22c0",
         0, 0xd, (0, 0x10005, 8, 0x10002)),
    case("lmsw sets and does not clear PE",
         "mov eax, 10; lmsw ax; smsw eax; int 0x50",
         "b80a0000000f01f00f01e0cd50",
         0, 0x50, (0x1000d, 8, 2), eax=0x1b),
    case("lmsw from memory",
         "mov ebx, 0x9000; lmsw [ebx+4]; smsw eax; int 0x50",
         "bb009000000f0173040f01e0cd50",
         0, 0x50, (0x1000e, 8, 2), eax=0x19, memory={0x9004: "0800"}),
    case("rdmsr of nothing", "mov ecx, 0x12345; rdmsr", "b9452301000f32", 0, 0xd, (0, 0x10005, 8, 0x10002)),
    case("wrmsr of nothing", "mov ecx, 0x12345; wrmsr", "b9452301000f30", 0, 0xd, (0, 0x10005, 8, 0x10002)),
    case("efer with bits that are not there",
         "mov ecx, 0xC0000080; mov eax, -1; wrmsr",
         "b9800000c0b8ffffffff0f30",
         0, 0xd, (0, 0x1000a, 8, 0x10002)),
    case("efer is written",
         "mov ecx, 0xC0000080; mov eax, 1; xor edx, edx; wrmsr; rdmsr; int 0x50",
         "b9800000c0b80100000031d20f300f32cd50",
         0, 0x50, (0x10012, 8, 0x46), eax=1),
    case("sysenter's registers are kept",
         "mov ecx, 0x175; mov eax, 0x1234; xor edx, edx; wrmsr; xor eax, eax; rdmsr; int 0x50",
         "b975010000b83412000031d20f3031c00f32cd50",
         0, 0x50, (0x10014, 8, 0x46), eax=0x1234),
    case("dr4 with CR4.DE",
         "mov eax, 8; mov cr4, eax; mov eax, dr4",
         "b8080000000f22e00f21e0",
         0, 6, (0x10008, 8, 0x10002)),
    case("selector beyond the table",
         "mov ax, 0x1000; mov ds, ax",
         "66b800108ed8",
         0, 0xd, (0x1000, 0x10004, 8, 0x10002)),
    case("ss of nothing", "xor eax, eax; mov ss, ax", "31c08ed0", 0, 0xd, (0, 0x10002, 8, 0x10046)),
    case("segment that is absent",
         "mov ax, 0x40; mov ds, ax",
         "66b840008ed8",
         0, 0xb, (0x40, 0x10004, 8, 0x10002), gdt={8: 0x40120060000fff}),
    case("stack segment that is absent",
         "mov ax, 0x40; mov ss, ax",
         "66b840008ed0",
         0, 0xc, (0x40, 0x10004, 8, 0x10002), gdt={8: 0x40120060000fff}),
    case("mov to cs", "db 0x8E, 0xC8", "8ec8", 0, 6, (0x10000, 8, 0x10002)),
    case("the accessed bit is set",
         "mov ax, 0x40; mov ds, ax; mov eax, [es:0x7044]; int 0x50",
         "66b840008ed826a144700000cd50",
         0, 0x50, (0x1000e, 8, 2), eax=0x409300, gdt={8: 0x40920060000fff}),
    case("far jump beyond the limit of code",
         "jmp 0x40:0x2000",
         "ea002000004000",
         0, 0xd, (0, 0x10000, 8, 0x10002), gdt={8: 0x409a0000000fff}),
    case("task register that is busy", "mov ax, 0x38; ltr ax", "66b838000f00d8", 0, 0xd, (0x38, 0x10004, 8, 0x10002)),
    case("local table",
         "mov ax, 0x40; lldt ax; mov ax, 7; mov fs, ax; mov eax, [fs:0]; int 0x50",
         "66b840000f00d066b807008ee064a100000000cd50",
         0, 0x50, (0x10015, 8, 2), eax=0xcafe, gdt={8: 0x82009000000f},
         memory={0x9000: "FF0F0050 00F24000", 0x5000: "FECA0000"}),
    case("arpl",
         "mov ax, 0x10; mov bx, 3; arpl ax, bx; int 0x50",
         "66b8100066bb030063d8cd50",
         0, 0x50, (0x1000c, 8, 0x42), eax=0x13),
    case("lar, lsl",
         "mov ebx, 8; lar eax, ebx; and eax, 0xF0FF00; lsl ecx, ebx; sub eax, ecx; int 0x50",
         "bb080000000f02c32500fff0000f03cb29c8cd50",
         0, 0x50, None, eax=0xc09b01),
    case("null selector of iret",
         "push 2; push 0; push 0; iretd",
         "6a026a006a00cf",
         0, 0xd, (0, 0x10006, 8, 0x10002)),
    case("iret with NT",
         "pushfd; or dword [esp], 0x4000; popfd; push 2; push 8; push 0x10013; iretd",
         "9c810c24004000009d6a026a086813000100cf",
         0, 0xa, (0, 0x10012, 8, 0x14002)),
    case("retf to ring 3",
         "push 0x23; push 0xB000; push 0x1B; push 0x10011; retf; nop; nop; int 0x50",
         "6a236800b000006a1b6811000100cb9090cd50",
         0, 0x50, (0x10013, 0x1b, 2, 0xb000, 0x23)),
    case("retf 4 to ring 3",
         "push 0x23; push 0xB000; push 0; push 0x1B; push 0x10014; retf 4; nop; int 0x50",
         "6a236800b000006a006a1b6814000100ca040090cd50",
         0, 0x50, (0x10016, 0x1b, 2, 0xb004, 0x23)),
    case("iret to ring 3",
         "push 0x23; push 0xB000; push 0x202; push 0x1B; push 0x10015; iretd; nop; int 0x50",
         "6a236800b0000068020200006a1b6815000100cf90cd50",
         0, 0x50, (0x10017, 0x1b, 0x202, 0xb000, 0x23)),
    case("iret to ring 3 with ring 0's stack",
         "push 0x10; push 0xB000; push 0x202; push 0x1B; push 0x10015; iretd",
         "6a106800b0000068020200006a1b6815000100cf",
         0, 0xd, (0x10, 0x10013, 8, 0x10002)),
    case("data segments are lost on the way out",
         "push 0x23; push 0xB000; push 0x202; push 0x1B; push 0x10015; iretd; nop; mov eax, ds; int 0x50",
         "6a236800b0000068020200006a1b6815000100cf908cd8cd50",
         0, 0x50, (0x10019, 0x1b, 0x202, 0xb000, 0x23), eax=0),
    case("retf to an inner ring",
         "push 8; push 0x10000; retf",
         "6a086800000100cb",
         3, 0xd, (8, 0x10007, 0x1b, 0x10002, 0xaff8)),
    case("int from ring 3", "int 0x50", "cd50", 3, 0x50, (0x10002, 0x1b, 2, 0xb000, 0x23)),
    case("int from ring 3 through a gate of ring 0",
         "int 13",
         "cd0d",
         3, 0xd, (0x6a, 0x10000, 0x1b, 0x10002, 0xb000)),
    case("int through a gate that is absent",
         "int 0x21",
         "cd21",
         0, 0xb, (0x10a, 0x10000, 8, 0x10002), memory={0xd10d: "0E"}),
    case("call gate to ring 0 with two parameters",
         "push 0x11111111; push 0x22222222; call 0x40:0",
         "681111111168222222229a000000004000",
         3, 0x60, (0x10011, 0x1b, 0x22222222, 0x11111111, 0xaff8, 0x23), gdt={8: 0xec020008c060}),
    case("16-bit call gate to ring 0",
         "push word 0x1111; push word 0x2222; call 0x40:0",
         "66681111666822229a000000004000",
         3, 0x60, (0x1b000f, 0x11112222, 0x23affc), gdt={8: 0xe4020008c060}),
    case("call gate of ring 0 from ring 3",
         "call 0x40:0",
         "9a000000004000",
         3, 0xd, (0x40, 0x10000, 0x1b, 0x10002), gdt={8: 0x8c000008c060}),
    case("call gate that is absent",
         "call 0x40:0",
         "9a000000004000",
         3, 0xb, (0x40, 0x10000, 0x1b, 0x10002), gdt={8: 0x6c000008c060}),
    case("call gate within ring 0", "call 0x40:0", "9a000000004000", 0, 0x60, (0x10007, 8), gdt={8: 0xec000008c060}),
    case("far jump to ring 0", "jmp 8:0xC061", "ea61c000000800", 3, 0xd, (8, 0x10000, 0x1b, 0x10002)),
    case("jump to a task",
         "jmp 0x40:0",
         "ea000000004000",
         0, 0x61, None, gdt={8: 0x890090000067},
         memory={0x9020: "61C00000 02000000", 0x9038: "00700000",
                 0x9048: "10000000 08000000 10000000 10000000 00000000 00000000"}),
    case("virtual-8086 mode and out of it by int",
         "push 0; push 0; push 0; push 0; push 0xB00; push 0x100; push 0x23002; push 0x1000; "
         "push 0x1F; iretd; db 0xCD, 0x50",
         "6a006a006a006a0068000b00006800010000680230020068001000006a1fcfcd50",
         0, 0x50, (0x21, 0x1000, 0x23002, 0x100, 0xb00)),
    case("int in virtual-8086 mode needs IOPL 3",
         "push 0; push 0; push 0; push 0; push 0xB00; push 0x100; push 0x20002; push 0x1000; "
         "push 0x1F; iretd; db 0xCD, 0x50",
         "6a006a006a006a0068000b00006800010000680200020068001000006a1fcfcd50",
         0, 0xd, (0, 0x1f, 0x1000, 0x30002)),
    case("ring 3: hlt", "hlt", "f4", 3, 0xd, (0, 0x10000, 0x1b, 0x10002, 0xb000)),
    case("ring 3: cli", "cli", "fa", 3, 0xd, (0, 0x10000, 0x1b, 0x10002, 0xb000)),
    case("ring 3: sti", "sti", "fb", 3, 0xd, (0, 0x10000, 0x1b, 0x10002, 0xb000)),
    case("ring 3: clts", "clts", "0f06", 3, 0xd, (0, 0x10000, 0x1b, 0x10002, 0xb000)),
    case("ring 3: lgdt [m]", "lgdt [0x9000]", "0f011500900000", 3, 0xd, (0, 0x10000, 0x1b, 0x10002, 0xb000)),
    case("ring 3: lidt [m]", "lidt [0x9000]", "0f011d00900000", 3, 0xd, (0, 0x10000, 0x1b, 0x10002, 0xb000)),
    case("ring 3: ltr ax", "ltr ax", "0f00d8", 3, 0xd, (0, 0x10000, 0x1b, 0x10002, 0xb000)),
    case("ring 3: lldt ax", "lldt ax", "0f00d0", 3, 0xd, (0, 0x10000, 0x1b, 0x10002, 0xb000)),
    case("ring 3: lmsw ax", "lmsw ax", "0f01f0", 3, 0xd, (0, 0x10000, 0x1b, 0x10002, 0xb000)),
    case("ring 3: mov eax, cr0", "mov eax, cr0", "0f20c0", 3, 0xd, (0, 0x10000, 0x1b, 0x10002, 0xb000)),
    case("ring 3: mov cr0, eax", "mov cr0, eax", "0f22c0", 3, 0xd, (0, 0x10000, 0x1b, 0x10002, 0xb000)),
    case("ring 3: mov dr0, eax", "mov dr0, eax", "0f23c0", 3, 0xd, (0, 0x10000, 0x1b, 0x10002, 0xb000)),
    case("ring 3: rdmsr", "rdmsr", "0f32", 3, 0xd, (0, 0x10000, 0x1b, 0x10002, 0xb000)),
    case("ring 3: wrmsr", "wrmsr", "0f30", 3, 0xd, (0, 0x10000, 0x1b, 0x10002, 0xb000)),
    case("ring 3: invd", "invd", "0f08", 3, 0xd, (0, 0x10000, 0x1b, 0x10002, 0xb000)),
    case("ring 3: wbinvd", "wbinvd", "0f09", 3, 0xd, (0, 0x10000, 0x1b, 0x10002, 0xb000)),
    case("ring 3: invlpg [0]", "invlpg [0]", "0f013d00000000", 3, 0xd, (0, 0x10000, 0x1b, 0x10002, 0xb000)),
    case("ring 3: in al, 0x64", "in al, 0x64", "e464", 3, 0xd, (0, 0x10000, 0x1b, 0x10002, 0xb000)),
    case("ring 3: out 0x64, al", "out 0x64, al", "e664", 3, 0xd, (0, 0x10000, 0x1b, 0x10002, 0xb000)),
    case("ring 3: insb", "insb", "6c", 3, 0xd, (0, 0x10000, 0x1b, 0x10002, 0xb000)),
    case("ring 3: outsd", "outsd", "6f", 3, 0xd, (0, 0x10000, 0x1b, 0x10002, 0xb000)),
    case("popf in ring 3 keeps IF and IOPL",
         "push 0x3202; popfd; pushfd; pop eax; int 0x50",
         "68023200009d9c58cd50",
         3, 0x50, None, eax=2),
    case("ports by IOPL",
         "in al, 0x64; int 0x50",
         "e464cd50",
         3, 0x50, (0x10004, 0x1b, 0x3002, 0xb000, 0x23), iopl=3, ports=[("in", 0x64, 1)]),
    case("ports by the bitmap",
         "in al, 0x64; int 0x50",
         "e464cd50",
         3, 0x50, (0x10004, 0x1b, 2, 0xb000, 0x23), bitmap=(0, 0xd), ports=[("in", 0x64, 1)]),
    case("ports of which the bitmap denies one byte",
         "in eax, 0x66",
         "e566",
         3, 0xd, (0, 0x10000, 0x1b, 0x10002), bitmap=(0, 0xd), ports=[]),
    case("rep outs by the bitmap",
         "mov esi, 0x9000; mov ecx, 2; mov edx, 0x64; rep outsb; int 0x50",
         "be00900000b902000000ba64000000f36ecd50",
         3, 0x50, None, bitmap=(0, 0xd), ports=[("out", 0x64, 1, 0), ("out", 0x64, 1, 0)]),
    case("an instruction changes the next",
         "mov byte [0x10008], 0x77; mov al, 0x11; int 0x50",
         "c6050800010077b011cd50",
         0, 0x50, None, eax=0x77),
    case("a loop changes itself",
         "mov ecx, 5; inc byte [0x1000C]; mov al, 0x10; loop 0x10005; int 0x50",
         "b905000000fe050c000100b010e2f6cd50",
         0, 0x50, None, eax=0x15),
    case("movs over what comes next",
         "mov edi, 0x10011; mov esi, 0x9000; mov ecx, 4; rep movsb; nop; nop; nop; nop; int 0x50",
         "bf11000100be00900000b904000000f3a490909090cd50",
         0, 0x50, None, eax=0x605, memory={0x9000: "B005B406"}),
)

PAGED = (
    case("a read sets accessed", "mov eax, [0x300000]; int 0x50", "a100003000cd50", 0, 0x50, None, pte=0x300027),
    case("a write sets dirty, also after a read",
         "mov eax, [0x300000]; mov [0x300000], eax; int 0x50",
         "a100003000a300003000cd50",
         0, 0x50, None, pte=0x300067),
    case("read of an absent page",
         "mov eax, [0x300004]",
         "a104003000",
         0, 0xe, (0, 0x10000, 8, 0x10002), page=0, cr2=0x300004, pte=0),
    case("write of an absent page",
         "mov [0x300004], eax",
         "a304003000",
         0, 0xe, (2, 0x10000, 8, 0x10002), page=0, cr2=0x300004),
    case("read of an absent page in ring 3",
         "mov eax, [0x300004]",
         "a104003000",
         3, 0xe, (4, 0x10000, 0x1b, 0x10002), page=0, cr2=0x300004),
    case("ring 0 writes a read-only page",
         "mov [0x300004], eax; int 0x50",
         "a304003000cd50",
         0, 0x50, None, page=0x300005, pte=0x300065),
    case("ring 0 writes a read-only page with WP",
         "mov [0x300004], eax",
         "a304003000",
         0, 0xe, (3, 0x10000, 8, 0x10002), page=0x300005, cr0=0x80010011),
    case("ring 3 writes a read-only page",
         "mov [0x300004], eax",
         "a304003000",
         3, 0xe, (7, 0x10000, 0x1b, 0x10002), page=0x300005),
    case("ring 3 reads a page of ring 0",
         "mov eax, [0x300004]",
         "a104003000",
         3, 0xe, (5, 0x10000, 0x1b, 0x10002), page=0x300003),
    case("ring 3 runs a page of ring 0",
         "mov eax, 0x300000; jmp eax",
         "b800003000ffe0",
         3, 0xe, (5, 0x300000, 0x1b, 0x10002), page=0x300003, cr2=0x300000),
    case("a page of 4 MiB",
         "mov eax, [0x409000]; int 0x50",
         "a100904000cd50",
         0, 0x50, None, pde=0x87, cr4=0x10, eax=0xcafe, memory={0x9000: "FECA0000"}),
    case("a reserved bit of a page of 4 MiB",
         "mov eax, [0x409000]",
         "a100904000",
         0, 0xe, (9, 0x10000, 8, 0x10002), pde=0x200087, cr4=0x10),
    case("a read across into an absent page",
         "mov eax, [0x2FFFFE]",
         "a1feff2f00",
         0, 0xe, (0, 0x10000, 8, 0x10002), page=0, cr2=0x300000),
    case("movs stops at the absent page",
         "mov esi, 0x9000; mov edi, 0x2FFFF0; mov ecx, 0x20; rep movsb",
         "be00900000bff0ff2f00b920000000f3a4",
         0, 0xe, (2, 0x1000f, 8, 0x10002), page=0, cr2=0x300000, ecx=0x10),
    case("invlpg",
         "mov eax, [0x300000]; mov dword [0x101C00], 0; invlpg [0x300000]; mov eax, [0x300000]",
         "a100003000c705001c1000000000000f013d00003000a100003000",
         0, 0xe, (0, 0x10016, 8, 0x10002), cr2=0x300000),
    case("cr3 is loaded anew",
         "mov eax, [0x300000]; mov dword [0x101C00], 0; mov eax, cr3; mov cr3, eax; mov eax, [0x300000]",
         "a100003000c705001c1000000000000f20d80f22d8a100003000",
         0, 0xe, (0, 0x10015, 8, 0x10002), cr2=0x300000),
    case("paging is switched on",
         "mov eax, 0x100000; mov cr3, eax; mov eax, 0x80000011; mov cr0, eax; mov eax, [0x300000]; int 0x50",
         "b8000010000f22d8b8110000800f22c0a100003000cd50",
         0, 0x50, None, cr0=0x11, pte=0x300027),
    case("a frame marks its stack",
         "int 0x50",
         "cd50",
         3, 0x50, (0x10002, 0x1b, 2, 0xb000, 0x23), pte_of_stack=0x7067),
    case("code changed by its other mapping",
         "call 0x10100; mov byte [0x300101], 0x77; call 0x10100; int 0x50",
         "e8fb000000c6050101300077e8ef000000cd50",
         0, 0x50, None, page=0x10007, eax=0x77, memory={0x10100: "B011C3"}),
)

# What the software engine lets pass: it reaches vector 50h; what a processor does is beside it.
LET_PASS = (
    case("a null segment is used",
         "xor eax, eax; mov ds, ax; mov eax, [0x9000]; int 0x50",
         "31c08ed8a100900000cd50",
         0, 0x50, (0, 0x10004, 8, 0x10046)),
    case("access beyond a limit",
         "mov ax, 0x40; mov ds, ax; mov eax, [0x2000]; int 0x50",
         "66b840008ed8a100200000cd50",
         0, 0x50, (0, 0x10006, 8, 0x10002), gdt={8: 0x40920060000fff}),
    case("write to a read-only segment",
         "mov ax, 0x40; mov ds, ax; mov [0], eax; int 0x50",
         "66b840008ed8a300000000cd50",
         0, 0x50, (0, 0x10006, 8, 0x10002), gdt={8: 0x40900060000fff}),
    case("unaligned movaps",
         "mov eax, 0x600; mov cr4, eax; movaps xmm0, [0x9001]; int 0x50",
         "b8000600000f22e00f280501900000cd50",
         0, 0x50, (0, 0x10008, 8, 0x10002)),
)

# What a processor checks at each access, and what is not to be taken for it (`processor` 50h).
ACCESSES = (
    *LET_PASS,
    case("lock before mov",
         "lock mov [0x9000], eax; int 0x50",
         "f0a300900000cd50",
         0, 0x50, (0x10000, 8, 0x10002), processor=6),
    case("write beyond a limit",
         "mov ax, 0x40; mov ds, ax; mov [0xFFD], eax; int 0x50",
         "66b840008ed8a3fd0f0000cd50",
         0, 0x50, (0, 0x10006, 8), gdt={8: 0x40920000000fff}),
    case("the last bytes within a limit",
         "mov ax, 0x40; mov ds, ax; mov eax, [0xFFC]; mov [0xFFC], eax; mov al, [0xFFF]; int 0x50",
         "66b840008ed8a1fc0f0000a3fc0f0000a0ff0f0000cd50",
         0, 0x50, None, processor=0x50, gdt={8: 0x40920000000fff}),
    case("an offset that wraps",
         "mov ax, 0x40; mov ds, ax; mov eax, [-1]; int 0x50",
         "66b840008ed8a1ffffffffcd50",
         0, 0x50, (0, 0x10006, 8), gdt={8: 0x40920000000fff}),
    case("below the limit of an expand-down segment",
         "mov ax, 0x40; mov ds, ax; mov eax, [0xFFC]; int 0x50",
         "66b840008ed8a1fc0f0000cd50",
         0, 0x50, (0, 0x10006, 8), gdt={8: 0x40960000000fff}),
    case("above the limit of an expand-down segment",
         "mov ax, 0x40; mov ds, ax; mov eax, [0x1000]; int 0x50",
         "66b840008ed8a100100000cd50",
         0, 0x50, None, processor=0x50, gdt={8: 0x40960000000fff}),
    case("write to code",
         "mov [cs:0x9000], eax; int 0x50",
         "2ea300900000cd50",
         0, 0x50, (0, 0x10000, 8)),
    case("read-only: add",
         "mov ax, 0x40; mov ds, ax; add [0], eax; int 0x50",
         "66b840008ed8010500000000cd50",
         0, 0x50, (0, 0x10006, 8), gdt={8: 0x40900000000fff}),
    case("read-only: cmp, bt, push",
         "mov ax, 0x40; mov ds, ax; cmp [0], eax; bt [0], eax; push dword [0]; int 0x50",
         "66b840008ed83905000000000fa30500000000ff3500000000cd50",
         0, 0x50, None, processor=0x50, gdt={8: 0x40900000000fff}),
    case("read-only: bts",
         "mov ax, 0x40; mov ds, ax; bts [0], ecx; int 0x50",
         "66b840008ed80fab0d00000000cd50",
         0, 0x50, (0, 0x10006, 8), gdt={8: 0x40900000000fff}),
    case("null fs",
         "xor eax, eax; mov fs, ax; mov eax, [fs:0x9000]; int 0x50",
         "31c08ee064a100900000cd50",
         0, 0x50, (0, 0x10004, 8)),
    case("pop beyond a stack's limit",
         "mov ax, 0x40; mov ss, ax; mov esp, 0xFFE; pop eax; int 0x50",
         "66b840008ed0bcfe0f000058cd50",
         0, 0x50, (0, 0x1000b, 8), processor=0xc, gdt={8: 0x40920000000fff}),
    case("ebp is on the stack",
         "mov ax, 0x40; mov ss, ax; mov esp, 0xF00; mov ebp, 0x1000; mov eax, [ebp]; int 0x50",
         "66b840008ed0bc000f0000bd001000008b4500cd50",
         0, 0x50, (0, 0x10010, 8), processor=0xc, gdt={8: 0x40920000000fff}),
    case("leave beyond a stack's limit",
         "mov ax, 0x40; mov ss, ax; mov esp, 0xF00; mov ebp, 0x1000; leave; int 0x50",
         "66b840008ed0bc000f0000bd00100000c9cd50",
         0, 0x50, (0, 0x10010, 8), processor=0xc, gdt={8: 0x40920000000fff}),
    case("rep stosd up to a limit",
         "mov ax, 0x40; mov es, ax; mov edi, 0xFF0; mov ecx, 8; rep stosd; int 0x50",
         "66b840008ec0bff00f0000b908000000f3abcd50",
         0, 0x50, (0, 0x10010, 8), gdt={8: 0x40920000000fff}, ecx=4),
    case("rep movsb of nothing",
         "mov ax, 0x40; mov es, ax; mov edi, 0x2000; xor ecx, ecx; rep movsb; int 0x50",
         "66b840008ec0bf0020000031c9f3a4cd50",
         0, 0x50, None, processor=0x50, gdt={8: 0x40920000000fff}),
    case("lodsd beyond a limit",
         "mov ax, 0x40; mov ds, ax; mov esi, 0xFFD; lodsd; int 0x50",
         "66b840008ed8befd0f0000adcd50",
         0, 0x50, (0, 0x1000b, 8), gdt={8: 0x40920000000fff}),
    case("a bit beyond a limit",
         "mov ax, 0x40; mov ds, ax; mov eax, 0x8000; bts [0], eax; int 0x50",
         "66b840008ed8b8008000000fab0500000000cd50",
         0, 0x50, (0, 0x1000b, 8), gdt={8: 0x40920000000fff}),
    case("a bit before an operand",
         "mov ax, 0x40; mov ds, ax; mov eax, -8; mov byte [0xFFF], 0; bts [0x1000], eax; "
         "bt dword [0xFFC], 24; setc cl; movzx ecx, cl; int 0x50",
         "66b840008ed8b8f8ffffffc605ff0f0000000fab05001000000fba25fc0f0000180f92c10fb6c9cd50",
         0, 0x50, None, processor=0x50, gdt={8: 0x40920000001fff}, ecx=1),
    case("xlat beyond a limit",
         "mov ax, 0x40; mov ds, ax; mov ebx, 0xFFF; mov al, 1; xlatb; int 0x50",
         "66b840008ed8bbff0f0000b001d7cd50",
         0, 0x50, (0, 0x1000d, 8), gdt={8: 0x40920000000fff}),
    case("a far pointer beyond a limit",
         "mov ax, 0x40; mov ds, ax; les edi, [0xFFC]; int 0x50",
         "66b840008ed8c43dfc0f0000cd50",
         0, 0x50, (0, 0x10006, 8), gdt={8: 0x40920000000fff}),
    case("an index with a scale",
         "mov ax, 0x40; mov ds, ax; mov ecx, 0x400; mov eax, [ecx*4-3]; int 0x50",
         "66b840008ed8b9000400008b048dfdffffffcd50",
         0, 0x50, (0, 0x1000b, 8), gdt={8: 0x40920000000fff}),
    case("16-bit addressing wraps within 64 KiB",
         "mov ax, 0x40; mov ds, ax; mov bx, 0xFFFF; mov si, 0x10; mov eax, [bx+si]; int 0x50",
         "66b840008ed866bbffff66be1000678b00cd50",
         0, 0x50, None, processor=0x50, gdt={8: 0x40920000000fff}),
    case("lea asks no limit",
         "mov ax, 0x40; mov ds, ax; lea eax, [0x123456]; int 0x50",
         "66b840008ed88d0556341200cd50",
         0, 0x50, None, processor=0x50, gdt={8: 0x40920000000fff}),
    case("lock cmp",
         "lock cmp [0x9000], eax; int 0x50",
         "f0390500900000cd50",
         0, 0x50, (0x10000, 8), processor=0x6),
    case("lock xchg, cmpxchg8b",
         "lock xchg [0x9000], eax; lock cmpxchg8b [0x9000]; int 0x50",
         "f0870500900000f00fc70d00900000cd50",
         0, 0x50, None, processor=0x50),
    case("unaligned addps",
         "mov eax, 0x600; mov cr4, eax; addps xmm0, [0x9008]; int 0x50",
         "b8000600000f22e00f580508900000cd50",
         0, 0x50, (0, 0x10008, 8)),
    case("unaligned movups",
         "mov eax, 0x600; mov cr4, eax; movups xmm0, [0x9001]; movups [0x9001], xmm0; int 0x50",
         "b8000600000f22e00f1005019000000f110501900000cd50",
         0, 0x50, None, processor=0x50),
    case("unaligned fxsave",
         "mov eax, 0x600; mov cr4, eax; fxsave [0x9008]; int 0x50",
         "b8000600000f22e00fae0508900000cd50",
         0, 0x50, (0, 0x10008, 8)),
)


def built(make, engine, case: Case, *, paged: bool = False):
    machine = make(engine, 4 << 20)
    gates = b"".join(struct.pack("<HHBBH", HANDLERS + vector, 8, 0, 0xEE if vector >= 0x20 else 0x8E, 0)
                     for vector in range(256))
    machine.poke(IDT, gates)
    machine.poke(HANDLERS, b"\xF4" * 256)
    machine.poke(CODE, bytes.fromhex(case.code))
    state = flat_state(machine.memory, 32, CODE)
    descriptors = [*struct.unpack_from("<5Q", machine.memory, GDT), 0, 0,
                   0x8B << 40 | TSS << 16 | BITMAP + EIGHT_KIB_OF_PORTS, *[0] * 8]
    for number, value in case.gdt.items():
        descriptors[number] = value
    machine.poke(GDT, struct.pack("<16Q", *descriptors))
    state.gdt, state.idt = DescriptorTable(GDT, 16 * 8 - 1), DescriptorTable(IDT, 256 * 8 - 1)
    state.tr = Segment(selector=0x38, base=TSS, limit=BITMAP + EIGHT_KIB_OF_PORTS, type=11, s=False)
    machine.poke(TSS + 4, struct.pack("<II", STACK, 0x10))
    machine.poke(TSS + 0x66, struct.pack("<H", BITMAP))
    machine.poke(TSS + BITMAP, b"\xFF" * 64)
    if case.bitmap is not None:
        first, end = case.bitmap
        machine.poke(TSS + BITMAP + first, bytes(end - first))
    if case.ring == 3:
        flat = {"limit": 0xFFFF_FFFF, "dpl": 3, "g": True, "db": True}
        state.cs = Segment(selector=0x1B, type=11, **flat)
        for name in ("ds", "es", "fs", "gs", "ss"):
            setattr(state, name, Segment(selector=0x23, **flat))
        state.gpr[RSP] = RING3_STACK
    state.gpr[RFLAGS] |= case.iopl << 12
    if paged:
        machine.poke(TABLE, b"".join(struct.pack("<I", page << 12 | 7) for page in range(1024)))
        machine.poke(TABLE + 0x300 * 4, struct.pack("<I", case.page))
        machine.poke(DIRECTORY, struct.pack("<II", TABLE | 7, case.pde))
        state.cr0, state.cr3, state.cr4 = case.cr0, DIRECTORY, case.cr4
    for address, data in case.memory.items():
        machine.poke(address, bytes.fromhex(data))
    machine.cpu.set_state(state)
    signal.setitimer(signal.ITIMER_REAL, 5)
    return machine


def check(machine, case: Case, vector: int, frame: tuple[int, ...] | None) -> None:
    gpr = machine.cpu.get_gpr()
    assert gpr[RIP] - 1 - HANDLERS == vector, hex(gpr[RIP])
    if frame is not None:
        assert struct.unpack_from(f"<{len(frame)}I", machine.memory, gpr[RSP] & 0xFFFF_FFFF) == frame
    for expected, register in ((case.eax, RAX), (case.ecx, RCX)):
        if expected is not None:
            assert gpr[register] & 0xFFFF_FFFF == expected
    if case.ports is not None:
        assert machine.bus.log == case.ports
    if case.cr2 is not None:
        assert machine.cpu.get_state().cr2 == case.cr2
    for expected, page in ((case.pte, 0x300), (case.pte_of_stack, 7)):
        if expected is not None:
            assert struct.unpack_from("<I", machine.memory, TABLE + page * 4)[0] == expected


@pytest.mark.parametrize("case", PLAIN)
def test_a_program_does_as_the_manual_says(make, real_engine, case):
    if real_engine == "kvm" and PVM and case.ring == 3:
        return                                   # it takes most instructions of ring 3 for invalid there
    machine = built(make, real_engine, case)
    result = machine.cpu.run()
    if real_engine == "kvm" and PVM and result.reason is ExitReason.HOST_LIMIT:
        assert "this host's KVM cannot run `" in result.detail
        return
    assert result.reason is ExitReason.HALTED, result
    check(machine, case, case.vector, case.frame)


@pytest.mark.parametrize("case", PAGED)
def test_a_program_under_paging_does_as_the_manual_says(make, real_engine, case):
    if real_engine == "kvm" and PVM:
        return                                   # PVM has no 32-bit paging
    machine = built(make, real_engine, case, paged=True)
    result = machine.cpu.run()
    assert result.reason is ExitReason.HALTED, result
    check(machine, case, case.vector, case.frame)


@pytest.mark.parametrize("case", PLAIN)
def test_a_program_does_the_same_where_accesses_are_not_checked(make, case):
    machine = built(make, "unchecked", case)
    assert machine.cpu.run().reason is ExitReason.HALTED
    check(machine, case, case.vector, case.frame)


@pytest.mark.parametrize("case", ACCESSES)
def test_an_access_does_as_the_manual_says(make, real_engine, case):
    machine = built(make, real_engine, case)
    result = machine.cpu.run()
    if real_engine == "kvm" and PVM and result.reason is ExitReason.HOST_LIMIT:
        assert "this host's KVM cannot run `" in result.detail
        return
    assert result.reason is ExitReason.HALTED, result
    check(machine, case, case.processor or 13, case.frame)


@pytest.mark.parametrize("case", LET_PASS)
def test_what_is_let_pass_where_accesses_are_not_checked(make, case):
    machine = built(make, "unchecked", case)
    assert machine.cpu.run().reason is ExitReason.HALTED
    check(machine, case, case.vector, None)


def halting_handlers(machine, *vectors: int) -> None:
    """In the table of real mode: that of vector v is a HLT at 0:600h + v."""
    for vector in vectors:
        machine.poke(vector * 4, struct.pack("<HH", 0x600 + vector, 0))
        machine.poke(0x600 + vector, b"\xF4")


@pytest.mark.parametrize(("code", "vector"), [
    ("a1ffff", 13),                          # mov ax, [0FFFFh]
    ("a0ffff cd50", 0x50),                   # mov al, [0FFFFh]
    ("bbffff 8907", 13),                     # mov bx, 0FFFFh; mov [bx], ax
    ("bc0100 50", 12),                       # mov sp, 1; push ax
    ("bcffff 58", 12),                       # mov sp, 0FFFFh; pop ax
    ("bc0000 50 cd50", 0x50),                # mov sp, 0; push ax: at its other end
    ("66b800000100 67668b00", 13),           # mov eax, 10000h; mov eax, [eax]
    ("bcfeff cb", 12),                       # mov sp, 0FFFEh; retf
    ("bcfcff cf", 12),                       # mov sp, 0FFFCh; iret
])
def test_the_end_of_a_segment_of_real_mode(make, real_engine, code, vector):
    machine = make(real_engine, 4 << 20)
    machine.load(code + "f4")
    halting_handlers(machine, 12, 13, 0x50)
    result = machine.cpu.run()
    if code.startswith("bc0100") and not (real_engine == "kvm" and PVM):
        assert result.reason is ExitReason.TRIPLE_FAULT        # nor is there room for the frame of #SS (SDM, PUSH)
        return
    assert result.reason is ExitReason.HALTED, result
    assert machine.cpu.get_gpr()[RIP] == 0x601 + vector


@pytest.mark.parametrize(("stack", "ended"), [
    (1, "TRIPLE_FAULT"), (3, "TRIPLE_FAULT"), (5, "TRIPLE_FAULT"), (7, "HALTED"), (0, "HALTED"), (2, "HALTED"),
    (4, "HALTED")])
def test_an_interrupt_of_real_mode_that_finds_no_room_ends_in_a_triple_fault(make, real_engine, stack, ended):
    if real_engine == "kvm" and PVM:
        return                                   # which pushes on
    machine = make(real_engine, 4 << 20)
    machine.load("cd50")
    halting_handlers(machine, 8, 12, 13, 0x50)
    state = machine.cpu.get_state()
    state.gpr[RSP] = stack
    machine.cpu.set_state(state)
    assert machine.cpu.run().reason.name == ended
    if ended == "HALTED":
        assert machine.cpu.get_gpr()[RSP] == (stack - 6) & 0xFFFF
        words = [struct.unpack_from("<H", machine.memory, (stack - at) & 0xFFFF)[0] for at in (2, 4, 6)]
        assert words == [2, 0, 0x7C02]


@pytest.mark.parametrize(("flags", "limit", "stack", "ended"), [
    (0x40, 0xFFF, 0x1000, "HALTED"), (0x40, 0xFFF, 12, "HALTED"), (0x40, 0xFFF, 8, "TRIPLE_FAULT"),
    (0x40, 0xFFF, 0x1004, "TRIPLE_FAULT"), (0x44, 0xFFF, 0x100C, "HALTED"), (0x44, 0xFFF, 0x1008, "TRIPLE_FAULT"),
    (0, 0xFFFF, 0, "HALTED"), (0, 0xFFFF, 4, "HALTED"), (0, 0xFFFF, 2, "TRIPLE_FAULT")])
def test_an_interrupt_that_finds_no_room_ends_in_a_triple_fault(make, real_engine, flags, limit, stack, ended):
    # int 50h with a stack of 32 (flags 40h) or 16 bits, or that grows down to its limit (4), at 60000h
    if real_engine == "kvm" and PVM:
        return                                   # which has no INT here
    machine = built(make, real_engine, Case("", "", "cd50", 0, 0, None))
    state = machine.cpu.get_state()
    state.ss = Segment(selector=0x10, base=0x60000, limit=limit, type=7 if flags & 4 else 3, db=bool(flags & 0x40))
    state.gpr[RSP] = stack
    machine.cpu.set_state(state)
    assert machine.cpu.run().reason.name == ended
    if ended == "HALTED":
        assert machine.cpu.get_gpr()[RIP] == HANDLERS + 0x51
        mask = 0xFFFF_FFFF if flags & 0x40 else 0xFFFF
        frame = [struct.unpack_from("<I", machine.memory, 0x60000 + ((stack - at) & mask))[0] for at in (4, 8, 12)]
        assert frame == [2, 8, CODE + 2]


def test_an_inner_stack_without_room_is_told_by_its_selector(make):
    # Ring 3's int 50h finds no room on ring 0's stack; #SS is handled in ring 1, whose stack has.
    small, ring1_code, ring1_data = 0x00409200_00000003 | 0x6 << 32, 0x00CFBB00_0000FFFF, 0x00CFB300_0000FFFF
    case = Case("", "", "cd50", 3, 0, None, gdt={8: small, 9: ring1_code, 10: ring1_data})
    machine = built(make, "software", case)
    machine.poke(TSS + 8, struct.pack("<I", 0x40))
    machine.poke(TSS + 12, struct.pack("<II", 0xA000, 0x51))
    machine.poke(IDT + 12 * 8, struct.pack("<HHBBH", HANDLERS + 12, 0x49, 0, 0x8E, 0))
    machine.poke(HANDLERS + 12, bytes.fromhex("ebfe"))               # HLT is ring 0's
    machine.cpu.set_state(machine.cpu.get_state())
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    assert machine.cpu.run().reason is ExitReason.KICKED
    gpr = machine.cpu.get_gpr()
    assert gpr[RIP] == HANDLERS + 12
    assert struct.unpack_from("<5I", machine.memory, gpr[RSP]) == (0x40, CODE, 0x1B, 0x10002, RING3_STACK)


def test_instructions_end_with_their_code_segment(make, real_engine):
    # At 0:0FFFDh inc ax; inc ax; inc ax; and behind the end inc ax
    machine = make(real_engine, 4 << 20)
    machine.load("f4")
    machine.poke(0xFFFD, bytes.fromhex("40404040 f4"))
    halting_handlers(machine, 13)
    state = machine.cpu.get_state()
    state.gpr[RIP] = 0xFFFD
    machine.cpu.set_state(state)
    result = machine.cpu.run()
    assert result.reason is ExitReason.HALTED
    assert machine.cpu.get_gpr()[RIP] == 0x60E
    assert machine.cpu.get_gpr()[RAX] == 3


@pytest.mark.parametrize(("ring", "flags", "vector"), [(3, 1 << 18, 17), (3, 0, 0x50), (0, 1 << 18, 0x50)])
def test_alignment_is_checked_in_ring_3_where_the_guest_wants_it(make, ring, flags, vector):
    # mov eax, [9001h]; int 50h
    machine = built(make, "software", Case("", "", "a101900000cd50", ring, vector, None))
    state = machine.cpu.get_state()
    state.gpr[RFLAGS] |= flags
    state.cr0 |= 1 << 18
    machine.cpu.set_state(state)
    assert machine.cpu.run().reason is ExitReason.HALTED
    check(machine, Case("", "", "", ring, vector, (0, 0x10000) if vector == 17 else None), vector,
          (0, 0x10000) if vector == 17 else None)


def test_a_guest_whose_accesses_are_checked_is_kicked_and_counts_right(make):
    # l: inc eax; inc dword [9000h]; add ebx, 3; jmp l, in segments of 1 MiB
    machine = built(make, "software", Case("", "", "40 ff0500900000 83c303 ebf4", 0, 0, None))
    state = machine.cpu.get_state()
    state.ds.limit = state.cs.limit = 0xFFFFF
    machine.cpu.set_state(state)
    signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
    for _ in range(50):
        assert machine.cpu.run().reason is ExitReason.KICKED
        gpr = machine.cpu.get_gpr()
        counted, = struct.unpack_from("<I", machine.memory, 0x9000)
        at = gpr[RIP] - CODE
        assert gpr[RAX] == counted + (at == 1)
        assert gpr[RBX] == 3 * (counted - (at == 7))
    assert counted > 50


@pytest.mark.skipif(shutil.which("nasm") is None, reason="nasm is not installed")
def test_the_bytes_of_every_case_are_those_of_its_source(tmp_path):
    # One file of all: a call of nasm costs more than the assembling.
    cases = [parameter.values[0] for parameter in (*PLAIN, *PAGED, *ACCESSES)]
    lines = ["bits 32"]
    for number, each in enumerate(cases):
        lines += [f"section c{number} align=1 vstart={CODE:#x} {'' if number == 0 else f'follows=c{number - 1}'}",
                  *each.source.split("; ")]
    source, binary = tmp_path / "cases.asm", tmp_path / "cases.bin"
    source.write_text("\n".join(lines) + "\n")
    subprocess.run(["nasm", "-w-all", "-f", "bin", "-o", binary, source], check=True)
    assert binary.read_bytes().hex() == "".join(each.code for each in cases)
