"""The hardware lab: the installed wheel on hosts with real VT-x, real AMD-V, and neither.

Bochs emulates VT-x well enough for the kernel's kvm_intel, QEMU's TCG emulates AMD-V well enough
for kvm_amd. So each host here is an emulator that boots Debian's kernel into an image of Debian's
Python with the project's wheel, runs checks there and tells of them on a serial line.

| module | what it does |
|---|---|
| `hosts` | which hosts there are, what each must be found to be, which checks run there |
| `parts` | Debian packages and wheels for them, fetched once and kept |
| `image` | the disk that the hosts boot |
| `emulator` | one booted host: a process, a deadline, what it told |
| `report` | the table |
| `inside/` | what runs inside the hosts |

`python -m tests.lab` (make lab) runs them. The lab's clocks are no clocks: everything here is
functional, and the times in the table are what a host cost to run.
"""
